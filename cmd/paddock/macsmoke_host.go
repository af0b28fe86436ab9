package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/host"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
)

// vmService is the process in which the framework runs one machine.
const vmService = "com.apple.Virtualization.VirtualMachine"

// nodesOnly are the checks of doctor that concern a node that has joined, and no trial.
var nodesOnly = []string{"directory", "files", "kvm", "credential", "controller", "clock"}

// examine looks at the Mac as doctor does, for a node whose clones would be in dir, and
// says what kind of Mac it is.
func examine(ctx context.Context, m host.Machine, self, dir, helpers string) []host.Finding {
	findings := []host.Finding{aboutMac(ctx, m)}
	for _, f := range host.Examine(ctx, host.Subject{
		Node: config.Node{Driver: config.DriverVZ, Dir: dir, Slots: macGuests}, Program: self,
		Joined:  func() (host.Controller, error) { return host.Controller{}, fs.ErrNotExist },
		Helpers: helpers, HelperRole: parts.HelperRole, Now: time.Now, Machine: m,
	}) {
		if !slices.Contains(nodesOnly, f.Check) {
			findings = append(findings, f)
		}
	}
	return findings
}

// aboutMac is what a reader of the report asks first.
func aboutMac(ctx context.Context, m host.Machine) host.Finding {
	f := host.Finding{Check: "mac", Result: host.OK}
	said := make([]string, 0, 3)
	for _, question := range [][]string{
		{"sysctl", "-n", "hw.model", "machdep.cpu.brand_string"}, {"sw_vers", "-buildVersion"}, {"sysctl", "-n", "kern.hv_support"},
	} {
		answer, err := m.Run(ctx, question[0], question[1:]...)
		if err != nil {
			return host.Finding{Check: f.Check, Result: host.Skip, Text: fmt.Sprintf("%s: %v", strings.Join(question, " "), err)}
		}
		said = append(said, strings.Join(strings.Fields(answer), " "))
	}
	f.Text = fmt.Sprintf("%s, build %s, %s of memory", said[0], said[1], size(m.Memory))
	if said[2] != "1" {
		f.Result, f.Text, f.Fix = host.Fail, f.Text+", no hypervisor", "use a Mac with Apple Silicon that is no virtual machine itself"
	}
	return f
}

// services lists the processes of the framework that run machines, by their pids.
func services(ctx context.Context, m host.Machine) (found []string, err error) {
	said, err := m.Run(ctx, "ps", "-axww", "-o", "pid=,command=")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	for line := range strings.Lines(said) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.Contains(fields[1], vmService) {
			found = append(found, "process "+fields[0]+" "+vmService)
		}
	}
	return found, nil
}

// machinesHere lists what there is of machines: the framework's processes, our helpers'
// folders.
func machinesHere(ctx context.Context, m host.Machine, driver vm.Driver) ([]string, error) {
	all, err := services(ctx, m)
	if err != nil {
		return nil, err
	}
	helpers, ok := driver.(*helper.Driver)
	if !ok {
		return nil, errors.New("these machines have no helpers")
	}
	ids, err := helpers.List()
	for _, id := range ids {
		all = append(all, "the helper's folder of "+string(id))
	}
	return all, err
}
