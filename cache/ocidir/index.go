package ocidir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

const (
	markerFile = "oci-layout"
	indexFile  = "index.json"
	marker     = `{"imageLayoutVersion":"1.0.0"}`

	// annotationRef is OCI's name for what an entry of the index is called. Here it is the
	// whole reference, host and all: a layout holds images of several registries.
	annotationRef = "org.opencontainers.image.ref.name"

	// maxIndexBytes bounds index.json: some ten thousand images.
	maxIndexBytes = 4 << 20
)

// Entry is an image of the layout.
type Entry struct {
	Ref    string // host/repository:tag; empty: it has only its digest
	Digest fleet.Digest
	Size   int64 // bytes of the manifest
}

// index is index.json. What is not ours in it is kept as it is.
type index struct {
	fields  map[string]json.RawMessage
	entries []json.RawMessage // as they came, in order
	parsed  []image.Descriptor
}

// parseIndex reads index.json; raw may be empty, which is an index of nothing.
func parseIndex(raw []byte) (*index, error) {
	x := &index{fields: map[string]json.RawMessage{
		"schemaVersion": json.RawMessage("2"),
		"mediaType":     json.RawMessage(`"` + image.MediaTypeIndex + `"`),
	}}
	if len(raw) == 0 {
		return x, nil
	}
	if err := json.Unmarshal(raw, &x.fields); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", image.ErrMalformed, indexFile, err)
	}
	if x.fields == nil {
		return nil, fmt.Errorf("%w: %s is null", image.ErrMalformed, indexFile)
	}
	if list := x.fields["manifests"]; list != nil {
		if err := json.Unmarshal(list, &x.entries); err != nil {
			return nil, fmt.Errorf("%w: %s: manifests: %w", image.ErrMalformed, indexFile, err)
		}
	}
	for i, entry := range x.entries {
		var d image.Descriptor
		if err := json.Unmarshal(entry, &d); err != nil {
			return nil, fmt.Errorf("%w: %s: manifest %d: %w", image.ErrMalformed, indexFile, i, err)
		}
		if err := fleet.CheckDigest(d.Digest); err != nil {
			return nil, fmt.Errorf("%w: %s: manifest %d: %w", image.ErrMalformed, indexFile, i, err)
		}
		x.parsed = append(x.parsed, d)
	}
	return x, nil
}

// put gives a reference to an image, and takes it from the one that had it.
func (x *index) put(ref string, d image.Descriptor) error {
	d.Annotations = map[string]string{annotationRef: ref}
	entry, err := json.Marshal(d)
	if err != nil {
		return err
	}
	var entries []json.RawMessage
	var parsed []image.Descriptor
	for i, old := range x.parsed {
		if old.Annotations[annotationRef] != ref {
			entries, parsed = append(entries, x.entries[i]), append(parsed, old)
		}
	}
	x.entries, x.parsed = append(entries, entry), append(parsed, d)
	return nil
}

// marshal is index.json again.
func (x *index) marshal() ([]byte, error) {
	list, err := json.Marshal(x.entries)
	if err != nil {
		return nil, err
	}
	x.fields["manifests"] = list
	return json.Marshal(x.fields)
}

// Resolve finds the image that a reference names: by its digest if it has one, else by
// the whole of it, host, repository and tag.
func (l *Layout) Resolve(ctx context.Context, ref string) (fleet.Digest, error) {
	r, err := image.ParseReference(ref)
	if err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	if r.Digest() != "" {
		_, err := l.Manifest(ctx, ref, r.Digest())
		return r.Digest(), err
	}
	entries, err := l.List(ctx)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if e.Ref == r.String() {
			return e.Digest, nil
		}
	}
	return "", &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("the image layout %s has no %s; push it there first", l.dir, r)}
}

// List returns the images of the layout, in the order of its index.
func (l *Layout) List(ctx context.Context) ([]Entry, error) {
	x, err := l.index(ctx)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, 0, len(x.parsed))
	for _, d := range x.parsed {
		entries = append(entries, Entry{Ref: d.Annotations[annotationRef], Digest: d.Digest, Size: d.Size})
	}
	return entries, nil
}

// index reads index.json.
func (l *Layout) index(ctx context.Context) (*index, error) {
	var raw []byte
	err := l.do(ctx, func() (err error) {
		raw, err = l.readFile(filepath.Join(l.dir, indexFile), maxIndexBytes)
		return err
	})
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(err, fs.ErrNotExist):
		return nil, l.gone(err)
	default:
		return nil, l.network(err)
	}
	x, err := parseIndex(raw)
	if err != nil {
		return nil, &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("image layout %s: %w", l.dir, err)}
	}
	return x, nil
}
