package registrytest

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// links are the signed links to the second host.
type links struct {
	base   string // URL of the second host; empty: there is none
	uses   int    // requests that one link is good for; 0: no limit
	left   map[string]int
	of     map[string]fleet.Digest
	made   int
	leaked int
}

// Elsewhere makes the registry redirect every GET of a blob to base, where Storage is
// served, by links that are good for uses requests each (0: until ExpireLinks).
func (r *Registry) Elsewhere(base string, uses int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.links = links{base: base, uses: uses, left: make(map[string]int), of: make(map[string]fleet.Digest)}
}

// ExpireLinks makes every link that was handed out invalid.
func (r *Registry) ExpireLinks() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.links.left)
}

// Links is how many links were handed out since Elsewhere, and how many requests came to
// the second host with credentials or cookies, which are not for it.
func (r *Registry) Links() (made, leaked int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.links.made, r.links.leaked
}

// redirect answers with a link to the second host, which is stale already if the next
// fault says so; false: there is no second host. Other faults are the second host's.
func (r *Registry) redirect(w http.ResponseWriter, d fleet.Digest) bool {
	f := r.linkFault(d)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.links.base == "" {
		return false
	}
	r.links.made++
	id := fmt.Sprint(r.links.made)
	if f.Kind != Stale {
		r.links.left[id], r.links.of[id] = r.links.uses, d
	}
	http.SetCookie(w, &http.Cookie{Name: "session", Value: id})
	w.Header().Set("Location", r.links.base+"/storage?X-Signature="+signature+id)
	w.WriteHeader(http.StatusTemporaryRedirect)
	return true
}

// signature is how every link's signature begins: a secret, for as long as it is good.
const signature = "secret-"

// Storage is the second host.
func (r *Registry) Storage() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		data, d, ok := r.follow(req)
		if !ok {
			// As object stores answer: XML, and 403 whatever is wrong.
			http.Error(w, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", http.StatusForbidden)
			return
		}
		f, healed := r.fault(d)
		if f.Kind == Refuse {
			f.refuse(w)
			return
		}
		r.serve(w, req, d, f, healed, data)
	})
}

// follow uses a link once; false: it is not good, or no longer.
func (r *Registry) follow(req *http.Request) ([]byte, fleet.Digest, bool) {
	id := strings.TrimPrefix(req.URL.Query().Get("X-Signature"), signature)
	r.mu.Lock()
	defer r.mu.Unlock()
	if req.Header.Get("Authorization") != "" || req.Header.Get("Cookie") != "" {
		r.links.leaked++
	}
	left, known := r.links.left[id]
	if !known || r.links.uses > 0 && left <= 0 {
		return nil, "", false
	}
	r.links.left[id]--
	d := r.links.of[id]
	return r.blobs[d].data, d, true
}
