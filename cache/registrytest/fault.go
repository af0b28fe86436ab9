package registrytest

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Fault is one way to misbehave when a blob is asked for.
type Fault struct {
	Kind Kind
	// Times is how many requests it spoils, in which it goes before later faults of
	// the same blob; 0: every one.
	Times int
	// At is the byte of the blob where WrongByte, Truncate, Drop and Hang strike.
	At int64
	// Status is the answer's status, of Refuse.
	Status int
	// RetryAfter is sent as that header with Refuse; empty: none is sent.
	RetryAfter string
	// Rate is in bytes per second, of Slow.
	Rate int
	// Location is where Redirect points.
	Location string
}

// Kind is a kind of fault.
type Kind int

// The kinds.
const (
	WrongByte   Kind = iota + 1 // one byte is flipped
	Truncate                    // the blob ends early, and the answer says so is right
	Drop                        // the connection is cut in the middle of the body
	Hang                        // no byte follows until Heal, or until the client goes
	Refuse                      // an answer with Status and no blob
	IgnoreRange                 // 200 with the whole blob, whatever range was asked for
	Slow                        // bytes come at Rate
	Redirect                    // 307 to Location
)

// Break makes requests for a blob fail; "" is any blob that has no fault of its own.
func (r *Registry) Break(d fleet.Digest, f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[d] = append(r.faults[d], &f)
}

// Heal takes back every Break and lets hanging requests go on.
func (r *Registry) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.faults)
	close(r.healed)
	r.healed = make(chan struct{})
}

// fault draws the fault that spoils this request; the zero Fault is none.
func (r *Registry) fault(d fleet.Digest) (Fault, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts.Requests[d]++
	key := d
	if len(r.faults[key]) == 0 {
		key = ""
	}
	if len(r.faults[key]) == 0 {
		return Fault{}, r.healed
	}
	f := r.faults[key][0]
	drawn := *f
	if f.Times > 0 {
		if f.Times--; f.Times == 0 {
			r.faults[key] = r.faults[key][1:]
		}
	}
	return drawn, r.healed
}

// blob answers for a blob, as its fault wants it.
func (r *Registry) blob(w http.ResponseWriter, req *http.Request, d fleet.Digest) {
	f, healed := r.fault(d)
	if f.Kind == Refuse {
		if f.RetryAfter != "" {
			w.Header().Set("Retry-After", f.RetryAfter)
		}
		http.Error(w, fmt.Sprintf(`{"errors":[{"code":"UNKNOWN","message":"status %d by order"}]}`, f.Status), f.Status)
		return
	}
	if f.Kind == Redirect {
		http.Redirect(w, req, f.Location, http.StatusTemporaryRedirect)
		return
	}
	data, err := r.content(req.Context(), d)
	if notFound(err) {
		http.Error(w, `{"errors":[{"code":"BLOB_UNKNOWN","message":"no such blob"}]}`, http.StatusNotFound)
		return
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if f.Kind == WrongByte {
		data = bytes.Clone(data)
		data[f.At] ^= 0x01
	}
	if f.Kind == Truncate {
		data = data[:f.At]
	}
	start, end, ranged := byteRange(req.Header.Get("Range"), int64(len(data)))
	if f.Kind == IgnoreRange {
		start, end, ranged = 0, int64(len(data)), false
	}
	if start >= end {
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(end-start, 10))
	status := http.StatusOK
	if ranged {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, end-1, len(data)))
		status = http.StatusPartialContent
	}
	w.WriteHeader(status)
	r.send(w, req, d, f, healed, data, start, end)
}

// send writes data[start:end], with the faults that strike in the middle.
func (r *Registry) send(w http.ResponseWriter, req *http.Request, d fleet.Digest, f Fault, healed <-chan struct{}, data []byte, start, end int64) {
	out := io.MultiWriter(w, countTo{r, d})
	piece := end - start
	if f.Kind == Slow {
		piece = max(1, int64(f.Rate)/20) // twenty pieces a second
	}
	if (f.Kind == Drop || f.Kind == Hang) && start <= f.At && f.At < end {
		_, _ = out.Write(data[start:f.At])
		_ = http.NewResponseController(w).Flush()
		if f.Kind == Drop {
			panic(http.ErrAbortHandler) // net/http's way to cut the connection
		}
		select {
		case <-healed:
		case <-req.Context().Done():
			return
		}
		start = f.At
	}
	for ; start < end; start += piece {
		if _, err := out.Write(data[start:min(start+piece, end)]); err != nil {
			return // the client has gone
		}
		if f.Kind == Slow && !pause(req, healed) {
			return
		}
	}
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

// countTo counts bytes of a body.
type countTo struct {
	r *Registry
	d fleet.Digest
}

func (c countTo) Write(b []byte) (int, error) {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	c.r.counts.Bytes[c.d] += int64(len(b))
	return len(b), nil
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
