package service_test

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/cmd/internal/service"
)

// awkward is a path that every quoting has trouble with.
const awkward = `/opt/My "Tools" & <co>/50%h $HOME/it's \ 🐎/paddock`

// standIn writes a small program that does what the managers' one does for these tests:
// it keeps what is loaded in a directory, writes down its calls, and fails as it is told
// by files named fail-VERB.
const standIn = `#!/bin/sh
echo "$(basename "$0") $*" >> "$STAND_IN/calls"
[ "$1" = --user ] && shift
verb=$1
if [ -e "$STAND_IN/fail-$verb" ]; then
	echo "the manager's own words about $verb"
	exit 5
fi
case $verb in
print) [ -e "$STAND_IN/loaded" ] || { echo "Could not find service" >&2; exit 113; } ;;
bootstrap)
	[ -e "$STAND_IN/loaded" ] && { echo "Bootstrap failed: 5: Input/output error" >&2; exit 5; }
	cp "$3" "$STAND_IN/loaded" ;;
bootout)
	[ -e "$STAND_IN/loaded" ] || exit 3
	if [ -e "$STAND_IN/slowly" ]; then
		(sleep 1; rm "$STAND_IN/loaded") > /dev/null 2>&1 &
		exit 36
	fi
	rm "$STAND_IN/loaded" ;;
enable)
	case $2 in */*) exit 0 ;; esac # launchd only remembers it
	mkdir -p "$UNITS/default.target.wants"
	ln -sf "$UNITS/$2" "$UNITS/default.target.wants/$2" ;;
disable)
	rm -f "$UNITS/default.target.wants/$3" "$STAND_IN/loaded" ;;
start | restart) cp "$UNITS/$2" "$STAND_IN/loaded" ;;
daemon-reload | reset-failed) ;;
*) exit 64 ;;
esac
`

// host is a home with nothing of ours, and the stand-ins on PATH.
type host struct {
	t          *testing.T
	home, desk string // desk is the stand-in's directory
	config     service.Config
}

func newHost(t *testing.T, system string) *host {
	t.Helper()
	h := &host{t: t, home: filepath.Join(t.TempDir(), "a home"), desk: t.TempDir()}
	bin := t.TempDir()
	for _, name := range []string{"systemctl", "launchctl"} {
		h.write(filepath.Join(bin, name), standIn, 0o755)
	}
	for _, dir := range []string{filepath.Join(h.home, ".config"), filepath.Join(h.home, "Library", "Logs")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("STAND_IN", h.desk)
	t.Setenv("UNITS", filepath.Join(h.home, ".config", "systemd", "user"))
	h.config = service.Config{OS: system, Home: h.home, UID: 501, Program: awkward, Args: []string{"node", "--name", "mac-1"},
		Env: []service.Variable{{Name: "PADDOCK_CONFIG", Value: awkward + ".yaml"}}}
	return h
}

func (h *host) write(path, text string, mode fs.FileMode) {
	h.t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) service(args ...string) *service.Service {
	h.t.Helper()
	c := h.config
	c.Args = append(slices.Clone(c.Args), args...)
	s, err := service.New(c)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

func (h *host) install(want service.Outcome, args ...string) *service.Service {
	h.t.Helper()
	s := h.service(args...)
	got, err := s.Install(h.t.Context())
	if err != nil || got != want {
		h.t.Fatalf("%q (%v), want %q", got, err, want)
	}
	if loaded := h.loaded(); loaded != s.Text() {
		h.t.Fatalf("loaded is\n%s\nwant\n%s", loaded, s.Text())
	}
	return s
}

// loaded is the file that the manager has loaded; "": none.
func (h *host) loaded() string {
	b, _ := os.ReadFile(filepath.Join(h.desk, "loaded"))
	return string(b)
}

// calls are those since the last time.
func (h *host) calls() []string {
	path := filepath.Join(h.desk, "calls")
	b, _ := os.ReadFile(path)
	_ = os.Remove(path)
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// everything lists the home.
func (h *host) everything() []string {
	h.t.Helper()
	var all []string
	if err := filepath.WalkDir(h.home, func(path string, _ fs.DirEntry, err error) error {
		all = append(all, path)
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	return all
}

var systems = []string{"linux", "darwin"}

// Installed, installed again, installed with other flags, uninstalled, uninstalled again:
// after the last nothing is left that was not there before the first.
func TestInstallAndUninstall(t *testing.T) {
	for _, system := range systems {
		t.Run(system, func(t *testing.T) {
			h := newHost(t, system)
			before := h.everything()
			h.install(service.Installed)
			h.calls()
			h.install(service.Unchanged)
			for _, call := range h.calls() {
				if strings.Contains(call, "restart") || strings.Contains(call, "bootout") {
					t.Errorf("an agent that runs as it should was stopped: %s", call)
				}
			}
			s := h.install(service.Updated, "--slots", "4")
			// The agent has written its log meanwhile.
			if log := filepath.Join(h.home, "Library", "Logs", "Paddock"); system == "darwin" {
				h.write(filepath.Join(log, "node.log"), "hello\n", 0o644)
			}
			for _, want := range []bool{true, false} {
				if found, err := s.Uninstall(t.Context()); err != nil || found != want {
					t.Fatalf("uninstalled: %t (%v), want %t", found, err, want)
				}
			}
			if h.loaded() != "" {
				t.Error("it is still loaded")
			}
			if diff := cmp.Diff(before, h.everything()); diff != "" {
				t.Errorf("not as before:\n%s", diff)
			}
		})
	}
}

// The calls themselves, since they are what a real manager gets.
func TestCalls(t *testing.T) {
	for system, want := range map[string][3][]string{
		"linux": {
			{"systemctl --user daemon-reload", "systemctl --user enable paddock-node.service", "systemctl --user restart paddock-node.service"},
			{"systemctl --user daemon-reload", "systemctl --user enable paddock-node.service", "systemctl --user start paddock-node.service"},
			{"systemctl --user disable --now paddock-node.service", "systemctl --user reset-failed paddock-node.service", "systemctl --user daemon-reload"},
		},
		"darwin": {
			{"launchctl print gui/501/org.paddock.node", "launchctl print gui/501/org.paddock.node",
				"launchctl enable gui/501/org.paddock.node", "launchctl bootstrap gui/501 HOME/Library/LaunchAgents/org.paddock.node.plist"},
			{"launchctl print gui/501/org.paddock.node"},
			{"launchctl print gui/501/org.paddock.node", "launchctl bootout gui/501/org.paddock.node", "launchctl print gui/501/org.paddock.node"},
		},
	} {
		t.Run(system, func(t *testing.T) {
			h := newHost(t, system)
			s := h.service()
			for i, step := range []func() error{
				func() error { _, err := s.Install(t.Context()); return err },
				func() error { _, err := s.Install(t.Context()); return err },
				func() error { _, err := s.Uninstall(t.Context()); return err },
			} {
				if err := step(); err != nil {
					t.Fatal(err)
				}
				got := h.calls()
				for k := range got {
					got[k] = strings.ReplaceAll(got[k], h.home, "HOME")
				}
				if diff := cmp.Diff(want[i], got); diff != "" {
					t.Errorf("step %d:\n%s", i+1, diff)
				}
			}
		})
	}
}

// Whatever call of the manager fails: its words are told, a first installation leaves
// nothing, and a later one leaves what was installed before.
func TestManagerFails(t *testing.T) {
	for system, verbs := range map[string][]string{"linux": {"daemon-reload", "enable", "restart"}, "darwin": {"enable", "bootstrap"}} {
		for _, verb := range verbs {
			t.Run(system+"/"+verb, func(t *testing.T) {
				h := newHost(t, system)
				fail := filepath.Join(h.desk, "fail-"+verb)
				before := h.everything()
				h.write(fail, "", 0o644)
				if _, err := h.service().Install(t.Context()); err == nil || !strings.Contains(err.Error(), "the manager's own words about "+verb) {
					t.Errorf("it said %v", err)
				}
				if diff := cmp.Diff(before, h.everything()); diff != "" || h.loaded() != "" {
					t.Errorf("half installed:\n%s", diff)
				}
				_ = os.Remove(fail)
				good := h.install(service.Installed)
				installed := h.everything()
				h.write(fail, "", 0o644)
				if _, err := h.service("--slots", "4").Install(t.Context()); err == nil {
					t.Error("an update that failed did not say so")
				}
				if text, err := os.ReadFile(good.Path()); err != nil || string(text) != good.Text() {
					t.Errorf("the file is no longer that of before (%v):\n%s", err, text)
				}
				if diff := cmp.Diff(installed, h.everything()); diff != "" {
					t.Errorf("not as before the update:\n%s", diff)
				}
			})
		}
	}
}

// An agent takes its time to end; it is not loaded again before it has.
func TestUpdateWaitsForTheOldAgent(t *testing.T) {
	h := newHost(t, "darwin")
	h.install(service.Installed)
	h.write(filepath.Join(h.desk, "slowly"), "", 0o644)
	h.install(service.Updated, "--slots", "4")
}

// A manager that cannot stop the agent must not lose its file: the agent still runs.
func TestUninstallThatFails(t *testing.T) {
	for system, verb := range map[string]string{"linux": "disable", "darwin": "bootout"} {
		h := newHost(t, system)
		s := h.install(service.Installed)
		h.write(filepath.Join(h.desk, "fail-"+verb), "", 0o644)
		if _, err := s.Uninstall(t.Context()); err == nil || !strings.Contains(err.Error(), "own words about "+verb) {
			t.Errorf("%s said %v", system, err)
		}
		if _, err := os.Stat(s.Path()); err != nil || h.loaded() == "" {
			t.Errorf("%s: the file is gone while the agent runs (%v)", system, err)
		}
	}
}

func TestRefused(t *testing.T) {
	h := newHost(t, "darwin")
	h.config.UID = 0
	before := h.everything()
	if _, err := h.service().Install(t.Context()); err == nil || !strings.Contains(err.Error(), "keychain") {
		t.Errorf("root on macOS: %v", err)
	}
	if diff := cmp.Diff(before, h.everything()); diff != "" {
		t.Error(diff)
	}
	for what, change := range map[string]func(*service.Config){
		"another system":      func(c *service.Config) { c.OS = "plan9" },
		"a relative program":  func(c *service.Config) { c.Program = "paddock" },
		"no home":             func(c *service.Config) { c.Home = "" },
		"a line in a path":    func(c *service.Config) { c.Program = "/bin/x\nExecStartPre=/bin/sh" },
		"a line in a value":   func(c *service.Config) { c.Env = []service.Variable{{Name: "A", Value: "b\nc"}} },
		"a zero byte in args": func(c *service.Config) { c.Args = []string{"a\x00b"} },
	} {
		c := newHost(t, "linux").config
		change(&c)
		if _, err := service.New(c); err == nil {
			t.Errorf("%s is taken", what)
		}
	}
}

// A manager that is not there, and one that is asked no longer.
func TestNoManager(t *testing.T) {
	for _, system := range systems {
		h := newHost(t, system)
		before := h.everything()
		t.Setenv("PATH", t.TempDir())
		if _, err := h.service().Install(t.Context()); !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%s: %v", system, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 0)
		defer cancel()
		if _, err := h.service().Install(ctx); err == nil {
			t.Errorf("%s: installed after the end", system)
		}
		if diff := cmp.Diff(before, h.everything()); diff != "" {
			t.Error(diff)
		}
	}
}

// The property list is XML that says what was meant, however odd the paths.
func TestPropertyList(t *testing.T) {
	h := newHost(t, "darwin")
	got, err := parsePlist(h.service().Text())
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(h.home, "Library", "Logs", "Paddock", "node.log")
	if diff := cmp.Diff(map[string]any{
		"Label": "org.paddock.node", "ProgramArguments": []any{awkward, "node", "--name", "mac-1"},
		"EnvironmentVariables": map[string]any{"PADDOCK_CONFIG": awkward + ".yaml"},
		"RunAtLoad":            true, "KeepAlive": true, "AbandonProcessGroup": true,
		"LimitLoadToSessionType": "Aqua", "ProcessType": "Interactive", "ThrottleInterval": "10", "ExitTimeOut": "60",
		"StandardOutPath": log, "StandardErrorPath": log,
	}, got); diff != "" {
		t.Error(diff)
	}
}

// parsePlist reads a property list of dictionaries, arrays, strings, integers and true.
func parsePlist(text string) (any, error) {
	d := xml.NewDecoder(strings.NewReader(text))
	var value func(xml.StartElement) (any, error)
	children := func(each func(name string, v any) error) error {
		for {
			token, err := d.Token()
			if err != nil {
				return err
			}
			switch e := token.(type) {
			case xml.StartElement:
				v, err := value(e)
				if err == nil {
					err = each(e.Name.Local, v)
				}
				if err != nil {
					return err
				}
			case xml.EndElement:
				return nil
			}
		}
	}
	value = func(e xml.StartElement) (any, error) {
		switch e.Name.Local {
		case "plist":
			var found any
			return found, children(func(_ string, v any) error { found = v; return nil })
		case "dict":
			m, key := map[string]any{}, ""
			return m, children(func(name string, v any) error {
				if name == "key" {
					key = v.(string)
				} else if _, twice := m[key]; twice || key == "" {
					return fmt.Errorf("a value without a key, or twice %q", key)
				} else {
					m[key], key = v, ""
				}
				return nil
			})
		case "array":
			list := []any{}
			err := children(func(_ string, v any) error { list = append(list, v); return nil })
			return list, err
		case "true":
			return true, d.Skip()
		case "key", "string", "integer":
			var s string
			err := d.DecodeElement(&s, &e)
			return s, err
		}
		return nil, fmt.Errorf("unknown element %s", e.Name.Local)
	}
	var found any
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "plist" {
			if err := children(func(_ string, v any) error { found = v; return nil }); err != nil {
				return nil, err
			}
		}
	}
}

// The unit says what was meant, however odd the paths; where systemd's own checker is
// installed, it is asked as well.
func TestUnit(t *testing.T) {
	h := newHost(t, "linux")
	want := `# Written by "paddock node install"; "paddock node uninstall" removes it.
[Unit]
Description=Paddock: this machine's agent
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=:"/bin/sh" "-c" "exec \"$0\" \"$@\"" "/opt/My \"Tools\" & <co>/50%%h $HOME/it's \\ 🐎/paddock" "node" "--name" "mac-1"
Environment="PADDOCK_CONFIG=/opt/My \"Tools\" & <co>/50%%h $HOME/it's \\ 🐎/paddock.yaml"
KillMode=process
TimeoutStopSec=60
Restart=always
RestartSec=5
OOMPolicy=continue

[Install]
WantedBy=default.target
`
	if diff := cmp.Diff(want, h.service().Text()); diff != "" {
		t.Error(diff)
	}
	checker, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("systemd's own checker is not installed: the text above is all that holds the unit")
		return
	}
	// It wants the program to be there.
	for _, name := range []string{"paddock", "My Tools & 50%h $HOME/paddock", `it's "\ paddock`} {
		program := filepath.Join(t.TempDir(), name)
		if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
			t.Fatal(err)
		}
		h.write(program, "#!/bin/sh\n", 0o755)
		h.config.Program = program
		unit := filepath.Join(t.TempDir(), "paddock-node.service")
		h.write(unit, h.service().Text(), 0o644)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		cmd := exec.CommandContext(ctx, checker, "verify", "--user", unit)
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+t.TempDir(), "HOME="+h.home)
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil || strings.Contains(string(out), "paddock-node.service") {
			t.Errorf("of %s systemd says (%v):\n%s", name, err, out)
		}
	}
}

// What people have to do after an upgrade depends on the manager, so the notes say it.
func TestNotes(t *testing.T) {
	for system, want := range map[string]string{
		"linux":  "after an upgrade: systemctl --user restart paddock-node.service",
		"darwin": "after an upgrade: launchctl kickstart -k gui/501/org.paddock.node",
	} {
		if notes := newHost(t, system).service().Notes(); !slices.Contains(notes, want) {
			t.Errorf("on %s: %q, want %q among them", system, notes, want)
		}
	}
}
