package image

import (
	"encoding/json"
	"fmt"

	"github.com/paddock-ci/paddock/fleet"
)

// The media types of OCI (image-spec v1.1) and their Docker twins.
const (
	MediaTypeManifest       = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeIndex          = "application/vnd.oci.image.index.v1+json"
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// AcceptedTypes is what to ask a registry for: manifests, and indexes to be followed.
var AcceptedTypes = []string{MediaTypeManifest, MediaTypeIndex, mediaTypeDockerManifest, mediaTypeDockerList}

// Descriptor is OCI's pointer to a blob.
type Descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      fleet.Digest      `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Blob is the descriptor without its annotations.
func (d Descriptor) Blob() Blob {
	return Blob{Digest: d.Digest, Size: d.Size, MediaType: d.MediaType}
}

// Document is an OCI image manifest, before a codec made sense of it.
type Document struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Config        Descriptor        `json:"config"`
	Layers        []Descriptor      `json:"layers"`
	Annotations   map[string]string `json:"annotations,omitempty"`

	Raw    []byte       `json:"-"`
	Digest fleet.Digest `json:"-"` // of Raw
}

// ParseDocument reads an OCI image manifest. An index gives ErrIndex: follow it first
// with IndexEntry.
func ParseDocument(raw []byte) (*Document, error) {
	kind, err := mediaType(raw)
	if err != nil {
		return nil, err
	}
	switch kind {
	case MediaTypeManifest, mediaTypeDockerManifest:
	case MediaTypeIndex, mediaTypeDockerList:
		return nil, fmt.Errorf("%w: name the digest of the entry that is meant", ErrIndex)
	default:
		return nil, fmt.Errorf("manifest: %w %q", ErrUnknownMediaType, kind)
	}
	doc := &Document{Raw: raw, Digest: DigestOf(raw)}
	if err := json.Unmarshal(raw, doc); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrMalformed, err)
	}
	if len(doc.Layers) == 0 {
		return nil, fmt.Errorf("%w: the manifest has no layers", ErrMalformed)
	}
	if len(doc.Layers) > MaxLayers {
		return nil, fmt.Errorf("%w: %d layers, at most %d are read", ErrTooLarge, len(doc.Layers), MaxLayers)
	}
	return doc, nil
}

// IndexEntry looks for an index of images. If raw is one, ok is true and entry is its
// single image; an index with none or several is an error, since nothing in it says
// which one is meant.
func IndexEntry(raw []byte) (entry fleet.Digest, ok bool, err error) {
	kind, err := mediaType(raw)
	if err != nil {
		return "", false, err
	}
	if kind != MediaTypeIndex && kind != mediaTypeDockerList {
		return "", false, nil
	}
	var index struct {
		Manifests []Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &index); err != nil {
		return "", true, fmt.Errorf("%w: index: %w", ErrMalformed, err)
	}
	if n := len(index.Manifests); n != 1 {
		return "", true, fmt.Errorf("%w: it has %d entries, so name the digest of the one that is meant", ErrIndex, n)
	}
	entry = index.Manifests[0].Digest
	if err := fleet.CheckDigest(entry); err != nil {
		return "", true, fmt.Errorf("%w: index entry: %w", ErrMalformed, err)
	}
	return entry, true, nil
}

// mediaType finds out what raw is; by its shape if it does not say, since the field is
// optional in OCI.
func mediaType(raw []byte) (string, error) {
	if len(raw) > MaxManifestBytes {
		return "", fmt.Errorf("%w: manifest of %d bytes, at most %d are read", ErrTooLarge, len(raw), MaxManifestBytes)
	}
	var probe struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &probe); err != nil {
		return "", fmt.Errorf("%w: manifest: %w", ErrMalformed, err)
	}
	if probe.SchemaVersion != 2 {
		return "", fmt.Errorf("%w: manifest schema version %d, want 2", ErrMalformed, probe.SchemaVersion)
	}
	switch {
	case probe.MediaType != "":
		return probe.MediaType, nil
	case probe.Manifests != nil:
		return MediaTypeIndex, nil
	default:
		return MediaTypeManifest, nil
	}
}
