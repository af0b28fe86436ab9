package guest

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// The multiplexer's messages, as far as the host looks into them: version, type, flags
// (2 bytes), stream (4), length (4), all big endian.
const (
	muxHeader = 12
	muxData   = 0
	muxPing   = 2
	muxLast   = 3 // the highest type
	muxOpens  = 1 // flag: opens a stream, or asks for a ping's answer
)

// guard lets a guest's messages through to the host's multiplexer, which is made for
// peers that mean well. A message comes whole or not at all, since the multiplexer holds
// locks while it reads one; and a guest opens no streams, whose windows would take the
// host's memory, nor does it ping faster than pings are answered.
type guard struct {
	in    *bufio.Reader
	out   []byte // what of the present message is not yet read
	buf   []byte
	pings float64   // that the guest may send now
	since time.Time // when that was right; zero: at the first ping
}

// Read returns no more than the present message.
func (g *guard) Read(p []byte) (int, error) {
	if len(g.out) == 0 {
		if err := g.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, g.out)
	g.out = g.out[n:]
	return n, nil
}

// next reads one message whole.
func (g *guard) next() error {
	if len(g.buf) < muxHeader {
		g.buf = make([]byte, muxHeader+maxChunk) // what a message has at most, usually
	}
	head := g.buf[:muxHeader]
	if _, err := io.ReadFull(g.in, head); err != nil {
		return err
	}
	flags, length := binary.BigEndian.Uint16(head[2:4]), binary.BigEndian.Uint32(head[8:12])
	switch {
	case head[0] != 0 || head[1] > muxLast:
		return fmt.Errorf("%w: a broken message", errFrame)
	case head[1] == muxPing && flags&muxOpens != 0:
		if !g.mayPing(time.Now()) {
			return fmt.Errorf("%w: a flood of pings", errFrame)
		}
	case flags&muxOpens != 0:
		return fmt.Errorf("%w: the guest opens a stream", errFrame)
	case head[1] == muxData && length > maxBody:
		return fmt.Errorf("%w: %d bytes at once", errFrame, length)
	}
	size := muxHeader
	if head[1] == muxData {
		size += int(length)
	}
	if size > len(g.buf) {
		g.buf = append(make([]byte, 0, size), head...)[:size]
	}
	if _, err := io.ReadFull(g.in, g.buf[muxHeader:size]); err != nil {
		return err
	}
	g.out = g.buf[:size]
	return nil
}

// mayPing spends a ping of the guest's allowance.
func (g *guard) mayPing(now time.Time) bool {
	if g.since.IsZero() {
		g.since, g.pings = now, maxPings
	}
	g.pings = min(maxPings, g.pings+now.Sub(g.since).Seconds()/pingEvery.Seconds())
	g.since = now
	g.pings--
	return g.pings >= 0
}

// watched reads a raw stream, and fails where the guest says that the session is over.
type watched struct {
	raw    io.Reader
	nonce  word // of the session
	losses scanner
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.raw.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		nonce, after, ok := w.losses.find(rest)
		if ok && nonce == w.nonce {
			return 0, errCut
		}
		rest = rest[after:]
	}
	return n, err
}
