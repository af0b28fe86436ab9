package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/host"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/cmd/internal/smoke"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
	"github.com/paddock-ci/paddock/vm/vz"
)

// mac is a Mac that is all it should be, but for answers.
func mac(t *testing.T, answers map[string]string) host.Machine {
	t.Helper()
	m := host.This()
	m.OS, m.Arch, m.UID, m.User, m.Home, m.Memory = "darwin", "arm64", 501, "ada", "/Users/ada", 24<<30
	m.ReadFile = func(string) ([]byte, error) { return nil, os.ErrNotExist }
	m.Free = func(string) (int64, error) { return 500e9, nil }
	m.CanShare = func(string) (bool, error) { return true, nil }
	m.Run = func(_ context.Context, program string, args ...string) (string, error) {
		line := strings.Join(append([]string{program}, args...), " ")
		for _, known := range []map[string]string{answers, {
			"sysctl -n hw.model machdep": "Mac16,10\nApple M4",
			"sysctl -n kern.hv_support":  "1",
			"sw_vers -productVersion":    "15.5",
			"sw_vers -buildVersion":      "24F74",
			"codesign -d --entitlements": "<plist version=\"1.0\"><dict><key>com.apple.security.virtualization</key><true/></dict></plist>",
			"security show-keychain":     "Keychain \"login\" no-timeout",
			"stat -f %Su /dev/console":   "ada",
			"launchctl managername":      "Aqua",
			"ps ":                        "    1 /sbin/launchd\n  345 /bin/zsh -c " + vmService,
		}} {
			for begins, said := range known {
				if strings.HasPrefix(line, begins) {
					return said, nil
				}
			}
		}
		return "", errors.New("exit status 1")
	}
	return m
}

func TestExamine(t *testing.T) {
	for _, p := range []struct{ name, question, answer, check, text string }{
		{"a Mac", "", "", "mac", "Mac16,10 Apple M4, build 24F74, 25.8 GB of memory"},
		{"a Mac in a Mac", "sysctl -n kern.hv_support", "0", "mac", "no hypervisor"},
		{"no signature", "codesign", "Executable=/paddock", "entitlement", "is not signed with"},
		{"somebody else's display", "stat -f %Su /dev/console", "root", "display", "belongs to root"},
	} {
		t.Run(p.name, func(t *testing.T) {
			answers, want := map[string]string{}, host.OK
			if p.question != "" {
				answers[p.question], want = p.answer, host.Fail
			}
			for _, f := range examine(t.Context(), mac(t, answers), "/usr/local/bin/paddock", t.TempDir(), t.TempDir()) {
				switch {
				case f.Check == p.check:
					if f.Result != want || !strings.Contains(f.Text, p.text) || want == host.Fail && f.Fix == "" {
						t.Errorf("%+v, want %s with %q", f, want, p.text)
					}
				case f.Result == host.Fail, slices.Contains(nodesOnly, f.Check):
					t.Errorf("%+v: unasked", f)
				}
			}
		})
	}
	for processes, want := range map[string]int{
		"": 0, "  1 launchd\n 2 grep " + vmService: 0,
		" 77 /System/Library/Frameworks/" + vmService + ".xpc/Contents/MacOS/" + vmService + "\n": 1,
	} {
		if got, err := services(t.Context(), mac(t, map[string]string{"ps ": processes})); err != nil || len(got) != want {
			t.Errorf("of %q it makes %v, %v", processes, got, err)
		}
	}
}

// smokeImage is an image that processes boot of.
func smokeImage(t *testing.T, system string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "image")
	config := `{"version": 1, "os": "` + system + `", "arch": "arm64"}`
	if system == "darwin" {
		config = `{"version": 1, "os": "darwin", "arch": "arm64", "ecid": "ZWNpZA==", "hardwareModel": "bW9kZWw="}`
	}
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, vm.DiskFile), []byte("disk"), 0o600),
		os.WriteFile(filepath.Join(dir, vm.ConfigFile), []byte(config), 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// smokeOn runs the command's inside on machines of the process driver, in helpers as in
// production, and returns what it prints.
func smokeOn(t *testing.T, output string, f *smokeFlags, plant func(*smokeParts)) (string, error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "macsmoke") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	driver, err := helper.New(helper.Config{Command: []string{self, parts.HelperRole, "-driver", config.DriverProcess}, Dir: filepath.Join(dir, "run")})
	if err != nil {
		t.Fatal(err)
	}
	p := smokeParts{driver: driver, host: mac(t, nil), self: self, dir: dir}
	p.left = func(ctx context.Context) ([]string, error) { return machinesHere(ctx, p.host, driver) }
	if plant != nil {
		plant(&p)
	}
	var out, progress bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	cmd.SetErr(&progress)
	err = trySmoke(t.Context(), cmd, &globals{output: output}, f, p)
	if output == "json" && progress.Len() > 0 {
		t.Errorf("it says %q beside JSON", &progress)
	}
	if left, listing := driver.List(); len(left) > 0 || listing != nil {
		t.Errorf("left over: %v (%v)", left, listing)
	}
	for _, at := range []string{f.dir, filepath.Dir(f.image)} {
		if left, _ := filepath.Glob(filepath.Join(at, "paddock-smoke-*")); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
	return out.String(), err
}

func TestMacsmoke(t *testing.T) {
	f := &smokeFlags{image: smokeImage(t, "linux"), bootstrap: string(fleet.BootstrapAgent)}
	text, err := smokeOn(t, "json", f, nil)
	if err != nil {
		t.Errorf("%v\n%s", err, text)
	}
	var r smokeReport
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	by := map[string]smoke.Result{}
	for _, s := range r.Steps {
		by[s.Step] = s
	}
	for _, name := range []string{"boot", "answer", "command", "clock", "destroy", "boot again", "leftovers"} {
		if by[name].Outcome != smoke.OK {
			t.Errorf("%+v", by[name])
		}
	}
	for _, name := range []string{"save", "resume", "one too many"} { // processes can do neither
		if by[name].Outcome != smoke.Skipped {
			t.Errorf("%+v, want it skipped", by[name])
		}
	}
	if len(r.Host) < 5 || r.Image != f.image || time.Since(r.At) > time.Hour {
		t.Errorf("the report's head is %+v", r)
	}
}

// What fails shows itself in the report, in what to do and in the exit status.
func TestMacsmokeFails(t *testing.T) {
	// Processes have no limit, as the framework has for macOS: a third machine boots.
	text, err := smokeOn(t, "table", &smokeFlags{image: smokeImage(t, "darwin"), bootstrap: string(fleet.BootstrapAgent), dir: t.TempDir()}, nil)
	if err == nil || exitStatus(err) != exitFailed || !strings.Contains(err.Error(), "1 check failed") {
		t.Errorf("it ends with %v\n%s", err, text)
	}
	for _, want := range []string{"STEP ", "CHECK ", "machine 3 of 2 boots", "the limit is not seen as one", "Mac16,10 Apple M4, build 24F74"} {
		if !strings.Contains(text, want) {
			t.Errorf("it says\n%s\nwant %q", text, want)
		}
	}
	// Nobody serves SSH in a process: the wrong bootstrap.
	text, err = smokeOn(t, "table", &smokeFlags{image: smokeImage(t, "linux"), bootstrap: string(fleet.BootstrapSSH), user: "admin"}, nil)
	if err == nil || !strings.Contains(text, "cannot be reached so: ") {
		t.Errorf("by SSH it ends with %v\n%s", err, text)
	}
	// The host alone.
	text, err = smokeOn(t, "table", &smokeFlags{}, func(p *smokeParts) {
		p.host = mac(t, map[string]string{"codesign": "no signature"})
	})
	if err == nil || exitStatus(err) != exitFailed || !strings.Contains(text, "give --image or --linux") || !strings.Contains(text, "codesign --force") {
		t.Errorf("of the host alone it says\n%s\n%v", text, err)
	}
}

// Where nothing can be tried the report is printed all the same, since its head may say why.
func TestMacsmokeCannotBegin(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for name, c := range map[string]struct {
		flags *smokeFlags
		plant func(*smokeParts)
		says  string
	}{
		"no image":           {&smokeFlags{image: none, bootstrap: string(fleet.BootstrapAgent)}, nil, none},
		"no password":        {&smokeFlags{image: smokeImage(t, "linux"), bootstrap: string(fleet.BootstrapSSH), password: none}, nil, "read the password"},
		"no processes' list": {&smokeFlags{image: smokeImage(t, "linux"), bootstrap: string(fleet.BootstrapAgent)}, func(p *smokeParts) { p.left = unlisted }, "no ps"},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := smokeOn(t, "json", c.flags, c.plant)
			if err == nil || exitStatus(err) != exitFailed || !strings.Contains(err.Error(), "1 check failed") {
				t.Errorf("it ends with %v", err)
			}
			var r smokeReport
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			if len(r.Host) < 5 || len(r.Steps) != 1 || r.Steps[0].Step != "begin" || r.Steps[0].Outcome != smoke.Failed || !strings.Contains(r.Steps[0].Detail, c.says) || r.Steps[0].Advice == "" {
				t.Errorf("%+v, want the host and a failed beginning with %q", r, c.says)
			}
		})
	}
}

func unlisted(context.Context) ([]string, error) { return nil, errors.New("no ps") }

// A kernel and an initial RAM disk become an image that a driver finds them in.
func TestLinuxImage(t *testing.T) {
	dir := t.TempDir()
	want := map[string]string{"vmlinuz": strings.Repeat("kernel", 1<<18), "initrd": "ram disk"}
	for name, text := range want {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "image")
	if err := linuxImage(image, filepath.Join(dir, "vmlinuz")+","+filepath.Join(dir, "initrd")); err != nil {
		t.Fatal(err)
	}
	c, err := vm.ReadConfig(image)
	if err != nil || c.OS != "linux" {
		t.Fatalf("%+v, %v", c, err)
	}
	kernel, initrd, err := vm.BootFiles(image, c.Boot)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{kernel: want["vmlinuz"], initrd: want["initrd"]} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s has %d bytes, want %d (%v)", path, len(got), len(want), err)
		}
	}
}

func TestSmokeFlags(t *testing.T) {
	for _, p := range []struct {
		flags        smokeFlags
		system, arch string
		want         string // in the error; else the bootstrap
	}{
		{smokeFlags{}, "linux", "amd64", "needs an Apple Silicon Mac, this is linux/amd64"},
		{smokeFlags{}, "darwin", "amd64", "needs an Apple Silicon Mac"},
		{smokeFlags{image: "a", linux: "b,c"}, "darwin", "arm64", "two guests"},
		{smokeFlags{linux: "b"}, "darwin", "arm64", "does not name two files"},
		{smokeFlags{bootstrap: "telnet"}, "darwin", "arm64", `unknown bootstrap "telnet"`},
		{smokeFlags{image: "a"}, "darwin", "arm64", "ssh"},
		{smokeFlags{linux: "b,c"}, "darwin", "arm64", "agent"},
	} {
		err := p.flags.check(p.system, p.arch)
		if err == nil && p.flags.bootstrap != p.want || err != nil && (!strings.Contains(err.Error(), p.want) || exitStatus(err) != exitUsage) {
			t.Errorf("%+v on %s/%s: %v, want %q", p.flags, p.system, p.arch, err, p.want)
		}
	}
}

// install makes what vz.Install does, in no time.
func install(_ context.Context, c vz.InstallConfig) error {
	if c.Progress != nil {
		for _, done := range []float64{0, 0.05, 0.1, 0.11, 0.5, 1} {
			c.Progress(done)
		}
	}
	return errors.Join(os.Mkdir(c.Dir, 0o700), os.WriteFile(filepath.Join(c.Dir, vm.DiskFile), make([]byte, 1000), 0o600),
		os.WriteFile(filepath.Join(c.Dir, vm.ConfigFile), []byte(`{"version":1,"os":"linux","cpuCount":4,"memorySize":8589934592}`), 0o600))
}

func TestImageCreate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "image")
	run := func(output string, install func(context.Context, vz.InstallConfig) error, args ...string) (string, string, error) {
		var out, progress bytes.Buffer
		cmd := imageCreateCommand(&globals{output: output}, install)
		cmd.SilenceUsage, cmd.SilenceErrors = true, true
		cmd.SetOut(&out)
		cmd.SetErr(&progress)
		cmd.SetArgs(args)
		err := cmd.ExecuteContext(t.Context())
		return out.String(), progress.String(), err
	}
	var asked vz.InstallConfig
	out, progress, err := run("table", func(ctx context.Context, c vz.InstallConfig) error { asked = c; return install(ctx, c) },
		"--ipsw", "latest", "--disk", "80GB", "--cpu", "4", "--memory", "8GiB", dir)
	if err != nil || !strings.Contains(out, dir+": a disk of 1.0 kB, 4 cores, 8.6 GB of memory, made in ") {
		t.Errorf("it says %q, %v", out, err)
	}
	if asked.IPSW != "" || asked.Dir != dir || asked.DiskSize != 80e9 || asked.CPU != 4 || asked.Memory != 8<<30 {
		t.Errorf("it asks for %+v", asked)
	}
	if lines := strings.Split(strings.TrimSpace(progress), "\n"); len(lines) != 4 || lines[0] != "0%" || lines[3] != "100%" || !strings.HasPrefix(lines[1], "10%, about ") {
		t.Errorf("its progress is %q", lines)
	}
	out, progress, err = run("json", install, "--ipsw", dir+"/"+vm.DiskFile, dir+"2")
	if err != nil || progress != "" || !strings.Contains(out, `"disk": 1000`) {
		t.Errorf("as JSON it says %q, %q, %v", out, progress, err)
	}
	for _, p := range []struct {
		install func(context.Context, vz.InstallConfig) error
		args    []string
		status  int
		want    string
	}{
		{func(context.Context, vz.InstallConfig) error { return vz.ErrPlatform }, []string{"--ipsw", "latest", dir + "3"}, exitUsage, "Apple Silicon Mac"},
		{install, []string{dir + "4"}, exitUsage, "--ipsw"},
		{install, []string{"--ipsw", "no/such.ipsw", dir + "5"}, exitUsage, "no restore image"},
		{install, []string{"--ipsw", "latest", "--disk", "80", dir + "6"}, exitFailed, "not a size"}, // usage, where the whole tree is strict
		{install, []string{"--ipsw", "latest", "--cpu", "-1", dir + "7"}, exitUsage, "-1 cores"},
		{func(context.Context, vz.InstallConfig) error { return vm.ErrAtCapacity }, []string{"--ipsw", "latest", dir + "8"}, exitFailed, "slot"},
	} {
		if _, _, err := run("table", p.install, p.args...); err == nil || exitStatus(err) != p.status || !strings.Contains(err.Error(), p.want) {
			t.Errorf("%q: %v, want %q with status %d", p.args, err, p.want, p.status)
		}
	}
}
