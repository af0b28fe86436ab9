package ssh

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Bounds in bytes of what a guest may say.
const (
	maxPreface   = 64 << 10 // before a script's first word: what a login shell's files print
	maxComplaint = 1 << 10  // of its error output
)

// job is one script and the conversation with it.
type job struct {
	script string    // for the guest's /bin/sh; no secret may be in it
	input  io.Reader // what follows the script on its standard input; nil: nothing
	hold   bool      // keep the standard input open until the answer is there
	answer func(*reader) error

	complain io.Writer // takes all of its error output; nil: its beginning is for an error
	kill     bool      // kill what runs when the caller's context ends
}

// run has the guest's /bin/sh run a script. The command line is always the same but for
// a length: the script and the input come by the standard input, so nobody in the guest
// reads them in a list of processes, and the account's login shell, whichever it is, has
// nothing to quote. dd reads byte by byte, so that what follows the script is left.
func (c *Client) run(ctx context.Context, j job) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	mark := "paddock-" + rand.Text()
	text := "echo " + mark + "\n" + j.script
	s := &session{mark: mark, kill: j.kill}
	return c.within(ctx, s.abandon, func() error {
		if err := s.open(c.conn); err != nil {
			return fmt.Errorf("%w: %w", guest.ErrLost, err)
		}
		defer s.close()
		if err := s.start(fmt.Sprintf(`exec /bin/sh -c 'eval "$(dd bs=1 count=%d 2>/dev/null)"'`, len(text))); err != nil {
			return fmt.Errorf("%w: %w", guest.ErrLost, err)
		}
		return c.converse(s, text, j)
	})
}

// within calls f. When ctx ends it calls stop, and cuts the connection if f has not
// returned soon after: a guest that does not answer must not hold its caller.
func (c *Client) within(ctx context.Context, stop func(), f func() error) error {
	done, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-done:
			return
		case <-ctx.Done():
		}
		cut := time.AfterFunc(closeLimit, func() { _ = c.raw.Close() })
		defer cut.Stop()
		stop()
		<-done
	}()
	err := f()
	close(done)
	<-watched
	if err != nil && ctx.Err() != nil {
		return ctx.Err() // the error is its consequence
	}
	return err
}

// session is one SSH session, which may be closed while it is being opened.
type session struct {
	mark string
	kill bool

	mu     sync.Mutex
	closed bool
	ssh    *xssh.Session
	in     io.WriteCloser
	out    io.Reader
	err    io.Reader
}

func (s *session) open(conn *xssh.Client) error {
	opened, err := conn.NewSession()
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	s.mu.Lock()
	s.ssh = opened
	closed := s.closed
	s.mu.Unlock()
	if closed {
		_ = opened.Close()
		return errors.New("opening a session: given up")
	}
	if s.in, err = opened.StdinPipe(); err == nil {
		s.out, err = opened.StdoutPipe()
	}
	if err == nil {
		s.err, err = opened.StderrPipe()
	}
	return err
}

func (s *session) start(command string) error {
	if err := s.ssh.Start(command); err != nil {
		return fmt.Errorf("running /bin/sh: %w", err)
	}
	return nil
}

// close asks the server to end the session; what runs in it is not killed.
func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed = true; s.ssh != nil {
		_ = s.ssh.Close() // closed twice, or by the server: either way it is
	}
}

// abandon ends a session whose answer nobody waits for any more.
func (s *session) abandon() {
	s.mu.Lock()
	if s.kill && s.ssh != nil {
		_ = s.ssh.Signal(xssh.SIGKILL) // a server that does not know it, or is gone
	}
	s.mu.Unlock()
	s.close()
}

// converse sends the script and its input and takes the answer. The three streams run at
// once, since a full one would stop the others. The sender, which reads what a caller
// gave, has ended when it returns; the error output is the connection's to wait for,
// since sshd ends a session no sooner than its process, which may be a runner's keeper.
func (c *Client) converse(s *session, text string, j job) error {
	answered, sent := make(chan struct{}), make(chan error, 1)
	go func() { sent <- s.send(text, j, answered) }()
	complaint, drained := &head{}, make(chan struct{})
	c.reading.Go(func() {
		defer close(drained)
		to := io.Writer(complaint)
		if j.complain != nil {
			to = io.MultiWriter(complaint, j.complain)
		}
		_, _ = io.Copy(to, s.err) // its end is the session's
	})
	r := &reader{Reader: bufio.NewReaderSize(s.out, maxLine), ended: s.ended}
	err := r.preface(s.mark)
	if err == nil {
		err = j.answer(r)
	}
	if err == nil && j.complain != nil {
		<-drained
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		<-drained // both outputs end at once
		err = cutShort(r.begun, complaint.String())
	}
	close(answered)
	if err != nil {
		s.close() // wakes a sender that waits for room, if the server plays by the rules
	}
	cut := time.AfterFunc(closeLimit, func() { _ = c.raw.Close() })
	defer cut.Stop()
	if broken := <-sent; broken != nil && err != nil {
		return broken // what the guest says of it is its consequence
	}
	return err
}

// ended waits for the script's end, and tells one that it came to from a loss.
func (s *session) ended() error {
	var missing *xssh.ExitMissingError
	err := s.ssh.Wait()
	if errors.As(err, &missing) {
		return io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errAnswer, err)
	}
	return nil
}

// send writes the script and the input. A failure to read the input is reported: the
// guest sees only that it ended early.
func (s *session) send(text string, j job, answered <-chan struct{}) error {
	defer func() { _ = s.in.Close() }() // an end that is not heard is the session's
	if _, err := io.WriteString(s.in, text); err != nil {
		return nil // the guest ended it, and its answer says why
	}
	if j.input != nil {
		source := &source{Reader: j.input}
		if _, err := io.Copy(s.in, source); source.err != nil && err != nil {
			return fmt.Errorf("reading what is to be sent: %w", source.err)
		}
	}
	if j.hold {
		<-answered
	}
	return nil
}

// cutShort is the error for an answer that came to no end.
func cutShort(begun bool, complaint string) error {
	complaint = strings.TrimSpace(complaint)
	switch {
	case begun && complaint == "":
		return fmt.Errorf("%w: the session ended before the answer", guest.ErrLost)
	case begun:
		return fmt.Errorf("%w: the session ended before the answer; the guest's shell said %q", guest.ErrLost, complaint)
	case complaint == "":
		return fmt.Errorf("%w: the session ended before /bin/sh said a word", guest.ErrLost)
	}
	return fmt.Errorf("%w: /bin/sh did not run; the account's shell said %q", errAnswer, complaint)
}

// source remembers why reading failed.
type source struct {
	io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// head keeps the beginning of what is written and takes all the rest.
type head struct{ kept []byte }

func (h *head) Write(p []byte) (int, error) {
	h.kept = append(h.kept, p[:min(len(p), maxComplaint-len(h.kept))]...)
	return len(p), nil
}

func (h *head) String() string { return guest.Plain(string(h.kept), maxComplaint) }
