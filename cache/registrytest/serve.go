package registrytest

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// answer is what is sent of a blob: its bytes from start to end, of which those beyond
// the data are zeros.
type answer struct {
	digest     fleet.Digest
	fault      Fault
	healed     <-chan struct{}
	data       []byte
	start, end int64
}

// serve answers with a blob, whole or in part, as its fault wants it.
func (r *Registry) serve(w http.ResponseWriter, req *http.Request, d fleet.Digest, f Fault, healed <-chan struct{}, data []byte) {
	size := int64(len(data))
	switch f.Kind {
	case Truncate:
		size = f.At
	case Overlong:
		size += f.At
	default:
	}
	start, end, ranged := byteRange(req.Header.Get("Range"), size)
	switch {
	case f.Kind == IgnoreRange, f.Whole:
		start, end, ranged = 0, size, false
	case f.Kind == RefuseRange && ranged, start >= end:
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	case f.Kind == Short && ranged:
		end = min(end, start+f.At)
	case f.Kind == WrongRange && ranged:
		start = min(start+1, end-1)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if !f.Unsized {
		w.Header().Set("Content-Length", strconv.FormatInt(end-start, 10))
	}
	status := http.StatusOK
	if ranged {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, end-1, size))
		status = http.StatusPartialContent
	}
	w.WriteHeader(status)
	r.send(w, req, answer{d, f, healed, data, start, end})
}

// sendSize is how much is written at a time: few calls, and a connection that breaks is
// counted for little that it did not carry.
const sendSize = 128 << 10

// send writes an answer's bytes, with the faults that strike in the middle.
func (r *Registry) send(w http.ResponseWriter, req *http.Request, a answer) {
	f := a.fault
	piece := int64(sendSize)
	switch {
	case f.Kind == Slow:
		piece = max(1, int64(f.Rate)/20) // twenty pieces a second
	case r.pace.limited():
		piece = 16 << 10 // smooth enough at some MB/s
	}
	strikes := (f.Kind == Drop || f.Kind == Hang) && a.start <= f.At && f.At < a.end
	for at := a.start; at < a.end; {
		next := min(at+piece, a.end)
		if strikes && at <= f.At {
			next = min(next, f.At)
		}
		if !r.put(w, req, a, at, next) {
			return // the client has gone
		}
		at = next
		if strikes && at == f.At {
			if !strike(w, req, a) {
				return
			}
			strikes = false
		}
		if f.Kind == Slow {
			_ = http.NewResponseController(w).Flush() // or a trickle would stay in a buffer
			if !pause(req, a.healed) {
				return
			}
		}
	}
}

// strike cuts the connection or lets it hang; true: it goes on.
func strike(w http.ResponseWriter, req *http.Request, a answer) bool {
	_ = http.NewResponseController(w).Flush() // what was written is to arrive
	if a.fault.Kind == Drop {
		panic(http.ErrAbortHandler) // net/http's way to cut the connection
	}
	select {
	case <-a.healed:
		return true
	case <-req.Context().Done():
		return false
	}
}

// put writes bytes of an answer when their turn comes. They are counted before, so
// that who has read them finds them counted.
func (r *Registry) put(w http.ResponseWriter, req *http.Request, a answer, from, to int64) bool {
	if from == to {
		return true
	}
	if !r.pace.wait(req.Context(), int(to-from)) {
		return false
	}
	r.mu.Lock()
	r.counts.Bytes[a.digest] += to - from
	r.mu.Unlock()
	have := int64(len(a.data))
	piece := a.data[min(from, have):min(to, have)]
	if a.fault.Kind == WrongByte && from <= a.fault.At && a.fault.At < from+int64(len(piece)) {
		piece = append([]byte(nil), piece...)
		piece[a.fault.At-from] ^= 0x01
	}
	if _, err := w.Write(piece); err != nil {
		return false
	}
	_, err := w.Write(make([]byte, to-from-int64(len(piece))))
	return err == nil
}

// pause waits a twentieth of a second; false: the client has gone.
func pause(req *http.Request, healed <-chan struct{}) bool {
	timer := time.NewTimer(50 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-healed:
	case <-req.Context().Done():
		return false
	}
	return true
}

// byteRange reads "bytes=a-b" and "bytes=a-"; anything else is the whole.
func byteRange(header string, size int64) (start, end int64, ranged bool) {
	from, to, ok := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	start, err := strconv.ParseInt(from, 10, 64)
	if !ok || err != nil || start < 0 {
		return 0, size, false
	}
	last, err := strconv.ParseInt(to, 10, 64)
	if to == "" || err != nil {
		last = size - 1
	}
	return start, min(last+1, size), true
}
