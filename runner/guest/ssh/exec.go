package ssh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Exec runs a command in the runner's directory and returns its exit status, 128 + n if
// signal n ended it. Its output is passed on as it comes, never two pieces at once; a
// command that prints faster than output takes it waits. When ctx ends it is killed with
// its process group, where the server carries signals (OpenSSH since 7.9 does); when the
// connection is lost it is not: its output and input end. A nil output is allowed.
func (c *Client) Exec(ctx context.Context, cmd guest.Command, output func(stream guest.Stream, p []byte)) (exit int, err error) {
	text, err := programScript(scriptExec, cmd.Argv, cmd.Env, c.in(cmd.Dir))
	if err == nil && len(cmd.Input) > 2*maxInput {
		err = fmt.Errorf("an input of %d bytes, at most %d", len(cmd.Input), 2*maxInput)
	}
	if err == nil {
		exit, err = c.exec(ctx, text, cmd.Input, output)
	}
	if err != nil {
		return 0, fmt.Errorf("running a command in the guest: %w", err)
	}
	return exit, nil
}

func (c *Client) exec(ctx context.Context, text string, input []byte, output func(guest.Stream, []byte)) (exit int, err error) {
	out := &taker{output: output}
	defer out.end()
	err = c.run(ctx, job{
		script: text, input: bytes.NewReader(input), complain: out.stream(guest.Stderr), kill: true,
		answer: func(r *reader) error {
			if _, err := io.Copy(out.stream(guest.Stdout), r.Reader); err != nil {
				return err
			}
			err := r.ended()
			if ctx.Err() != nil {
				return ctx.Err() // it was killed by us
			}
			var ended *xssh.ExitError
			if errors.As(err, &ended) {
				exit, err = ended.ExitStatus(), nil
			}
			return err
		},
	})
	return exit, err
}

// taker passes both outputs on, one piece at a time.
type taker struct {
	mu     sync.Mutex
	output func(guest.Stream, []byte)
}

func (t *taker) stream(s guest.Stream) io.Writer { return stream{t, s} }

// end waits for a piece that is being passed on, and drops what comes later.
func (t *taker) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.output = nil
}

type stream struct {
	*taker
	which guest.Stream
}

func (s stream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.output != nil {
		s.output(s.which, p)
	}
	return len(p), nil
}
