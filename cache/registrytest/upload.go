package registrytest

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// upload is one under way; it is used by one request at a time.
type upload struct {
	repository string
	data       bytes.Buffer
}

// upload answers POST, PATCH and PUT below …/blobs/uploads/: whole bodies and pieces.
func (r *Registry) upload(w http.ResponseWriter, req *http.Request, repository, id string) {
	if req.Method != http.MethodPost && r.spoil(w, req, repository) {
		return
	}
	digest := fleet.Digest(req.URL.Query().Get("digest"))
	var u *upload
	if req.Method == http.MethodPost {
		if r.mount(w, req, repository) {
			return
		}
		u = &upload{repository: repository}
	} else if u = r.uploads(repository, id); u == nil {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload")
		return
	}
	if at := req.Header.Get("Content-Range"); at != "" && !strings.HasPrefix(at, fmt.Sprintf("%d-", u.data.Len())) {
		refuse(w, http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "the piece does not follow what is here")
		return
	}
	n, err := u.data.ReadFrom(req.Body)
	r.received(n)
	if err != nil {
		return // the client has gone
	}
	if digest == "" {
		r.goOn(w, u, id)
		return
	}
	if got := image.DigestOf(u.data.Bytes()); got != digest {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "the bytes have digest "+string(got))
		return
	}
	r.keep(repository, u.data.Bytes())
	r.mu.Lock()
	delete(r.pending, id)
	r.pushed.Blobs++
	r.mu.Unlock()
	w.Header().Set("Docker-Content-Digest", string(digest))
	w.WriteHeader(http.StatusCreated)
}

// spoil draws a fault for an upload's request, and answers if there is one.
func (r *Registry) spoil(w http.ResponseWriter, req *http.Request, repository string) bool {
	r.mu.Lock()
	f := take(&r.uploadFaults)
	r.mu.Unlock()
	switch f.Kind {
	case Refuse:
		f.refuse(w)
		return true
	case Expire:
		r.expire(w, req, repository)
		return true
	case Drop:
		n, _ := io.CopyN(io.Discard, req.Body, f.At) // that it is cut is the point
		r.received(n)
		panic(http.ErrAbortHandler) // net/http's way to cut the connection
	default:
		return false
	}
}

// goOn keeps an upload and says where its next piece goes: to a new place each time, as
// the standard allows.
func (r *Registry) goOn(w http.ResponseWriter, u *upload, id string) {
	r.mu.Lock()
	delete(r.pending, id)
	r.lastUpload++
	id = fmt.Sprint(r.lastUpload)
	r.pending[id] = u
	r.mu.Unlock()
	w.Header().Set("Location", "/v2/"+u.repository+"/blobs/uploads/"+id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(0, u.data.Len()-1)))
	w.WriteHeader(http.StatusAccepted)
}

// uploads finds an upload.
func (r *Registry) uploads(repository, id string) *upload {
	r.mu.Lock()
	defer r.mu.Unlock()
	if u := r.pending[id]; u != nil && u.repository == repository {
		return u
	}
	return nil
}

// mount takes a blob over from another repository, and answers if it did.
func (r *Registry) mount(w http.ResponseWriter, req *http.Request, repository string) bool {
	d, from := fleet.Digest(req.URL.Query().Get("mount")), req.URL.Query().Get("from")
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.blobs[d]; d == "" || from == "" || r.noMounts || !b.has(from) {
		return false
	}
	r.blobs[d].in[repository] = true
	r.pushed.Mounts++
	w.Header().Set("Docker-Content-Digest", string(d))
	w.WriteHeader(http.StatusCreated)
	return true
}

func (r *Registry) received(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pushed.Bytes += n
}
