package cache

import (
	"context"
	"io"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Kind is what a source is, by what it costs whom.
type Kind string

// The kinds of sources.
const (
	KindRegistry Kind = "registry" // outside the site: its bytes are paid for, and claimed
	KindMirror   Kind = "mirror"   // a registry of the site
	KindStore    Kind = "store"    // an OCI layout on a shared directory
	KindPeer     Kind = "peer"     // another node; gives content, not blobs
)

// Want names one piece of an image: a disk chunk, or its VM config or NVRAM, which are
// chunks whose Content is their Blob and whose Index is negative.
type Want struct {
	Ref   string       // host/repository:tag, as it was ordered
	Image fleet.Digest // of the manifest
	Chunk image.Chunk
}

// Source is a place that images come from. It is safe for concurrent use and retries by
// itself what is worth retrying at once in the same place; its errors are *Error with a
// Class, others count as ClassNetwork. It need not verify digests.
type Source interface {
	// Name is for people, logs, metrics and measured rates: "registry ghcr.io", "peer mac-2".
	Name() string
	Kind() Kind
	// Manifest returns the bytes of manifest d in the repository of ref.
	Manifest(ctx context.Context, ref string, d fleet.Digest) ([]byte, error)
	// Has reports what a whole piece would move over the wire, in bytes, and whether it is
	// there as far as is known without asking over a network.
	Has(w Want) (wire int64, ok bool)
	// Open opens a piece from a byte on, to its end: a byte of its content if this is a
	// peer, else of its blob. The reader picks up a lost connection where it broke.
	Open(ctx context.Context, w Want, from int64) (io.ReadCloser, error)
}

// Site is the other nodes nearby, and who sees to it that a piece comes from outside
// once for all of them.
type Site interface {
	// Ask tells what this node has and does, and returns what it may fetch from outside
	// and who has what. It answers at once.
	Ask(ctx context.Context, a Ask) (Answer, error)
}

// Ask is a node's word on one image that it pulls. Pieces are numbered: disk chunks by
// their Index (the first with that content stands for all), then the NVRAM, then the VM
// config.
type Ask struct {
	Ref      string
	Image    fleet.Digest
	Pieces   int   // in all
	Have     []int // verified, served to peers from now on
	Fetching []int // from outside, with bytes moving: the claims are renewed
	Want     []int // wished from outside, most wanted first
	Insist   []int // wished from outside although peers are said to have them: they failed
	Leave    bool  // the pull has ended: claims are given back
}

// Answer is what the site knows.
type Answer struct {
	Grant []int         // of Want and Insist: claimed for this node, to be fetched from outside
	Peers []Source      // who has what; Source.Has knows
	Again time.Duration // when to ask again, at the latest
}

// Limits bound what a store's pulls may move; zero fields: no limit.
type Limits struct {
	Outside int64 // bytes per second from KindRegistry
	Total   int64 // bytes per second from anywhere
	Streams int   // at once; at most Config.Streams
}
