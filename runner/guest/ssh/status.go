package ssh

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Bounds of an answer. The guest is not trusted: its scripts are ours, but what runs
// them is not.
const (
	maxLine     = 4 << 10  // bytes of one line: a name or a job's line has 1 KiB
	maxFields   = 8        // lines of one status
	maxStatuses = 16       // of one runner
	maxPiece    = 32 << 10 // of output that is passed on at once
	maxEnd      = 64 << 10 // bytes of output behind the last status; 4 KiB are due
)

// errAnswer is the cause when a guest says what our scripts would not.
var errAnswer = errors.New("not an answer of the guest's script")

// reader reads answers, line by line; a line longer than its buffer is an error.
type reader struct {
	*bufio.Reader
	begun bool         // the script has said its first word
	ended func() error // waits for the script's end; an error if it did not come to it
}

// line reads one line without its end.
func (r *reader) line() (string, error) {
	text, err := r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return "", fmt.Errorf("%w: a line of more than %d bytes", errAnswer, maxLine)
	case err != nil:
		return "", err
	}
	return string(text[:len(text)-1]), nil
}

// preface skips what the login shell's own files print, up to the script's first word.
func (r *reader) preface(mark string) error {
	for left := maxPreface; left > 0; {
		piece, err := r.ReadSlice('\n')
		// A greeting without an end of line stands before the mark.
		if strings.HasSuffix(string(piece), mark+"\n") {
			r.begun = true
			return nil
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		left -= len(piece)
	}
	return fmt.Errorf("%w: %d bytes before its first word: the files that the account's login shell reads print too much", errAnswer, maxPreface)
}

// word expects one line, which is want, or an error of the script's.
func (r *reader) word(want string) error {
	text, err := r.line()
	if err != nil {
		return err
	}
	kind, rest, _ := strings.Cut(text, " ")
	switch {
	case text == want:
		return nil
	case kind == "occupied":
		return fmt.Errorf("%w: it is %q", guest.ErrOccupied, guest.Plain(rest, maxLine))
	case kind == "error":
		return errors.New(guest.Plain(rest, maxLine))
	}
	return fmt.Errorf("%w: %q", errAnswer, guest.Plain(text, 100))
}

// status reads one status: lines of a word and its value, a full stop, and after an exit
// the end of the runner's output.
func (r *reader) status() (guest.Status, error) {
	var s guest.Status
	for range maxFields {
		text, err := r.line()
		if err != nil {
			return guest.Status{}, err
		}
		if text == "." {
			return r.end(s)
		}
		if err := field(&s, text); err != nil {
			return guest.Status{}, err
		}
	}
	return guest.Status{}, fmt.Errorf("%w: a status of more than %d lines", errAnswer, maxFields)
}

// field takes one line of a status.
func field(s *guest.Status, text string) error {
	kind, rest, _ := strings.Cut(text, " ")
	switch kind {
	case "state":
		s.State = guest.State(rest)
		return nil
	case "name":
		s.Name = rest
		return nil
	case "busy":
		at, line, _ := strings.Cut(rest, " ")
		if job, ok := guest.BusyJob(line); ok {
			s.Job, s.BusyAt = job, moment(at)
			return nil
		}
	case "exit":
		code, at, _ := strings.Cut(rest, " ")
		if n, err := strconv.ParseUint(code, 10, 8); err == nil {
			s.ExitCode, s.ExitedAt = int(n), moment(at)
			return nil
		}
	}
	return fmt.Errorf("%w: %q in a status", errAnswer, guest.Plain(text, 100))
}

// end completes a status.
func (r *reader) end(s guest.Status) (guest.Status, error) {
	if s.State == guest.Exited {
		tail, err := io.ReadAll(io.LimitReader(r, maxEnd))
		if err != nil {
			return guest.Status{}, err
		}
		s.Tail = string(tail)
	}
	s, ok := guest.Checked(s)
	if !ok {
		return guest.Status{}, fmt.Errorf("%w: unknown state", errAnswer)
	}
	return s, nil
}

// moment is a time in seconds since 1970 by the guest's clock; zero if it is none.
func moment(text string) time.Time {
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil || seconds < 0 || seconds > 1<<40 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}
