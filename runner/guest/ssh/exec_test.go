package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/paddock-ci/paddock/runner/guest"
)

// TestExec: commands beside the runner, with both outputs and their end.
func TestExec(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	for _, test := range []struct {
		name     string
		command  guest.Command
		exit     int
		out, err string
	}{
		{"outputs and status", guest.Command{Argv: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}}, 3, "out\n", "err\n"},
		{"input", guest.Command{Argv: []string{"cat"}, Input: []byte("a\x00b\n")}, 0, "a\x00b\n", ""},
		{"input that nobody reads", guest.Command{Argv: []string{"true"}, Input: make([]byte, 2*maxInput)}, 0, "", ""},
		{"directory and environment", guest.Command{Argv: []string{"sh", "-c", "pwd; echo $A"}, Dir: "/usr", Env: map[string]string{"A": "b"}}, 0, "/usr\nb\n", ""},
		{"home", guest.Command{Argv: []string{"pwd"}}, 0, s.home + "\n", ""},
		{"a signal", guest.Command{Argv: []string{"sh", "-c", "kill -9 $$"}}, 137, "", ""},
		{"no directory", guest.Command{Argv: []string{"true"}, Dir: "/none"}, 126, "", "the guest has no directory /none\n"},
	} {
		var out, errs bytes.Buffer
		exit, err := c.Exec(bounded(t), test.command, func(stream guest.Stream, p []byte) {
			if stream == guest.Stderr {
				errs.Write(p)
			} else {
				out.Write(p)
			}
		})
		if err != nil || exit != test.exit || out.String() != test.out || errs.String() != test.err {
			t.Errorf("%s: exit %d, %v, out %q, err %q", test.name, exit, err, out.String(), errs.String())
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := c.Exec(ctx, guest.Command{Argv: []string{"sh", "-c", "echo up; sleep 1000 & sleep 1001"}}, func(guest.Stream, []byte) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a command that was given up: %v", err)
	}
	s.noGuests(t)
	s.kill(t)
	if _, err := c.Exec(bounded(t), guest.Command{Argv: []string{"true"}}, nil); !errors.Is(err, guest.ErrLost) {
		t.Errorf("a command to a server that died: %v", err)
	}
}

// TestOutputOfManyLines: each line is a write of its own, and what is kept is counted in
// bytes: of a short output all, of a long one a MiB or more.
func TestOutputOfManyLines(t *testing.T) {
	for _, lines := range []int{4000, 150_000} {
		s := startSSHD(t)
		c := s.dial(t)
		script := fmt.Sprintf(`i=0; while [ $i -lt %d ]; do echo "a new line"; i=$((i + 1)); done`, lines)
		must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"/bin/sh", "-c", script}}))
		if last := watch(bounded(t), c).end(t); last.ExitCode != 0 {
			t.Errorf("its end: %+v", last)
		}
		kept := 0
		must(t, c.Output(bounded(t), func(p []byte) { kept += len(p) }))
		if want := min(11*lines, 1<<20); kept < want {
			t.Errorf("%d bytes of %d are kept, want %d", kept, 11*lines, want)
		}
	}
}
