package guest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
)

// Protocol is the version that both sides say in hello; a side that meets a newer one
// goes on, since kinds it does not know are answered with an error of their own.
const Protocol = 1

// maxFrame bounds one message, header included: 1 MiB. A JIT config is about 8 KiB.
const maxFrame = 1 << 20

// headerSize is kind (1 byte) and request id (4 bytes); the length before it (4 bytes,
// big endian like the id) counts header and body.
const headerSize = 1 + 4

// kind is what a message is. The numbers are part of the protocol: never reuse one.
// Requests, and what else the host sends, are below 128, answers above; further verbs
// take the next free numbers. An agent answers a request that it does not know with
// codeUnsupported, so what is sent behind a request waits for a first answer to it.
type kind uint8

const (
	kindHello    kind = 1  // asks for the agent's version and status
	kindStart    kind = 2  // startBody
	kindWatch    kind = 3  // status answers follow, until one that is exited
	kindCancel   kind = 4  // ends the request with the same id; has no answer
	kindExec     kind = 5  // execBody; output answers follow, then kindExit
	kindPut      kind = 6  // putBody; kindTaken when data may come, kindDone at the end
	kindData     kind = 7  // the next piece of a put's file, as it is; answered by kindTaken
	kindCredit   kind = 8  // one output answer of the request was consumed; has no answer
	kindOutput   kind = 9  // the runner's output follows as kindStdout, then kindDone
	kindNetwork  kind = 10 // brings the network up
	kindWake     kind = 11 // wakeBody
	kindShutdown kind = 12 // powers the guest off after the answer
	kindConnect  kind = 13 // connectBody, first on its stream; after kindDone the stream is raw

	kindHelloAnswer   kind = 129 // Hello
	kindDone          kind = 130 // the request succeeded; no body
	kindStatus        kind = 131 // Status
	kindError         kind = 132 // errorBody
	kindStdout        kind = 133 // output as it is, at most maxChunk
	kindStderr        kind = 134 // the same of the other stream
	kindExit          kind = 135 // exitBody
	kindTaken         kind = 136 // a put's next data may come; no body
	kindNetworkAnswer kind = 137 // Network
)

// Flow of what is streamed, either way: pieces of at most maxChunk bytes, and at most
// window of them under way, so 512 KiB. A side that sends more is cut off.
const (
	maxChunk = 32 << 10
	window   = 16
)

// frame is one message. The id is the request's, so that many requests share a stream.
type frame struct {
	kind kind
	id   uint32
	body []byte // JSON, may be empty; what is streamed is as it is
}

// startBody is Run as it travels: the only place where the input is ever encoded.
type startBody struct {
	Name  string            `json:"name"`
	Argv  []string          `json:"argv"`
	Env   map[string]string `json:"env,omitempty"`
	Dir   string            `json:"dir,omitempty"`
	Input []byte            `json:"input,omitempty"`
}

// execBody is Command as it travels.
type execBody struct {
	Argv  []string          `json:"argv"`
	Env   map[string]string `json:"env,omitempty"`
	Dir   string            `json:"dir,omitempty"`
	Input []byte            `json:"input,omitempty"`
}

// exitBody is a command's end.
type exitBody struct {
	Code int `json:"code"`
}

// putBody is File as it travels.
type putBody struct {
	Path string      `json:"path"`
	Mode fs.FileMode `json:"mode"`
	Size int64       `json:"size"`
}

// wakeBody is Wake as it travels.
type wakeBody struct {
	Now     time.Time `json:"now"`
	Entropy []byte    `json:"entropy,omitempty"`
}

// connectBody names a port of the guest's loopback.
type connectBody struct {
	Port int `json:"port"`
}

// errorBody is a failed request. Code is empty where the text is all there is to know.
type errorBody struct {
	Code string `json:"code,omitempty"`
	Text string `json:"text"`
}

// Codes of errors that a caller decides on.
const (
	codeOccupied    = "occupied"
	codeUnsupported = "unsupported"
)

// errFrame is the cause when a stream carries something that is not our protocol.
var errFrame = errors.New("not a message of the guest protocol")

// readFrame reads one message; io.EOF between messages is a clean end. It allocates
// no more than maxFrame, whatever the length says.
func readFrame(r io.Reader) (frame, error) {
	var head [4 + headerSize]byte
	if _, err := io.ReadFull(r, head[:1]); err != nil {
		return frame{}, err // io.EOF as it is: the peer hung up between messages
	}
	if _, err := io.ReadFull(r, head[1:]); err != nil {
		return frame{}, fmt.Errorf("reading a message's header: %w", noEOF(err))
	}
	size := binary.BigEndian.Uint32(head[:4])
	if size < headerSize || size > maxFrame {
		return frame{}, fmt.Errorf("%w: length %d, want %d to %d", errFrame, size, headerSize, maxFrame)
	}
	f := frame{kind: kind(head[4]), id: binary.BigEndian.Uint32(head[5:9])}
	f.body = make([]byte, size-headerSize)
	if _, err := io.ReadFull(r, f.body); err != nil {
		return frame{}, fmt.Errorf("reading a message's body: %w", noEOF(err))
	}
	return f, nil
}

// noEOF tells an end in mid-message from a clean one.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// encodeFrame makes one message in one piece, so that a single Write carries it. A nil
// body makes an empty one.
func encodeFrame(k kind, id uint32, body any) ([]byte, error) {
	var encoded []byte
	if body != nil {
		var err error
		if encoded, err = json.Marshal(body); err != nil {
			return nil, fmt.Errorf("encoding a message: %w", err)
		}
	}
	return encodeRaw(k, id, encoded)
}

// encodeRaw makes one message of a body as it is.
func encodeRaw(k kind, id uint32, encoded []byte) ([]byte, error) {
	size := headerSize + len(encoded)
	if size > maxFrame {
		return nil, fmt.Errorf("message of %d bytes: the guest protocol carries at most %d", size, maxFrame)
	}
	b := make([]byte, 0, 4+size)
	b = binary.BigEndian.AppendUint32(b, uint32(size))
	b = append(b, byte(k))
	b = binary.BigEndian.AppendUint32(b, id)
	return append(b, encoded...), nil
}

// decode reads a message's body into v.
func (f frame) decode(v any) error {
	if err := json.Unmarshal(f.body, v); err != nil {
		// The decoder's text may quote the body, and a start's body holds the input.
		return fmt.Errorf("%w: message of kind %d has a malformed body", errFrame, f.kind)
	}
	return nil
}

// asError is the error that the message of a failed request stands for.
func (f frame) asError() error {
	var e errorBody
	if err := f.decode(&e); err != nil {
		return err
	}
	return e.asError()
}

// asError is the error that an error answer stands for, as the caller sees it.
func (e errorBody) asError() error {
	text := Plain(e.Text, maxText)
	switch e.Code {
	case codeOccupied:
		return fmt.Errorf("%w: %s", ErrOccupied, text)
	case codeUnsupported:
		return fmt.Errorf("%w: %s; update the agent in the image", ErrUnsupported, text)
	}
	return fmt.Errorf("guest agent: %s", text)
}

// Bounds of what a status may carry, in bytes: the guest is not trusted.
const (
	maxTail = 4 << 10 // of the runner's output
	maxText = 1 << 10 // names and error texts
)

// clip bounds a string from its beginning and makes it valid UTF-8.
func clip(s string, limit int) string {
	return strings.ToValidUTF8(s[:min(limit, len(s))], "\uFFFD")
}

// checked is a status as a guest sent it, with every field within its bounds; ok is
// false if its state is none.
func (s Status) checked() (_ Status, ok bool) {
	s.Name, s.Job = clip(s.Name, maxText), Plain(s.Job, maxText) // a name is compared
	s.Tail = strings.ToValidUTF8(s.Tail[max(0, len(s.Tail)-maxTail):], "\uFFFD")
	s.BusyAt, s.ExitedAt = sane(s.BusyAt), sane(s.ExitedAt)
	switch s.State {
	case Idle, Running, Busy, Exited:
		return s, true
	}
	return Status{}, false
}

// sane drops a time that JSON could not carry on: the zero time stands for unknown.
func sane(t time.Time) time.Time {
	if y := t.Year(); y < 2000 || y > 9999 {
		return time.Time{}
	}
	return t.UTC()
}
