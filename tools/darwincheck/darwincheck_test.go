package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/tools/foreign"
)

// root is the product's module.
const root = "../.."

// lawful is a small driver in which everything is as it should be.
const lawful = `//go:build darwin && arm64

package planted

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Code-Hex/vz/v3"
)

type verbs interface {
	Start(...vz.VirtualMachineStartOption) error
	Stop() error
	CanPause() bool
}

var _ verbs = (*vz.VirtualMachine)(nil)

type machine struct {
	mu    sync.Mutex
	calls int64
	vm    *vz.VirtualMachine
}

func boot(kernel string, cpu uint) (*machine, error) {
	loader, err := vz.NewLinuxBootLoader(kernel, vz.WithCommandLine("console=hvc0"))
	if err != nil {
		return nil, fmt.Errorf("making the boot loader for %s: %w", kernel, err)
	}
	config, err := vz.NewVirtualMachineConfiguration(loader, cpu, 1<<30)
	if err != nil {
		return nil, err
	}
	vm, err := vz.NewVirtualMachine(config)
	if err != nil {
		return nil, err
	}
	return &machine{vm: vm}, nil
}

func (m *machine) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	atomic.AddInt64(&m.calls, 1)
	if m.vm == nil {
		return errors.New("there is no machine")
	}
	if err := m.vm.Start(); err != nil {
		return fmt.Errorf("starting in state %v: %w", m.vm.State(), err)
	}
	var failed *vz.NSError
	for m.vm.State() != vz.VirtualMachineStateRunning && ctx.Err() == nil {
		if errors.As(ctx.Err(), &failed) {
			return failed
		}
	}
	return ctx.Err()
}

var _, _ = boot, (*machine).start
`

// plant checks packages of the product's module which are not really there, one for each
// text, by their names.
func plant(t *testing.T, texts map[string]string) result {
	t.Helper()
	dir, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	overlay := map[string]string{}
	for name, text := range texts {
		overlay[filepath.Join(dir, "vm", "planted", name, "planted.go")] = text
		overlay[filepath.Join(dir, "vm", "planted", name, "doc.go")] = "package planted\n" // is in every build
	}
	r, err := check(t.Context(), foreign.Config{Dir: root, Patterns: []string{"./vm/planted/..."}, Overlay: overlay})
	if err != nil {
		t.Fatal(err)
	}
	// The driver's own files are left out with all other packages: they are not excluded.
	r.findings = without(r.findings, filepath.Join(dir, "vm", "vz"))
	return r
}

func without(findings []string, prefix string) (rest []string) {
	for _, f := range findings {
		if !strings.HasPrefix(f, prefix) {
			rest = append(rest, f)
		}
	}
	return rest
}

// planted is one mistake: a replacement in the lawful driver, and what must be found.
type planted struct{ name, old, instead, want string }

func (p planted) text(t *testing.T) string {
	t.Helper()
	text := strings.Replace(lawful, p.old, p.instead, 1)
	if text == lawful {
		t.Fatalf("%s: there is no %q to replace", p.name, p.old)
	}
	return text
}

// The test of the check: each mistake is planted alone into a driver that passes without
// it, and must be found there.
func TestPlantedMistakesAreFound(t *testing.T) {
	t.Parallel()
	if r := plant(t, map[string]string{"lawful": lawful}); len(r.findings) != 0 || r.drivers != 1 || r.own != 1 {
		t.Fatalf("the lawful driver: %+v", r)
	}
	for _, together := range [][]planted{{ // what does not compile
		{"wrong argument type", "boot(kernel string, cpu uint)", "boot(kernel string, cpu int)", "cannot use cpu (variable of type int) as uint value"},
		{"misspelt constant", "VirtualMachineStateRunning", "VirtualMachineStateRuning", "undefined: vz.VirtualMachineStateRuning"},
		{"misspelt function", "vz.WithCommandLine(", "vz.WithCommandline(", "undefined: vz.WithCommandline"},
		{"result count", "vm, err := vz.NewVirtualMachine(config)", "vm := vz.NewVirtualMachine(config); err = nil", "assignment mismatch: 1 variable but vz.NewVirtualMachine returns 2 values"},
		{"argument count", "cpu, 1<<30)", "cpu)", "not enough arguments in call to vz.NewVirtualMachineConfiguration"},
		{"missing method", "m.vm.Start()", "m.vm.Begin()", "m.vm.Begin undefined"},
		{"method of another signature", "\tStop() error", "\tStop(context.Context) error", "wrong type for method Stop"},
		{"unused import", "\"context\"\n", "\"context\"\n\t\"os\"\n", `"os" imported and not used`},
	}, { // what compiles
		{"a lock that is copied", "func (m *machine) start", "func (m machine) start", "copylocks: start passes lock by value"},
		{"a cancel that is lost", "ctx, cancel := context.WithTimeout(ctx, time.Minute)\n\tdefer cancel()", "ctx, _ = context.WithTimeout(ctx, time.Minute)", "lostcancel: "},
		{"a format of another type", "boot loader for %s", "boot loader for %d", "printf: "},
		{"a nil that is read", "return errors.New(\"there is no machine\")", "var other *machine; other.calls++; return nil", "nilness: nil dereference"},
		{"a result that is dropped", "return errors.New(\"there is no machine\")", "errors.New(\"there is no machine\")", "unusedresult: "},
		{"an atomic that is not", "atomic.AddInt64(&m.calls, 1)", "m.calls = atomic.AddInt64(&m.calls, 1)", "atomic: "},
		{"an errors.As without a pointer", "errors.As(ctx.Err(), &failed)", "errors.As(ctx.Err(), failed)", "errorsas: "},
		{"a function compared with nil", "m.vm == nil", "boot == nil", "nilfunc: "},
	}} {
		texts := map[string]string{"lawful": lawful}
		for i, p := range together {
			texts[fmt.Sprintf("p%02d", i)] = p.text(t)
		}
		r := plant(t, texts)
		for i, p := range together {
			at := fmt.Sprintf("/p%02d/planted.go:", i)
			if !slices.ContainsFunc(r.findings, func(f string) bool { return strings.Contains(f, at) && strings.Contains(f, p.want) }) {
				t.Errorf("%s: found %q, want one at %s with %q", p.name, r.findings, at, p.want)
			}
		}
		if i := slices.IndexFunc(r.findings, func(f string) bool { return strings.Contains(f, "/lawful/") }); i >= 0 {
			t.Errorf("in the lawful driver: %s", r.findings[i])
		}
	}
}

// Here the driver is not in what is checked, or is no Go.
func TestPlantedAbsencesAreFound(t *testing.T) {
	t.Parallel()
	for _, p := range []planted{
		{"tag that excludes all", "darwin && arm64", "darwin && !arm64", "exclude it from darwin/arm64"},
		{"tag that leaves nothing to check", "darwin && arm64", "darwin && amd64", "nothing of the driver was checked"},
		{"driver without the framework", lawful, "package planted\n", "nothing of the driver was checked"},
		{"no Go", "func boot(", "func (boot(", "expected"},
	} {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			r := plant(t, map[string]string{"p": p.text(t)})
			if !slices.ContainsFunc(r.findings, func(f string) bool { return strings.Contains(f, p.want) }) {
				t.Errorf("found %q, want one with %q", r.findings, p.want)
			}
		})
	}
}
