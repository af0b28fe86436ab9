package image

import (
	"bytes"
	"encoding/json"
	"errors"
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
		return nil, fmt.Errorf("manifest: %w %.120q", ErrUnknownMediaType, kind)
	}
	type plain Document // without its layers, which are read with a bound
	doc := struct {
		*plain
		Layers descriptors `json:"layers"`
	}{plain: &plain{Raw: raw, Digest: DigestOf(raw)}}
	if err := unmarshal(raw, &doc, "manifest"); err != nil {
		return nil, err
	}
	if len(doc.Layers) == 0 {
		return nil, fmt.Errorf("%w: the manifest has no layers", ErrMalformed)
	}
	doc.plain.Layers = doc.Layers
	return (*Document)(doc.plain), nil
}

// descriptors are at most MaxLayers: what a manifest's 4 MiB could hold of empty ones
// would fill a hundred times that in memory before anyone could count them.
type descriptors []Descriptor

// UnmarshalJSON implements json.Unmarshaler.
func (l *descriptors) UnmarshalJSON(raw []byte) error {
	*l = nil
	if string(raw) == "null" {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	if open, err := dec.Token(); err != nil || open != json.Delim('[') {
		return fmt.Errorf("%.20q where a list of descriptors belongs", raw)
	}
	for dec.More() {
		if len(*l) == MaxLayers {
			return fmt.Errorf("%w: a list of more than %d layers or entries", ErrTooLarge, MaxLayers)
		}
		var d Descriptor
		if err := dec.Decode(&d); err != nil {
			return err
		}
		*l = append(*l, d)
	}
	return nil
}

// unmarshal reads JSON; what is wrong with it is ErrMalformed, unless it is ErrTooLarge.
func unmarshal(raw []byte, into any, what string) error {
	err := json.Unmarshal(raw, into)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrTooLarge):
		return fmt.Errorf("%s: %w", what, err)
	default:
		return fmt.Errorf("%w: %s: %.200s", ErrMalformed, what, err.Error()) // it may quote a number of a megabyte
	}
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
		Manifests descriptors `json:"manifests"`
	}
	if err := unmarshal(raw, &index, "index"); err != nil {
		return "", true, err
	}
	switch n := len(index.Manifests); n {
	case 0:
		return "", true, fmt.Errorf("%w: it has no entries, so that there is nothing to pull", ErrIndex)
	case 1:
	default:
		return "", true, fmt.Errorf("%w: it has %d entries, so name the digest of the one that is meant", ErrIndex, n)
	}
	single := index.Manifests[0]
	if single.MediaType == MediaTypeIndex || single.MediaType == mediaTypeDockerList {
		return "", true, fmt.Errorf("%w: its entry is an index again; name the digest of the image that is meant", ErrIndex)
	}
	if err := fleet.CheckDigest(single.Digest); err != nil {
		return "", true, fmt.Errorf("%w: index entry: %w (sha256 is the only algorithm known here)", ErrMalformed, err)
	}
	return single.Digest, true, nil
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
	if err := unmarshal(raw, &probe, "manifest"); err != nil {
		return "", err
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
