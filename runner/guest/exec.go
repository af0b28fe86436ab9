package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// maxLeft bounds what is still read of a command's output after its end, per stream: the
// kernel keeps 64 KiB in a pipe, or 1 MiB where it was asked to, and what comes beyond
// is from a daemon that it left behind.
const maxLeft = 1 << 20

// exec runs a command and streams its output.
func (s *session) exec(ctx context.Context, r *request, f frame) error {
	var b execBody
	err := f.decode(&b)
	clear(f.body) // the input may be a secret
	if err != nil {
		return err
	}
	if len(b.Argv) == 0 {
		return errors.New("a command needs a program")
	}
	if b.Dir == "" {
		b.Dir = s.agent.config.Dir
	}
	code, err := runCommand(ctx, Command(b), func(k kind, p []byte) bool { return s.chunk(ctx, r, k, p) })
	if err != nil {
		return fmt.Errorf("running the command: %w", err)
	}
	s.send(kindExit, r.id, exitBody{Code: code})
	return nil
}

// runCommand runs c until it has ended and its output is passed on; when ctx ends, or
// pass says that nobody listens, it is killed with its process group.
func runCommand(ctx context.Context, c Command, pass func(kind, []byte) bool) (code int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &process{cmd: newCommand(ctx, c.Argv, c.Env, c.Dir, c.Input)}
	stdout, outEnd, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer func() { _ = stdout.Close() }()
	stderr, errEnd, err := os.Pipe()
	if err != nil {
		_ = outEnd.Close()
		return 0, err
	}
	defer func() { _ = stderr.Close() }()
	p.cmd.Stdout, p.cmd.Stderr = outEnd, errEnd
	err = p.cmd.Start()
	_, _ = outEnd.Close(), errEnd.Close()
	if err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, p.kill)
	read := make(chan struct{}, 2)
	for k, pipe := range map[kind]*os.File{kindStdout: stdout, kindStderr: stderr} {
		go func() {
			if !passOn(pipe, func(b []byte) bool { return pass(k, b) }) {
				cancel()
			}
			read <- struct{}{}
		}()
	}
	code = p.wait()
	stop()
	for _, pipe := range []*os.File{stdout, stderr} {
		_ = pipe.SetReadDeadline(time.Unix(1, 0)) // tells the reader that it has ended
	}
	<-read
	<-read
	return code, nil
}

// passOn reads a command's output. As long as nobody takes it the pipe is full and the
// command waits. A read deadline in the past says that the command has ended: then it
// reads what is left, until nothing comes for pipeGrace. False: nobody listens.
func passOn(pipe *os.File, pass func([]byte) bool) bool {
	buf := make([]byte, maxChunk)
	for left, ended := maxLeft, false; left > 0; {
		n, err := pipe.Read(buf)
		if n > 0 && !pass(buf[:n]) {
			return false
		}
		switch {
		case ended:
			left -= n
		case errors.Is(err, os.ErrDeadlineExceeded):
			ended, err = true, nil
		}
		if err != nil {
			return true
		}
		if ended {
			_ = pipe.SetReadDeadline(time.Now().Add(pipeGrace))
		}
	}
	return true
}
