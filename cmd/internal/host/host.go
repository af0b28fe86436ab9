// Package host examines the machine that a node runs on, or is to run on: whether VMs can
// start, stay and be reached there, and what to do where they cannot.
//
//  1. A check is one small function, which looks at one thing and finds it ok, finds it
//     worth a warning, or finds that it fails.
//  2. What a check cannot know, on this system or with these rights, is "skip" with the
//     reason, and never "ok".
//  3. Every warning and failure says what to do.
//
// It changes nothing but for a file of its own in the node's directory, to try the file
// system, and it does not ask the agent. "paddock node doctor" calls it.
package host

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/config"
)

// Result of a check.
type Result string

// The results.
const (
	OK   Result = "ok"
	Warn Result = "warn" // it works, but not well, or not for long
	Fail Result = "fail" // VMs do not start, or do not stay
	Skip Result = "skip" // it cannot be known here
)

// Finding is what one check found.
type Finding struct {
	Check  string `json:"check"`
	Result Result `json:"result"`
	Text   string `json:"text"`          // what there is; of Skip: why it is not known
	Fix    string `json:"fix,omitempty"` // what to do
}

// Subject is the node that is examined.
type Subject struct {
	Node config.Node
	// Pools that this host's configuration knows; none on a host that is only a node.
	Pools   []config.Pool
	Program string // this program's path
	// Joined reads what the node joined with from the file Credential; fs.ErrNotExist if
	// there is none.
	Joined     func() (Controller, error)
	Credential string
	// Helpers is the directory of VMs' helpers, and HelperRole the word by which their
	// processes are known.
	Helpers, HelperRole string
	Now                 func() time.Time
	Machine             Machine
}

// Controller is the node's, and the credential for it.
type Controller struct {
	URL         string
	Certificate string // hex SHA-256 of the pinned one; "": what the system trusts
	Token       string // secret
}

// Machine is what checks ask of the machine; This is the one at hand.
type Machine struct {
	OS, Arch string
	UID      int
	User     string // its name
	Home     string
	Memory   int64 // bytes; 0: not known. This leaves it to the caller
	// Run runs one of the system's programs and returns all that it said, also when it
	// failed.
	Run      func(ctx context.Context, program string, args ...string) (string, error)
	ReadFile func(path string) ([]byte, error)
	// Free is how many bytes are left in a directory's file system.
	Free func(dir string) (int64, error)
	// CanShare tries whether clones in a directory share their blocks.
	CanShare func(dir string) (bool, error)
	// Files is how many files a process may have open at most.
	Files func() (uint64, error)
	// KVM fails if the kernel's machines cannot even be asked for.
	KVM func() error
}

// This is the machine that this process runs on.
func This() Machine {
	m := Machine{OS: runtime.GOOS, Arch: runtime.GOARCH, UID: os.Getuid(),
		Run: run, ReadFile: os.ReadFile, Free: free, CanShare: cache.CanShare, Files: files, KVM: askKVM}
	if who, err := user.Current(); err == nil {
		m.User, m.Home = who.Username, who.HomeDir
	}
	return m
}

// patience is how long one check may take: a program that asks a question at the display
// is not waited for.
const patience = 20 * time.Second

// check is one thing to look at.
type check struct {
	name string
	look func(context.Context, *Subject) Finding
}

// checks in the order in which they are shown: can it run VMs, can it keep them, can they
// be reached, does it know its controller.
var checks = []check{
	{"driver", checkDriver}, {"entitlement", checkEntitlement}, {"user", checkUser},
	{"keychain", checkKeychain}, {"display", checkDisplay}, {"kvm", checkKVM},
	{"directory", checkDirectory}, {"clones", checkClones}, {"disk", checkDisk}, {"memory", checkMemory},
	{"files", checkFiles}, {"sockets", checkSockets}, {"machines", checkMachines},
	{"lease-time", checkLeaseTime}, {"leases", checkLeases}, {"local-network", checkLocalNetwork},
	{"credential", checkCredential}, {"controller", checkController}, {"clock", checkClock},
}

// Examine makes all checks.
func Examine(ctx context.Context, s Subject) []Finding {
	findings := make([]Finding, 0, len(checks))
	for _, c := range checks {
		findings = append(findings, c.make(ctx, &s))
	}
	return findings
}

func (c check) make(ctx context.Context, s *Subject) Finding {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f := c.look(ctx, s)
	f.Check = c.name
	return f
}

func found(format string, args ...any) Finding {
	return Finding{Result: OK, Text: fmt.Sprintf(format, args...)}
}

func warn(fix, format string, args ...any) Finding {
	return Finding{Result: Warn, Fix: fix, Text: fmt.Sprintf(format, args...)}
}

func fail(fix, format string, args ...any) Finding {
	return Finding{Result: Fail, Fix: fix, Text: fmt.Sprintf(format, args...)}
}

func skip(format string, args ...any) Finding {
	return Finding{Result: Skip, Text: fmt.Sprintf(format, args...)}
}

// run bounds what a program may say to 1 MiB.
func run(ctx context.Context, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return strings.ToValidUTF8(string(out[:min(len(out), 1<<20)]), "?"), err
}

func free(dir string) (int64, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return 0, err
	}
	return int64(stat.Bavail) * int64(stat.Bsize), nil
}

// files is the hard limit: the runtime raises the soft one to it.
func files() (uint64, error) {
	var limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	return limit.Max, err
}

// said is a program's own words in an error's stead, on one line.
func said(out string, err error) string {
	if out = strings.Join(strings.Fields(out), " "); out != "" {
		return out[:min(len(out), 300)]
	}
	return err.Error()
}
