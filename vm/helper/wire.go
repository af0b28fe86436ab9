package helper

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/paddock-ci/paddock/vm"
)

// maxMessage bounds one message, in bytes: a console's tail of 4 KiB grows at most
// sixfold in JSON, and an order holds a few mounts.
const maxMessage = 256 << 10

// order is the one message on a helper's standard input. It holds no secrets.
type order struct {
	Op     string  `json:"op"`
	Folder string  `json:"folder"` // the machine's in Config.Dir
	Spec   vm.Spec `json:"spec"`
}

// What a helper is started for.
const (
	orderBoot = "boot" // boot the machine and stay with it
	orderReap = "reap" // end what a killed helper left, and go
)

// request is the first message on a connection to a helper. A helper may be older than
// the agent that talks to it, by a day at most: add, do not change.
type request struct {
	Op   string `json:"op"`
	Port int    `json:"port,omitempty"` // of opPort
	Dir  string `json:"dir,omitempty"`  // of opSave
}

const (
	opWatch   = "watch"   // a report at once and at each change, until a final one
	opDial    = "dial"    // one report; if it has no error, the guest's stream follows
	opPort    = "port"    // one report; if it has no error, the stream to the guest's port follows
	opSave    = "save"    // one report
	opAddress = "address" // one report, with the address
	opDestroy = "destroy" // one report, the final one
)

// state is where a machine is.
type state string

const (
	booting state = "booting"
	running state = "running"
	failed  state = "failed" // did not boot; final
	ended   state = "ended"  // final
)

func (s state) final() bool { return s == failed || s == ended }

// report is what a helper says of its machine, and, once final, the result on disk.
type report struct {
	State state    `json:"state"`
	Exit  vm.Exit  `json:"exit,omitzero"`
	Error *failure `json:"error,omitempty"` // why it failed, or was not fully destroyed
	// Address answers opAddress; it is in no other report.
	Address string `json:"address,omitempty"`
}

// failure is an error as it travels.
type failure struct {
	Kind    string `json:"kind"`
	Text    string `json:"text"`
	Console string `json:"console,omitempty"`
}

// Kinds of errors that a caller decides on; any other is plain.
const (
	kindBoot    = "boot"
	kindUnknown = "unknown-request" // the helper is older than the request
	kindPlain   = "error"
)

// sentinels are the errors that travel by their kind.
var sentinels = []struct {
	kind string
	is   error
}{
	{"capacity", vm.ErrAtCapacity},
	{"ended", vm.ErrEnded},
	{"state", vm.ErrState},
	{"unsupported", vm.ErrUnsupported},
	{kindUnknown, vm.ErrUnsupported},
}

// newFailure keeps of an error what the contract of vm promises.
func newFailure(err error) *failure {
	var boot *vm.BootError
	if errors.As(err, &boot) {
		return &failure{Kind: kindBoot, Text: boot.Err.Error(), Console: boot.Console}
	}
	for _, s := range sentinels {
		if errors.Is(err, s.is) {
			return &failure{Kind: s.kind, Text: err.Error()}
		}
	}
	return &failure{Kind: kindPlain, Text: err.Error()}
}

// asError is the inverse of newFailure; nil for nil.
func (f *failure) asError() error {
	switch {
	case f == nil:
		return nil
	case f.Kind == kindBoot:
		return &vm.BootError{Console: f.Console, Err: errors.New(f.Text)}
	}
	for _, s := range sentinels {
		if f.Kind == s.kind {
			return relayed{text: f.Text, is: s.is}
		}
	}
	return errors.New(f.Text)
}

// relayed is an error of the other process: its own text, which names the sentinel.
type relayed struct {
	text string
	is   error
}

func (r relayed) Error() string { return r.text }
func (r relayed) Unwrap() error { return r.is }

// write sends one message: its length (4 bytes, big endian) and JSON, in one Write.
func write(w io.Writer, v any) error {
	b, err := encode(v)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

func encode(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encoding a message: %w", err)
	}
	if len(body) > maxMessage {
		return nil, fmt.Errorf("message of %d bytes: at most %d", len(body), maxMessage)
	}
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body))), body...), nil
}

// read reads one message into v and not a byte more. io.EOF is an end before it.
func read(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxMessage {
		return fmt.Errorf("message of %d bytes: at most %d", size, maxMessage)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return fmt.Errorf("reading a message of %d bytes: %w", size, err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("reading a message: %w", err)
	}
	return nil
}
