package main

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/paddock-ci/paddock/tools/foreign"
)

const (
	root = "../.."
	path = "github.com/Code-Hex/vz/v3"
)

// genuine is the real package, loaded once.
var genuine = sync.OnceValues(func() (*foreign.Package, error) {
	return load(context.Background(), foreign.Config{Dir: root, Patterns: []string{path}, OS: "darwin", Arch: "arm64"}, path)
})

// lawful is a small stand-in that is what it stands in for, as far as it goes.
const lawful = `package vz

type VirtualMachineState int

const (
	VirtualMachineStateStopped VirtualMachineState = iota
	VirtualMachineStateRunning
)

func (s VirtualMachineState) String() string { return "" }

type BootLoader interface{ bootLoader() }

type LinuxBootLoader struct{ path string }

func (*LinuxBootLoader) bootLoader() {}

type LinuxBootLoaderOption func(*LinuxBootLoader) error

func NewLinuxBootLoader(kernel string, options ...LinuxBootLoaderOption) (*LinuxBootLoader, error) {
	return &LinuxBootLoader{path: kernel}, nil
}

type USBDevice interface {
	UUID() string
	usbDevice()
}

type VirtualMachineConfiguration struct{ loader BootLoader }

func NewVirtualMachineConfiguration(loader BootLoader, cores uint, bytes uint64) (*VirtualMachineConfiguration, error) {
	return &VirtualMachineConfiguration{loader: loader}, nil
}

func (c *VirtualMachineConfiguration) Validate() (bool, error) { return true, nil }

type NSError struct {
	Domain string
	Code   int
}

func (e *NSError) Error() string { return e.Domain }

type MACAddress struct{ a [6]byte }

func (m *MACAddress) String() string { return string(m.a[:]) }

func MacOSGuestAutomountTag() (string, error) { return "", nil }
`

// hooks are what the stand-in has besides.
const hooks = `package vz

// FailNext makes the next call fail.
func FailNext(err error) {}

// Hang is a method by which tests play with a real type.
func (c *VirtualMachineConfiguration) Hang() {}
`

// standin writes a stand-in's module and compares it.
func standin(t *testing.T, files map[string]string) (diff, error) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module "+path+"\n\ngo 1.26.0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	real, err := genuine()
	if err != nil {
		t.Fatal(err)
	}
	return against(t.Context(), real, dir)
}

// The test of the check: each drift is planted alone into a stand-in that passes without
// it.
func TestPlantedDriftsAreFound(t *testing.T) {
	t.Parallel()
	d, err := standin(t, map[string]string{"vz.go": lawful, "standin_hooks.go": hooks})
	if err != nil || d.names != 13 || d.members != 8 {
		t.Fatalf("the lawful stand-in: %v\n%+v", err, d)
	}
	for _, p := range []struct{ name, old, instead, want string }{
		{"a name of its own", "func MacOSGuestAutomountTag()", "func MacOSGuestTag()", "there is no MacOSGuestTag in the real package"},
		{"another result", "MacOSGuestAutomountTag() (string, error) { return \"\", nil }", "MacOSGuestAutomountTag() string { return \"\" }", "MacOSGuestAutomountTag is func() string, in the real package func() (string, error)"},
		{"another parameter", "cores uint", "cores int", "func(github.com/Code-Hex/vz/v3.BootLoader, int, uint64)"},
		{"another option's parameter", "func(*LinuxBootLoader) error", "func(LinuxBootLoader) error", "LinuxBootLoaderOption is func(github.com/Code-Hex/vz/v3.LinuxBootLoader) error, in the real package func(*"},
		{"not variadic", "options ...Linux", "options []Linux", "NewLinuxBootLoader is func(string, []"},
		{"another value", "= iota", "= iota + 1", "VirtualMachineStateRunning is 2, in the real package 1"},
		{"a constant of another type", "VirtualMachineStateStopped VirtualMachineState = iota", "VirtualMachineStateStopped int = iota", "VirtualMachineStateStopped is int, in the real package github.com/Code-Hex"},
		{"another basic type", "type VirtualMachineState int", "type VirtualMachineState uint8", "VirtualMachineState is uint8, in the real package int"},
		{"a method of its own", "(m *MACAddress) String", "(m *MACAddress) Address", "(*MACAddress).Address is not in the real package"},
		{"a method of another signature", "Validate() (bool, error) { return true, nil }", "Validate() error { return nil }", "(*VirtualMachineConfiguration).Validate is func() error, in the real package func() (bool, error)"},
		{"a method of the value too", "(e *NSError) Error", "(e NSError) Error", "(NSError).Error is not in the real package"},
		{"a field of its own", "Code   int", "Number int", "there is no field NSError.Number"},
		{"a field of another type", "Code   int", "Code   int64", "NSError.Code is int64, in the real package int"},
		{"an interface that is open", "interface{ bootLoader() }", "interface{}", "BootLoader has a method that is not exported in one of the two"},
		{"an interface that asks for more", "UUID() string", "UUID() string; Name() string", "USBDevice has the method Name() string"},
		{"another kind", "func MacOSGuestAutomountTag() (string, error) { return \"\", nil }", "var MacOSGuestAutomountTag func() (string, error)", "is a variable, in the real package a function"},
		{"a type by another name", "type VirtualMachineState int\n", "type VirtualMachineState = state\ntype state int\n", "VirtualMachineState is a type by another name"},
		{"nothing", lawful, "package vz\n", "nothing was compared"},
		{"no Go", "type BootLoader", "type type", "expected"},
	} {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			text := strings.Replace(lawful, p.old, p.instead, 1)
			if text == lawful {
				t.Fatalf("there is no %q to replace", p.old)
			}
			d, err := standin(t, map[string]string{"vz.go": text})
			if err == nil {
				t.Fatalf("it passes: %+v", d)
			}
			if said := append(d.drifts, err.Error()); !slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, p.want) }) {
				t.Errorf("it says %q, want %q", said, p.want)
			}
		})
	}
}

// Hooks are what their file's name says, and nothing else.
func TestOnlyHooksAreExempt(t *testing.T) {
	t.Parallel()
	d, err := standin(t, map[string]string{"vz.go": lawful, "hooks.go": hooks})
	if err == nil || len(d.drifts) != 2 {
		t.Errorf("hooks in a file of another name: %v, %q", err, d.drifts)
	}
}
