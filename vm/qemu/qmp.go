package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxMessage bounds one line of QMP, in bytes: the longest that we ask for are a few
// thousand. A guest that broke out into QEMU cannot fill our memory through it.
const maxMessage = 1 << 20

// Errors of the conversation with QEMU.
var (
	errMonitorGone = errors.New("QEMU's monitor is gone")
	errMessage     = errors.New("QEMU's monitor said what is no QMP")
)

// message is one line from QEMU: a greeting, an answer or an event.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       json.RawMessage `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"` // of an event
}

// eventData are the members of the events that mean something here.
type eventData struct {
	ID     string `json:"id"`     // VSERPORT_CHANGE: the port's
	Open   bool   `json:"open"`   // VSERPORT_CHANGE: by the guest
	Reason string `json:"reason"` // SHUTDOWN
}

// data decodes what comes with an event; one of another shape means nothing here.
func (m message) data() eventData {
	var d eventData
	if json.Unmarshal(m.Data, &d) != nil {
		return eventData{}
	}
	return d
}

// parseMessage reads one line.
func parseMessage(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("%w: %w", errMessage, err)
	}
	if m.Greeting == nil && m.Return == nil && m.Error == nil && m.Event == "" {
		return message{}, fmt.Errorf("%w: neither greeting nor answer nor event", errMessage)
	}
	return m, nil
}

// monitor is QEMU's control stream: commands one after the other, answers by number,
// events in between. Its methods are safe for concurrent use.
type monitor struct {
	conn     *net.UnixConn
	turn     chan struct{} // holds one token: whoever has it may run a command
	greeting chan struct{} // closed when QEMU has greeted
	done     chan struct{} // closed when nothing more will come
	err      error         // why; set before done is closed

	mu     sync.Mutex
	next   uint64       // number of the last command
	answer chan message // gets that one's answer; others are of commands that were given up
}

// newMonitor reads from conn until it ends; event is called for each event, by the
// reading goroutine.
func newMonitor(conn *net.UnixConn, event func(message)) *monitor {
	q := &monitor{conn: conn, turn: make(chan struct{}, 1), greeting: make(chan struct{}), done: make(chan struct{})}
	q.turn <- struct{}{}
	greeted := sync.OnceFunc(func() { close(q.greeting) })
	go func() {
		defer close(q.done)
		q.err = readMessages(conn, func(m message) {
			switch {
			case m.Event != "":
				event(m)
			case m.Greeting != nil:
				greeted()
			default:
				q.answered(m)
			}
		})
	}()
	return q
}

// answered hands an answer to the command that waits for it; there is room for one, and
// a second one means nothing.
func (q *monitor) answered(m message) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if string(m.ID) != strconv.FormatUint(q.next, 10) {
		return
	}
	select {
	case q.answer <- m:
	default:
	}
}

// number begins a command.
func (q *monitor) number() (uint64, <-chan message) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next++
	q.answer = make(chan message, 1)
	return q.next, q.answer
}

// readMessages reads lines until r ends or says what cannot be understood.
func readMessages(r io.Reader, each func(message)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 4096), maxMessage)
	for lines.Scan() {
		m, err := parseMessage(lines.Bytes())
		if err != nil {
			return err
		}
		each(m)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("%w: %w", errMonitorGone, err)
	}
	return errMonitorGone
}

// hello waits for QEMU's greeting and leaves the mode in which it takes no commands.
func (q *monitor) hello(ctx context.Context) error {
	select {
	case <-q.greeting:
	case <-q.done:
		return q.err
	case <-ctx.Done():
		return ctx.Err()
	}
	return q.run(ctx, "qmp_capabilities", nil)
}

// run runs a command that answers nothing of interest.
func (q *monitor) run(ctx context.Context, command string, arguments any) error {
	return q.query(ctx, command, arguments, nil, nil)
}

// pass gives QEMU a file under a name, for a command that follows.
func (q *monitor) pass(ctx context.Context, name string, f *os.File) error {
	return q.query(ctx, "getfd", map[string]string{"fdname": name}, f, nil)
}

// human runs a command of the monitor for people, which some things exist in only.
func (q *monitor) human(ctx context.Context, line string) (string, error) {
	var said string
	err := q.query(ctx, "human-monitor-command", map[string]string{"command-line": line}, nil, &said)
	return said, err
}

// query runs a command, with f passed along unless it is nil, and decodes the answer
// into result unless that is nil.
func (q *monitor) query(ctx context.Context, command string, arguments any, f *os.File, result any) error {
	select {
	case <-q.turn:
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
	defer func() { q.turn <- struct{}{} }()
	id, answer := q.number()
	if err := q.send(ctx, map[string]any{"execute": command, "arguments": arguments, "id": id}, f); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			return fmt.Errorf("%s: QEMU says: %.500s", command, m.Error.Desc)
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("%s: %w: %w", command, errMessage, err)
		}
		return nil
	case <-q.done:
		return fmt.Errorf("%s: %w", command, q.err)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
}

// send writes a command. One that is written in part only ends the conversation, since
// nothing sensible could follow it.
func (q *monitor) send(ctx context.Context, command map[string]any, f *os.File) error {
	if command["arguments"] == nil {
		delete(command, "arguments")
	}
	raw, err := json.Marshal(command)
	if err != nil {
		return err
	}
	raw = append(raw, '\n')
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		_ = q.conn.SetWriteDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-cut // or it would cut off the next command
			_ = q.conn.SetWriteDeadline(time.Time{})
		}
	}()
	n, _, err := q.conn.WriteMsgUnix(raw, rights, nil)
	switch {
	case err == nil && n == len(raw):
		return nil
	case n > 0:
		_ = q.conn.Close()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(errMonitorGone, err)
}

// close ends the conversation.
func (q *monitor) close() {
	_ = q.conn.Close()
	<-q.done
}
