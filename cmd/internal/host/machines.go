package host

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/vm/helper"
)

// leastFiles: a pull has a few dozen files and connections open, a VM about ten.
const leastFiles = 1024

func checkFiles(_ context.Context, s *Subject) Finding {
	limit, err := s.Machine.Files()
	switch {
	case err != nil:
		return skip("the limit is not known: %v", err)
	case limit < leastFiles:
		return warn(fmt.Sprintf("raise the hard limit to %d or more (ulimit -Hn)", leastFiles), "a process may have %d files open", limit)
	}
	return found("a process may have enough files open")
}

func checkMemory(_ context.Context, s *Subject) Finding {
	if s.Machine.Memory == 0 {
		return skip("this host's memory is not known")
	}
	host, most := s.Machine.Memory, int64(0)
	for i := range s.Pools {
		most = max(most, int64(s.Pools[i].Memory))
	}
	if most == 0 {
		return skip("this host's configuration names no pool with a memory: %.0f GB are there for %d slots", float64(host)/gigabyte, s.Node.Slots)
	}
	text := fmt.Sprintf("%d slots of at most %.0f GB, on a host with %.0f GB", s.Node.Slots, float64(most)/gigabyte, float64(host)/gigabyte)
	switch {
	case most > host:
		return fail("lower the pool's memory, or keep it off this node (nodes, node_tags)", "a pool's VM does not fit at all: %s", text)
	case int64(s.Node.Slots)*most > host:
		return warn("use fewer slots, or smaller VMs", "full slots do not fit: %s", text)
	}
	return found("%s", text)
}

// process is a line of ps.
type process struct {
	pid, parent int
	args        string
}

// processes lists all on this host.
func processes(ctx context.Context, s *Subject) ([]process, error) {
	out, err := s.Machine.Run(ctx, "ps", "-axww", "-o", "pid=,ppid=,args=")
	if err != nil {
		return nil, fmt.Errorf("ps: %s", said(out, err))
	}
	var all []process
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		if len(words) < 3 {
			continue
		}
		pid, err := strconv.Atoi(words[0])
		if err != nil {
			continue
		}
		parent, err := strconv.Atoi(words[1])
		if err != nil {
			continue
		}
		all = append(all, process{pid, parent, strings.Join(words[2:], " ")})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("ps lists nothing: %.100q", out)
	}
	return all, nil
}

// plays: whatever the program is called, its role is a word of its own.
func (p process) plays(role string) bool { return strings.Contains(p.args+" ", " "+role+" ") }

// framework is the process in which macOS runs each machine.
const framework = "com.apple.Virtualization.VirtualMachine"

// checkMachines looks for VMs that nobody speaks for: they take slots, and on macOS there
// are two.
func checkMachines(ctx context.Context, s *Subject) Finding {
	traces, err := helper.Look(s.Helpers)
	if err != nil {
		return skip("%v", err)
	}
	all, err := processes(ctx, s)
	if err != nil {
		return skip("what runs here is not known: %v", err)
	}
	helpers := map[int]bool{}
	for _, p := range all {
		helpers[p.pid] = helpers[p.pid] || p.plays(s.HelperRole)
	}
	known, running := map[int]bool{}, 0
	var orphans []string
	for _, t := range traces {
		known[t.PID] = true
		switch {
		case helpers[t.PID]:
			running++
		case !t.Ended:
			orphans = append(orphans, string(t.ID))
		}
	}
	if len(orphans) > 0 {
		return warn("start the agent: it clears up after them", "helpers are gone of VM %s", strings.Join(orphans, ", "))
	}
	if strangers := strange(all, helpers, known, s); len(strangers) > 0 {
		return warn("if they are not another node's or another program's: look at them (ps -p PID) and end them; macOS may need a restart to give their slots back",
			"VMs run that this node does not know: %s", strings.Join(strangers, ", "))
	}
	return found("VMs of this node that run: %d; no others are seen", running)
}

// strange are processes of VMs that no helper of this node is the parent of. macOS's own
// have no parent but launchd: of them, as many as helpers are taken to be theirs.
func strange(all []process, helpers, known map[int]bool, s *Subject) []string {
	var found []string
	machines, ours := 0, 0
	for _, p := range all {
		switch {
		case helpers[p.pid] && !known[p.pid]:
			found = append(found, fmt.Sprintf("helper %d", p.pid))
			ours++
		case helpers[p.pid]:
			ours++
		case s.Node.Driver == config.DriverQEMU && isQEMU(p.args) && !helpers[p.parent]:
			found = append(found, fmt.Sprintf("QEMU %d", p.pid))
		case s.Node.Driver == config.DriverVZ && strings.Contains(p.args, framework):
			machines++
		}
	}
	if machines > ours {
		found = append(found, fmt.Sprintf("%d of Virtualization.framework", machines-ours))
	}
	return found
}

func isQEMU(args string) bool {
	program, _, _ := strings.Cut(args, " ")
	return strings.HasPrefix(program[strings.LastIndexByte(program, '/')+1:], "qemu-system-")
}
