package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/vm"
)

// The cast: mac-1, a Mac on which everything is as it should be. It has joined, two VMs
// run with their helpers 100 and 101, and its user mia sits at the display. Each case
// changes one thing and says what then is found.
type cast struct {
	t *testing.T
	Subject
	outputs map[string]string // by the program and its first arguments
	failing map[string]bool   // the same: it ends with an error
	files   map[string]string
	skew    time.Duration // of the controller
	status  int
	role    access.Role
	name    string
	ends    time.Duration // of the credential, from now
	hash    string        // pinned; "": the right one
	paths   map[string]fs.FileMode
}

const leases = "{\n\tip_address=192.168.64.2\n\thw_address=1,2:0:0:0:0:1\n\tlease=0xffffffff\n}\n"

func newCast(t *testing.T) *cast {
	c := &cast{t: t, status: http.StatusOK, role: access.Node, name: "mac-1", ends: 60 * 24 * time.Hour}
	states := true
	// Sockets have short paths, which t.TempDir's are not.
	dir, err := os.MkdirTemp("", "doc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	c.Subject = Subject{
		Node:    config.Node{Name: "mac-1", Slots: 2, Driver: config.DriverVZ, SavedStates: &states, Dir: dir, QEMU: config.QEMU{Accel: "tcg"}},
		Pools:   []config.Pool{{Memory: 8e9}, {Memory: 4e9}},
		Program: "/usr/local/bin/paddock", Now: time.Now, Credential: filepath.Join(dir, "credential.json"), HelperRole: "vm-helper",
		Machine: Machine{OS: "darwin", Arch: "arm64", UID: os.Getuid(), User: "mia", Home: "/Users/mia", Memory: 32e9,
			CanShare: func(string) (bool, error) { return true, nil },
			Free:     func(string) (int64, error) { return 500e9, nil },
			Files:    func() (uint64, error) { return 10240, nil },
			KVM:      func() error { return nil }},
	}
	c.outputs = map[string]string{
		"sw_vers -productVersion":     "15.1\n",
		"codesign -d":                 "<dict>\n<key>com.apple.security.virtualization</key>\n<true/></dict>",
		"launchctl managername":       "Aqua\n",
		"security show-keychain-info": "Keychain no-timeout\n",
		"stat -f":                     "mia\n",
		"plutil -extract":             "600\n",
		"ps -axww": " 1 0 /sbin/launchd\n 100 1 /usr/local/bin/paddock vm-helper -driver vz\n 101 1 /a dir/paddock vm-helper\n" +
			" 200 1 /System/" + framework + ".xpc/" + framework + "\n 201 1 /System/" + framework + ".xpc/" + framework + "\n",
	}
	c.failing, c.files = map[string]bool{}, map[string]string{sharing: "bplist00", vm.LeasesFile: leases}
	c.paths = map[string]fs.FileMode{"": 0o700, c.Credential: 0o600}
	for i, id := range []string{"aaaaaaaa", "bbbbbbbb"} {
		c.put("vms/"+id+"/helper.pid", fmt.Sprint(100+i))
	}
	return c
}

func (c *cast) put(name, text string) {
	c.t.Helper()
	path := filepath.Join(c.Node.Dir, name)
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err == nil {
		err = os.WriteFile(path, []byte(text), 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// link has a part of the directory lie elsewhere.
func (c *cast) link(name, target string) {
	c.t.Helper()
	if err := os.Symlink(target, filepath.Join(c.Node.Dir, name)); err != nil {
		c.t.Fatal(err)
	}
}

// examine completes the cast with its controller and its credential, and examines it.
func (c *cast) examine() map[string]Finding {
	c.t.Helper()
	// Where a test is run by root, the user is not the point but for one check.
	if c.Machine.UID == 0 {
		c.Machine.UID = 501
		if err := os.Chown(c.Node.Dir, 501, -1); err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.t.Fatal(err)
		}
	}
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(c.skew).UTC().Format(http.TimeFormat))
		w.WriteHeader(c.status)
	}))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo) // a client that refuses it is meant to
	c.t.Cleanup(server.Close)
	token, err := access.NewKey().Sign(access.Identity{ID: access.NewID(), Role: c.role, Subject: c.name, ExpiresAt: time.Now().Add(c.ends)})
	if err != nil {
		c.t.Fatal(err)
	}
	sum := sha256.Sum256(server.Certificate().Raw)
	e := Controller{URL: server.URL, Certificate: hex.EncodeToString(sum[:]), Token: string(token)}
	c.Helpers = filepath.Join(c.Node.Dir, "vms")
	c.Joined = func() (Controller, error) {
		_, err := os.Stat(c.Credential)
		return e, err
	}
	if c.hash != "" {
		e.Certificate = c.hash
	}
	if mode, joined := c.paths[c.Credential]; joined {
		c.put("credential.json", "what e is")
		if err := os.Chmod(c.Credential, mode); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := os.Chmod(c.Node.Dir, c.paths[""]); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.t.Fatal(err)
	}
	c.Machine.Run = func(ctx context.Context, program string, args ...string) (string, error) {
		call := program + " " + args[0]
		out, known := c.outputs[call]
		switch {
		case !known:
			return "", errors.New("executable file not found in $PATH")
		case c.failing[call]:
			return out, errors.New("exit status 1")
		}
		return out, ctx.Err()
	}
	c.Machine.ReadFile = func(path string) ([]byte, error) {
		switch text, known := c.files[path]; {
		case !known:
			return nil, fs.ErrNotExist
		case text == "denied":
			return nil, fs.ErrPermission
		default:
			return []byte(text), nil
		}
	}
	found := map[string]Finding{}
	for _, f := range Examine(c.t.Context(), c.Subject) {
		if _, twice := found[f.Check]; twice || f.Check == "" || f.Text == "" {
			c.t.Errorf("a check without a name or a text, or twice: %+v", f)
		}
		if (f.Result == Warn || f.Result == Fail) && f.Fix == "" {
			c.t.Errorf("%s does not say what to do: %+v", f.Check, f)
		}
		found[f.Check] = f
	}
	return found
}

func TestHealthyMac(t *testing.T) {
	for check, f := range newCast(t).examine() {
		want := OK
		switch check {
		case "kvm", "local-network": // not of this system; nobody can know
			want = Skip
		}
		if f.Result != want {
			t.Errorf("want %s: %+v", want, f)
		}
	}
}

// finding is what one change of the cast makes one check say.
type finding struct {
	change func(*cast)
	check  string
	result Result
	text   string // is in the finding's text
}

func TestChecks(t *testing.T) {
	cases := maps.Clone(driverFindings)
	maps.Copy(cases, roomFindings)
	maps.Copy(cases, networkFindings)
	if want := len(driverFindings) + len(roomFindings) + len(networkFindings); len(cases) != want {
		t.Errorf("%d cases have a name of their own, of %d", len(cases), want)
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			cast := newCast(t)
			c.change(cast)
			f := cast.examine()[c.check]
			if f.Result != c.result || !strings.Contains(f.Text, c.text) {
				t.Errorf("%s finds %+v; want %s with %q", c.check, f, c.result, c.text)
			}
		})
	}
}

// onLinux and onQEMU make another host of the cast.
func onLinux(c *cast) {
	c.Machine.OS, c.Machine.Arch, c.Node.Driver = "linux", "amd64", config.DriverProcess
}
func onQEMU(c *cast) { onLinux(c); c.Node.Driver = config.DriverQEMU }

// manyLeases are 240 of the 253 that a network has.
func manyLeases() string {
	many := ""
	for i := range 240 {
		many += strings.Replace(leases, "64.2", fmt.Sprintf("64.%d", i+1), 1)
	}
	return many
}

// driverFindings are of whether VMs can start at all.
var driverFindings = map[string]finding{
	"vz on Linux":          {func(c *cast) { c.Machine.OS = "linux" }, "driver", Fail, "Apple Silicon"},
	"vz on Intel":          {func(c *cast) { c.Machine.Arch = "amd64" }, "driver", Fail, "darwin/amd64"},
	"an old macOS":         {func(c *cast) { c.outputs["sw_vers -productVersion"] = "12.6\n" }, "driver", Fail, "needs 13"},
	"no states yet":        {func(c *cast) { c.outputs["sw_vers -productVersion"] = "13.6\n" }, "driver", Warn, "saves no states"},
	"no states wanted":     {func(c *cast) { c.outputs["sw_vers -productVersion"] = "13.6\n"; *c.Node.SavedStates = false }, "driver", OK, "13.6"},
	"no sw_vers":           {func(c *cast) { delete(c.outputs, "sw_vers -productVersion") }, "driver", Skip, "not found"},
	"odd sw_vers":          {func(c *cast) { c.outputs["sw_vers -productVersion"] = "Sequoia" }, "driver", Skip, "Sequoia"},
	"process":              {onLinux, "driver", Warn, "without isolation"},
	"another driver":       {func(c *cast) { c.Node.Driver = "xen" }, "driver", Fail, `"xen"`},
	"no entitlement":       {func(c *cast) { c.outputs["codesign -d"] = "<dict></dict>" }, "entitlement", Fail, "not signed with"},
	"entitlement is false": {func(c *cast) { c.outputs["codesign -d"] = "<key>com.apple.security.virtualization</key><false/>" }, "entitlement", Fail, "not signed with"},
	"not signed": {func(c *cast) {
		c.outputs["codesign -d"] = "code object is not signed at all"
		c.failing["codesign -d"] = true
	}, "entitlement", Fail, "not signed at all"},
	"signature on Linux": {onLinux, "entitlement", Skip, "macOS only"},
	"the keychain is locked": {func(c *cast) {
		c.failing["security show-keychain-info"] = true
		c.outputs["security show-keychain-info"] = "User interaction is not allowed."
	}, "keychain", Fail, "not allowed"},
	"a shell over SSH":          {func(c *cast) { c.outputs["launchctl managername"] = "Background\n" }, "keychain", Skip, "display session"},
	"macOS 14 has no such rule": {func(c *cast) { c.outputs["sw_vers -productVersion"] = "14.4\n" }, "keychain", Skip, "does not ask"},
	"nobody at the display":     {func(c *cast) { c.outputs["stat -f"] = "root\n" }, "display", Fail, "belongs to root"},
	"display not known":         {func(c *cast) { c.failing["stat -f"] = true }, "display", Skip, "not known"},
	"kvm not used":              {onQEMU, "kvm", Skip, "accel is tcg"},
	"kvm wanted and missing": {func(c *cast) {
		onQEMU(c)
		c.Node.QEMU.Accel = "kvm"
		c.Machine.KVM = func() error { return fs.ErrNotExist }
	}, "kvm", Fail, "cannot be used"},
	"kvm wanted and there": {func(c *cast) { onQEMU(c); c.Node.QEMU.Accel = "kvm" }, "kvm", Warn, "not known before one has booted"},
}

// roomFindings are of whether they fit.
var roomFindings = map[string]finding{
	"open directory":         {func(c *cast) { c.paths[""] = 0o755 }, "directory", Fail, "mode 0755"},
	"another's directory":    {func(c *cast) { c.Machine.UID = 4711 }, "directory", Fail, "belongs to user"},
	"images elsewhere":       {func(c *cast) { c.link("images", "/dev") }, "directory", Warn, "images of"},
	"no directory":           {func(c *cast) { c.Node.Dir += "/none"; c.paths = map[string]fs.FileMode{} }, "directory", Skip, "not there yet"},
	"no directory, no disk":  {func(c *cast) { c.Node.Dir += "/none"; c.paths = map[string]fs.FileMode{} }, "disk", Skip, "not there yet"},
	"clones are copies":      {func(c *cast) { c.Machine.CanShare = func(string) (bool, error) { return false, nil } }, "clones", Warn, "copied"},
	"directory is read only": {func(c *cast) { c.Machine.CanShare = func(string) (bool, error) { return false, fs.ErrPermission } }, "clones", Fail, "permission"},
	"half a disk":            {func(c *cast) { c.Machine.Free = func(string) (int64, error) { return 79e9, nil } }, "disk", Warn, "79 GB left"},
	"no disk":                {func(c *cast) { c.Machine.Free = func(string) (int64, error) { return 39e9, nil } }, "disk", Fail, "no VM is placed"},
	"pools that grow less": {func(c *cast) {
		c.Machine.Free = func(string) (int64, error) { return 39e9, nil }
		c.Pools[0].Growth = 10e9
	}, "disk", OK, "20 GB"},
	"disk not known":            {func(c *cast) { c.Machine.Free = func(string) (int64, error) { return 0, errors.New("odd") } }, "disk", Skip, "odd"},
	"slots over the memory":     {func(c *cast) { c.Node.Slots = 5 }, "memory", Warn, "do not fit"},
	"one VM over it":            {func(c *cast) { c.Pools[1].Memory = 64e9 }, "memory", Fail, "does not fit at all"},
	"no pools here":             {func(c *cast) { c.Pools = nil }, "memory", Skip, "no pool"},
	"memory not known":          {func(c *cast) { c.Machine.Memory = 0 }, "memory", Skip, "not known"},
	"few files":                 {func(c *cast) { c.Machine.Files = func() (uint64, error) { return 256, nil } }, "files", Warn, "256"},
	"a long path":               {func(c *cast) { c.Node.Dir += strings.Repeat("/deep", 20); c.paths = map[string]fs.FileMode{} }, "sockets", Fail, "shorter"},
	"a helper is gone":          {func(c *cast) { c.put("vms/cccccccc/helper.pid", "999") }, "machines", Warn, "cccccccc"},
	"a number taken by another": {func(c *cast) { c.put("vms/cccccccc/helper.pid", "1") }, "machines", Warn, "cccccccc"},
	"ended, not yet fetched":    {func(c *cast) { c.put("vms/cccccccc/result.json", "{}") }, "machines", OK, "run: 2"},
	"a helper without a folder": {func(c *cast) { c.outputs["ps -axww"] += " 102 1 /usr/local/bin/paddock vm-helper\n" }, "machines", Warn, "helper 102"},
	"another program's VM":      {func(c *cast) { c.outputs["ps -axww"] += " 202 1 /System/" + framework + "\n" }, "machines", Warn, "1 of Virtualization.framework"},
	"a QEMU without a helper":   {func(c *cast) { onQEMU(c); c.outputs["ps -axww"] += " 300 1 /usr/bin/qemu-system-aarch64 -M virt\n" }, "machines", Warn, "QEMU 300"},
	"a QEMU with one":           {func(c *cast) { onQEMU(c); c.outputs["ps -axww"] += " 300 100 qemu-system-x86_64 -M q35\n" }, "machines", OK, "run: 2"},
	"no ps":                     {func(c *cast) { delete(c.outputs, "ps -axww") }, "machines", Skip, "not found"},
	"a ps that says nothing":    {func(c *cast) { c.outputs["ps -axww"] = "PID\n" }, "machines", Skip, "lists nothing"},
}

// networkFindings are of whether guests and the controller are reached.
var networkFindings = map[string]finding{
	"leases of a day": {func(c *cast) { delete(c.files, sharing) }, "lease-time", Warn, "a day"},
	"no lease time in it": {func(c *cast) {
		c.failing["plutil -extract"] = true
		c.outputs["plutil -extract"] = "Could not extract value, error: No value at that key path or invalid key path: bootpd"
	}, "lease-time", Warn, "a day"},
	"leases of eight hours":        {func(c *cast) { c.outputs["plutil -extract"] = "28800\n" }, "lease-time", Warn, "8h"},
	"lease time of another kind":   {func(c *cast) { c.outputs["plutil -extract"] = "soon\n" }, "lease-time", Skip, "soon"},
	"lease time not readable":      {func(c *cast) { c.files[sharing] = "denied" }, "lease-time", Skip, "permission"},
	"no plutil":                    {func(c *cast) { delete(c.outputs, "plutil -extract") }, "lease-time", Skip, "not found"},
	"no lease yet":                 {func(c *cast) { delete(c.files, vm.LeasesFile) }, "leases", OK, "no address"},
	"hardly an address left":       {func(c *cast) { c.files[vm.LeasesFile] = manyLeases() }, "leases", Fail, "240 of 253"},
	"all ended":                    {func(c *cast) { c.files[vm.LeasesFile] = strings.ReplaceAll(manyLeases(), "0xffffffff", "0x1") }, "leases", OK, "0 of 253"},
	"leases not readable":          {func(c *cast) { c.files[vm.LeasesFile] = "denied" }, "leases", Skip, "permission"},
	"not joined":                   {func(c *cast) { delete(c.paths, c.Credential) }, "credential", Fail, "not joined"},
	"not joined, no controller":    {func(c *cast) { delete(c.paths, c.Credential) }, "controller", Skip, "not joined"},
	"credential open to others":    {func(c *cast) { c.paths[c.Credential] = 0o644 }, "credential", Fail, "open to other users"},
	"another node's credential":    {func(c *cast) { c.name = "mac-2" }, "credential", Fail, "node:mac-2"},
	"a person's credential":        {func(c *cast) { c.role = access.Admin }, "credential", Fail, "admin:mac-1"},
	"the credential ended":         {func(c *cast) { c.ends = -time.Hour }, "credential", Fail, "ended on"},
	"the credential was forgotten": {func(c *cast) { c.ends = 48 * time.Hour }, "credential", Warn, "not renewed"},
	"another certificate":          {func(c *cast) { c.hash = strings.Repeat("ab", 32) }, "controller", Fail, "another certificate"},
	"no controller there":          {func(c *cast) { c.status = http.StatusBadGateway }, "controller", Fail, "502"},
	"no clock without one":         {func(c *cast) { c.status = http.StatusBadGateway }, "clock", Skip, "did not answer"},
	"the clock is slow":            {func(c *cast) { c.skew = 50 * time.Second }, "clock", Fail, "off the controller's"},
	"the clock is fast":            {func(c *cast) { c.skew = -50 * time.Second }, "clock", Fail, "off the controller's"},
	"the clock is nearly right":    {func(c *cast) { c.skew = 9 * time.Second }, "clock", OK, "off the controller's"},
}

func TestRoot(t *testing.T) {
	for system, want := range map[string]Result{"darwin": Fail, "linux": Warn} {
		s := Subject{Machine: Machine{OS: system}}
		if f := checkUser(t.Context(), &s); f.Result != want || f.Fix == "" {
			t.Errorf("root on %s: %+v", system, f)
		}
	}
}

// Without any of the system's programs and rights nothing is ok but what was looked at.
func TestBlind(t *testing.T) {
	c := newCast(t)
	c.outputs, c.files = nil, map[string]string{sharing: "denied", vm.LeasesFile: "denied"}
	c.Machine.Free = func(string) (int64, error) { return 0, fs.ErrPermission }
	c.Machine.Files = func() (uint64, error) { return 0, fs.ErrPermission }
	c.Machine.CanShare = func(string) (bool, error) { return false, fs.ErrPermission }
	c.Machine.Memory = 0
	for check, f := range c.examine() {
		switch check {
		case "user", "directory", "sockets", "credential", "controller", "clock": // looked at all the same
		default:
			if f.Result == OK {
				t.Errorf("ok without having looked: %+v", f)
			}
		}
	}
}

// This very machine: whatever it is, all checks end, and the directory is as it was.
func TestThisMachine(t *testing.T) {
	dir := t.TempDir()
	s := Subject{Node: config.Node{Name: "n", Slots: 1, Driver: config.DriverQEMU, Dir: dir, QEMU: config.QEMU{Accel: "kvm"}}, Program: os.Args[0], Now: time.Now, Machine: This(),
		Helpers: filepath.Join(dir, "vms"), HelperRole: "vm-helper", Joined: func() (Controller, error) { return Controller{}, fs.ErrNotExist }}
	found := map[string]Finding{}
	for _, f := range Examine(t.Context(), s) {
		found[f.Check] = f
	}
	// What every machine that runs tests can tell.
	for _, check := range []string{"clones", "disk", "files", "machines", "user"} {
		if found[check].Result == Skip {
			t.Errorf("not known here: %+v", found[check])
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left %v (%v)", left, err)
	}
	if s.Machine.User == "" {
		t.Error("the user has no name")
	}
}
