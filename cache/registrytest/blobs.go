package registrytest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// blob is a stored blob.
type blob struct {
	data []byte
	// in is the repositories that have it; "": all, as for what PutBlob stored.
	in map[string]bool
}

// has reports whether a repository has the blob.
func (b *blob) has(repository string) bool { return b != nil && (b.in[""] || b.in[repository]) }

// Pushed is what clients have written.
type Pushed struct {
	Blobs     int   // received in full
	Bytes     int64 // of their bodies, of broken ones too
	Mounts    int   // taken over from another repository
	Known     int   // HEADs of blobs that the repository had
	Manifests int
}

// Pushed returns what was written over HTTP since New or Reset.
func (r *Registry) Pushed() Pushed {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pushed
}

// RefuseMounts makes the registry answer mounts with an upload, as the standard allows.
func (r *Registry) RefuseMounts() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.noMounts = true
}

// BreakUploads makes uploads fail: Drop cuts the connection after At bytes of a body,
// Refuse answers with Status, Expire takes the token back. Heal takes it back.
func (r *Registry) BreakUploads(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.uploadFaults = append(r.uploadFaults, &f)
}

// PutBlob stores a blob, for every repository.
func (r *Registry) PutBlob(_ context.Context, data []byte) (fleet.Digest, error) {
	// A copy, since the caller may reuse data.
	return r.keep("", bytes.Clone(data)), nil
}

// keep stores data in a repository.
func (r *Registry) keep(repository string, data []byte) fleet.Digest {
	d := image.DigestOf(data)
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.blobs[d]
	if b == nil {
		b = &blob{data: data, in: make(map[string]bool)}
		r.blobs[d] = b
	}
	b.in[repository] = true
	return d
}

// content is a blob of a repository; false: it has none.
func (r *Registry) content(repository string, d fleet.Digest) ([]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.blobs[d]
	if !b.has(repository) {
		return nil, false
	}
	return b.data, true
}

// stat answers a HEAD.
func (r *Registry) stat(w http.ResponseWriter, repository string, d fleet.Digest) {
	data, ok := r.content(repository, d)
	if !ok {
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "no such blob")
		return
	}
	r.mu.Lock()
	r.pushed.Known++
	r.mu.Unlock()
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	w.Header().Set("Docker-Content-Digest", string(d))
	w.WriteHeader(http.StatusOK)
}

// write stores a manifest, if the repository has all that it names.
func (r *Registry) write(w http.ResponseWriter, req *http.Request, repository string) {
	raw, err := io.ReadAll(req.Body)
	if err != nil {
		return // the client has gone
	}
	if missing := r.missing(repository, raw); len(missing) > 0 {
		refuse(w, http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", fmt.Sprint("the repository has no ", missing))
		return
	}
	req.Body = io.NopCloser(bytes.NewReader(raw))
	r.mu.Lock()
	r.pushed.Manifests++
	r.mu.Unlock()
	r.inner.ServeHTTP(w, req)
}

// missing is the blobs that a manifest names and a repository does not have.
func (r *Registry) missing(repository string, raw []byte) []fleet.Digest {
	doc, err := image.ParseDocument(raw)
	if err != nil {
		return nil // the inner registry judges it
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	missing := make(map[fleet.Digest]bool)
	for _, d := range append(slices.Clone(doc.Layers), doc.Config) {
		if !r.blobs[d.Digest].has(repository) {
			missing[d.Digest] = true
		}
	}
	return slices.Sorted(maps.Keys(missing))
}

// refuse answers with an error as the standard words it.
func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}
