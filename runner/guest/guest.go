// Package guest is the small agent inside a machine, and the client that talks to it:
//
//  1. The host dials the machine; the agent answers hello with its version and status.
//  2. The host starts the runner, once: starting the same name again changes nothing,
//     so a host that lost the answer asks again.
//  3. The host watches: the status comes at once and with each change, until the runner
//     has exited.
//
// The state is the agent's, not the connection's: a host that crashed dials again and
// watches on. One connection carries many requests, told apart by id; messages are
// length-bounded and each side distrusts the other's bytes. Beside the runner the host
// may Exec commands, Put files, follow the runner's Output, bring the network up, wake a
// guest that was saved, shut it down, and Connect to its ports. What is streamed has a
// window of its own: a reader that is slow holds up the command, not the connection.
//
// A machine has one stream to its host. Line (the host's end) and ServeLine (the guest's)
// carry all connections over it, and are in step again after it was cut anywhere. A raw
// stream begins anew with a mark (preamble.go), then speaks yamux, with a guard before the
// host's end, since that library trusts its peer.
//
// It is the one package of its floor that does I/O, since it is what runs inside; it
// opens nothing by itself but what the host asks for. It does not boot machines (vm),
// mint JIT configs (github) or decide when a runner starts and ends (node), nor does it
// know how an operating system is changed (System, which cmd/paddock-guest brings). The
// other ways into a guest, ssh and self, live beside the agent, not in it.
//
// Called by node (the client), by vm's drivers (Line), by cmd/paddock-guest and by the
// hidden guest-agent command (the agent).
package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// State is where the one runner of a guest is.
type State string

// The states, in order; a guest never goes back, except from Running to Idle when the
// program could not be started.
const (
	Idle    State = "idle"    // no runner was started
	Running State = "running" // its process runs and has no job yet
	Busy    State = "busy"    // it said that it runs a job
	Exited  State = "exited"  // its process has ended
)

// Errors that a caller decides on.
var (
	// ErrOccupied: the guest has another runner, or had one. It takes no second.
	ErrOccupied = errors.New("the guest already has another runner")
	// ErrUnsupported: the agent is older than the request.
	ErrUnsupported = errors.New("the guest agent does not know this request")
	// ErrLost: the connection ended before the answer; the runner is not affected.
	ErrLost = errors.New("connection to the guest agent lost")
)

// Hello is the agent's first word.
type Hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"` // of the agent, for people
	Status   Status `json:"status"`
}

// Status is what the agent knows of the runner. Times are UTC by the guest's clock,
// which may be wrong; zero means not yet.
type Status struct {
	State    State     `json:"state"`
	Name     string    `json:"name,omitempty"` // Run.Name, "" while idle
	Job      string    `json:"job,omitempty"`  // the job's display name, as the runner printed it
	ExitCode int       `json:"exit_code,omitempty"`
	Tail     string    `json:"tail,omitempty"` // last 4 KiB of output, sent with Exited only
	BusyAt   time.Time `json:"busy_at,omitzero"`
	ExitedAt time.Time `json:"exited_at,omitzero"`
}

// Run is one runner process.
type Run struct {
	Name string   // the runner's name at GitHub; makes Start idempotent
	Argv []string // the program is looked up in the guest's PATH
	// Env is added to the guest agent's own environment. It is no place for secrets:
	// every step of the job can read it.
	Env map[string]string
	Dir string // working directory; "": AgentConfig.Dir
	// Input goes to the process's standard input, followed by end of file. It is the
	// JIT config, a secret: it is in no argument, environment, file or log. (GitHub's own
	// runner reads files instead: see JITFiles.)
	Input []byte `json:"-"`
}

// String hides the input.
func (r Run) String() string {
	return fmt.Sprintf("runner %s: %q in %q, %d bytes of input", r.Name, r.Argv, r.Dir, len(r.Input))
}

// GoString hides the input from %#v, too.
func (r Run) GoString() string { return r.String() }

// LogValue hides the input and the environment.
func (r Run) LogValue() slog.Value {
	return slog.GroupValue(slog.String("runner", r.Name), slog.Any("argv", r.Argv), slog.Int("input_bytes", len(r.Input)))
}
