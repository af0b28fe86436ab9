package registrytest

import (
	"fmt"
	"net/http"

	"github.com/paddock-ci/paddock/fleet"
)

// Fault is one way to misbehave when a blob is asked for.
type Fault struct {
	Kind Kind
	// Times is how many requests it spoils, in which it goes before later faults of
	// the same blob; 0: every one.
	Times int
	// At is the byte of the blob where WrongByte, Truncate, Drop and Hang strike, how many
	// bytes more than there are Overlong sends, and how many at most Short.
	At int64
	// Status is the answer's status, of Refuse.
	Status int
	// RetryAfter is sent as that header with Refuse; empty: none is sent.
	RetryAfter string
	// Rate is in bytes per second, of Slow.
	Rate int
	// Location is where Redirect points.
	Location string
	// Whole answers with 200 and everything, whatever range was asked for, besides.
	Whole bool
	// Unsized leaves out the answer's length, of Truncate and Overlong: the body just ends.
	Unsized bool
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
	Overlong                    // more bytes than there are, and the answer says so is right
	WrongRange                  // 206 with the bytes from one further on
	Short                       // 206 with the beginning of what was asked for, as the standard allows
	RefuseRange                 // 416, whatever range was asked for
	Expire                      // 401: the token ends at this request
	Stale                       // with Elsewhere: a link that has expired already
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
	r.uploadFaults = nil
	close(r.healed)
	r.healed = make(chan struct{})
}

// fault draws the fault that spoils this request for a blob, and counts the request; the
// zero Fault is none.
func (r *Registry) fault(d fleet.Digest) (Fault, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts.Requests[d]++
	key := r.faultKey(d)
	list := r.faults[key]
	f := take(&list)
	r.faults[key] = list
	return f, r.healed
}

// linkFault draws the next fault if it is one of handing out a link.
func (r *Registry) linkFault(d fleet.Digest) Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := r.faultKey(d)
	if list := r.faults[key]; len(list) > 0 && list[0].Kind == Stale {
		f := take(&list)
		r.faults[key] = list
		return f
	}
	return Fault{}
}

// faultKey is where a blob's faults are; r.mu is held.
func (r *Registry) faultKey(d fleet.Digest) fleet.Digest {
	if len(r.faults[d]) == 0 {
		return ""
	}
	return d
}

// take takes the first fault of a list, which goes from it when it has spoilt enough.
func take(list *[]*Fault) Fault {
	if len(*list) == 0 {
		return Fault{}
	}
	f := (*list)[0]
	drawn := *f
	if f.Times > 0 {
		if f.Times--; f.Times == 0 {
			*list = (*list)[1:]
		}
	}
	return drawn
}

// refuse answers as Refuse does.
func (f Fault) refuse(w http.ResponseWriter) {
	if f.RetryAfter != "" {
		w.Header().Set("Retry-After", f.RetryAfter)
	}
	refuse(w, f.Status, "UNKNOWN", fmt.Sprintf("status %d by order", f.Status))
}

// blob answers for a blob, as its fault wants it.
func (r *Registry) blob(w http.ResponseWriter, req *http.Request, repository string, d fleet.Digest) {
	data, ok := r.content(repository, d)
	if ok && r.redirect(w, d) {
		return
	}
	f, healed := r.fault(d)
	switch {
	case f.Kind == Redirect:
		http.Redirect(w, req, f.Location, http.StatusTemporaryRedirect)
	case f.Kind == Expire:
		r.expire(w, req, repository)
	case f.Kind == Refuse:
		f.refuse(w)
	case !ok:
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "no such blob")
	default:
		r.serve(w, req, d, f, healed, data)
	}
}
