// Package smoke tries a driver on the host at hand, step by step, with one image: boot,
// answer, command, clock, address, as many machines as fit and one more, save, resume,
// destroy, and what is left over. Each step ends as ok, failed or skipped, with its
// seconds and what to do about it; a step whose ground has failed is skipped and says so.
//
// It is not the contract as a test (vm/vmtest is), and it measures nothing more than
// once: it is for the first hour of a driver on a new kind of host, where nobody has seen
// it run. It knows no driver and no command line.
//
// Called by cmd/paddock's macsmoke.
package smoke

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// Config says what is tried.
type Config struct {
	// Driver boots the machines; as in production, each in a helper of its own. Needed.
	Driver vm.Driver
	// Image is a directory with disk.img, config.json and, for macOS, nvram.bin. It is
	// cloned and not changed. Needed.
	Image string
	// Dir is where clones and the saved state are put: on the volume of Image, so that
	// cloning shares blocks. It is made, must not exist, and is removed at the end. Needed.
	Dir string
	// Clone makes dst a copy of the file src. Needed.
	Clone func(ctx context.Context, src, dst string) error
	// Open reaches the guest of a machine; it waits until somebody answers. Needed.
	Open func(ctx context.Context, m vm.Machine) (Guest, error)
	// Agent: the guest has Paddock's agent, see vm.Spec.
	Agent  bool
	CPU    int   // cores per machine; 0: what the image says
	Memory int64 // bytes per machine; 0: what the image says
	// Slots is how many of these machines the host runs at once; one more must be refused.
	// 0: there is no limit of its own, and nothing is tried.
	Slots int
	// Left lists what there is of machines on this host, in words: processes, folders.
	// What is there at the end and was not at the beginning is left over. Nil: nobody looks.
	Left func(ctx context.Context) ([]string, error)
	// Patience is how long a machine may take from its boot to its guest's answer; 0: 5
	// minutes, since a macOS guest's first boot on a slow disk takes two.
	Patience time.Duration
	// Told is called with each result as it comes, from Run's goroutine. Nil: nobody is.
	Told func(Result)
}

// Guest is a way into a guest: *guest.Client and *ssh.Client are.
type Guest interface {
	Hello(ctx context.Context) (guest.Hello, error)
	Exec(ctx context.Context, c guest.Command, output func(guest.Stream, []byte)) (exit int, err error)
	Close() error
}

// Outcome is how a step ended.
type Outcome string

// The outcomes.
const (
	OK      Outcome = "ok"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped"
)

// Result is one step's.
type Result struct {
	Step    string  `json:"step"`
	Outcome Outcome `json:"outcome"`
	Seconds float64 `json:"seconds"`          // wall clock
	Detail  string  `json:"detail"`           // what was seen, what failed, or why it was skipped
	Advice  string  `json:"advice,omitempty"` // of a step that failed: what to do
}

// step is one thing that is tried.
type step struct {
	name   string
	needs  []string // steps that must have ended well before
	limit  time.Duration
	advice string
	try    func(context.Context, *trial) (detail string, err error)
}

// skip is the error of a step that cannot be tried here.
type skip struct{ reason string }

func (s skip) Error() string { return s.reason }

// Bounds on steps that do not wait for a guest's boot.
const (
	quick  = 30 * time.Second // a call that takes a second where all is well
	copies = 5 * time.Minute  // files of many gigabytes, where the file system shares no blocks
)

// Run tries all steps and returns their results, in order. Whatever happens, no machine
// and no file of it is left afterwards, or the last result says what is. An error means
// that nothing was tried.
func Run(ctx context.Context, c Config) (results []Result, err error) {
	if c.Driver == nil || c.Image == "" || c.Dir == "" || c.Clone == nil || c.Open == nil {
		return nil, errors.New("smoke: needs a driver, an image, a directory, and ways to clone files and to reach guests")
	}
	if c.Patience == 0 {
		c.Patience = 5 * time.Minute
	}
	if err := vm.CheckDisk(c.Image); err != nil {
		return nil, fmt.Errorf("the image %s: %w", c.Image, err)
	}
	if err := os.Mkdir(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("making a directory for the machines: %w", err)
	}
	t := &trial{Config: c, machines: map[string]vm.Machine{}}
	tell := func(r Result) {
		results = append(results, r)
		if c.Told != nil {
			c.Told(r)
		}
	}
	defer func() { // also when ctx has ended, since machines have not
		if err := t.clear(context.WithoutCancel(ctx)); err != nil {
			tell(Result{Step: "clean up", Outcome: Failed, Detail: err.Error(), Advice: "stop the processes and remove " + c.Dir + " by hand"})
		}
	}()
	if t.before, err = t.left(ctx); err != nil {
		return nil, fmt.Errorf("looking for machines that run already: %w", err)
	}
	ended := map[string]Outcome{}
	for _, s := range steps {
		r := t.run(ctx, s, ended)
		ended[s.name] = r.Outcome
		tell(r)
	}
	return results, nil
}

// NotBegun is the result of a trial of which nothing could be tried.
func NotBegun(err error) Result {
	return Result{Step: "begin", Outcome: Failed, Detail: oneLine(err), Advice: "nothing was tried: mend this, or what the host's checks above say, and try again"}
}

// run tries one step.
func (t *trial) run(ctx context.Context, s step, ended map[string]Outcome) Result {
	r := Result{Step: s.name, Outcome: Skipped}
	if ctx.Err() != nil {
		r.Detail = "interrupted"
		return r
	}
	if i := slices.IndexFunc(s.needs, func(need string) bool { return ended[need] != OK }); i >= 0 {
		r.Detail = fmt.Sprintf("needs %q, which was %s", s.needs[i], ended[s.needs[i]])
		return r
	}
	limit := s.limit
	if limit == 0 {
		limit = t.Patience
	}
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	detail, err := s.try(within, t)
	r.Seconds = time.Since(start).Round(time.Millisecond).Seconds()
	why := skip{}
	switch {
	case err == nil:
		r.Outcome, r.Detail = OK, plainLine(detail)
	case ctx.Err() != nil:
		r.Detail = "interrupted"
	case errors.As(err, &why):
		r.Detail = why.reason
	case errors.Is(err, vm.ErrUnsupported), errors.Is(err, guest.ErrUnsupported):
		r.Detail = oneLine(err)
	default:
		r.Outcome, r.Detail, r.Advice = Failed, oneLine(err), advise(err, s.advice)
		if within.Err() != nil {
			r.Detail = fmt.Sprintf("not within %s: %s", limit, r.Detail)
		}
	}
	return r
}

// advise knows better than the step what to do about some errors.
func advise(err error, otherwise string) string {
	var boot *vm.BootError
	switch {
	case errors.Is(err, vm.ErrAtCapacity):
		return "stop other machines on this host (of any program); if there are none, a slot is leaked: reboot the host"
	case errors.As(err, &boot) && boot.Console != "":
		return "the guest began to boot: read its console above; an image of a newer system than the host's does not boot"
	}
	return otherwise
}

// oneLine makes a row of an error.
func oneLine(err error) string { return plainLine(err.Error()) }

// plainLine makes of a text, parts of which a guest may have written, a short line that
// does nothing to a terminal.
func plainLine(text string) string {
	const most = 600 // bytes
	return guest.Plain(strings.ReplaceAll(strings.TrimSpace(text), "\n", "; "), most)
}
