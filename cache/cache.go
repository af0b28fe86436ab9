// Package cache keeps VM images on this node's disk: it fetches, verifies, shares,
// leases, clones and evicts them.
//
// It knows no jobs and no VMs (a lease has a holder, which is just a name), decides
// neither what to hold nor what to evict (the leader does), and speaks no network
// protocol: bytes come through Sources (cache/registry, cache/ocidir and cache/peer have
// one each) and other nodes are heard of through a Site. Called by node, and by the CLI's
// image commands.
//
// # Layout
//
//	lock                      held (flock) while a process has the store open
//	images/<hex>/             ready images, by the hex of their manifest digest
//	    manifest.json         as the registry gave it, byte for byte
//	    disk.img              the decoded disk; zeros are holes
//	    nvram.bin config.json
//	    image.json            the reference it was ordered by; its mtime is the last use
//	partial/<hex>/            the same while it is being pulled, and
//	    journal               what is finished, and how far the rest is: a line each,
//	                          written after what it speaks of is on disk; see journal
//	leases/<hex>/h-<holder>   one empty file per lease
//	trash/<hex>.<random>      on its way out; emptied at the next start
//
// # Sources
//
// A piece (a distinct chunk that is not zero, the NVRAM, the VM config) goes one way:
//
//	a ready image here has its content  → share its blocks, or copy and verify
//	else the source that has it soonest → decode from a mark, write at all its offsets,
//	                                      note marks, verify both digests, note the end
//
// A disk begins as a clone of the ready image that is closest to it, where that is free.
// The soonest source is that with the least (bytes of the piece + bytes on their way from
// there) / measured rate. One that fails rests, and another goes on at the byte; one that
// refuses the image is left out of its pull. With a Site, a piece comes from outside
// (KindRegistry) only when the site has granted it: else from the node that has it, as
// soon as it has. If the site does not answer, the pull goes on without it.
//
// Pulls take turns: those that jobs wait for, then by priority. One that moves nothing
// for a few seconds is overtaken until it can.
//
// # Recovery
//
// An image is published by fsync of all its files and one rename of its directory from
// partial to images, and leaves by one rename to trash: so at any instant of a crash it
// is there in full or not at all. Partial work is keyed by manifest digest, never by
// tag: a tag that moves cannot mix two images. At the start, ready images and partial
// ones are listed as they are, leases too, and what is neither is removed; a pull goes on
// at the last mark of each piece. A full disk fails the pull and keeps what came.
package cache

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Config says how to open a store.
type Config struct {
	// Dir is made if it does not exist. Its file system should know sparse files, and
	// clones are free if it knows reflinks. Required.
	Dir string
	// Sources are where images come from, the preferred first while nothing is measured.
	// Pull needs one; nil: what is there can be used.
	Sources []Source
	// Site is the other nodes nearby; nil: this one is alone.
	Site Site
	// Codecs are the image formats; nil: Formats.
	Codecs []image.Codec
	// Streams is how many chunks of an image are fetched at once; 0: 8, which was 1.4
	// times faster than 4 against public registries.
	Streams int
	// Backoff is how long after its first failure a pull may be tried again, doubled for
	// each further one up to 64 times that; 0: 5 s.
	Backoff time.Duration
	// Log gets decisions: what was recovered, published, evicted, and failed; nil: none.
	Log *slog.Logger
}

// Store is an image store that this process has locked. It is safe for concurrent use.
type Store struct {
	dir     layout
	sources []Source
	site    Site
	codecs  []image.Codec
	streams int
	backoff time.Duration
	log     *slog.Logger
	lock    *os.File
	meter   meter
	tracks  tracks
	limits  *limits
	copies  chan struct{} // has room for as many as go on at once
	// canShare reports whether files can share their blocks; it is tried once.
	canShare func() bool

	mu       sync.Mutex
	images   map[fleet.Digest]*entry
	turns    []*turn // pulls under way, see reorder
	arrivals int64   // counts them, so that equals go in order
	leases   int64   // counts leases, so that a stale release is told from a live one
	changed  chan struct{}
	told     time.Time // when changed was last closed
}

// Open locks the store, removes what a crash left half done and cannot be resumed, and
// lists the rest. It fails with ErrInUse when another process has it open.
func Open(cfg Config) (*Store, error) {
	if cfg.Dir == "" {
		return nil, errors.New("image store: no directory given; set the cache directory")
	}
	if cfg.Streams < 0 || cfg.Backoff < 0 {
		return nil, fmt.Errorf("image store: streams %d and backoff %s must not be negative", cfg.Streams, cfg.Backoff)
	}
	s := &Store{
		dir: layout(cfg.Dir), sources: cfg.Sources, site: cfg.Site, codecs: cfg.Codecs, streams: cfg.Streams,
		backoff: cfg.Backoff, log: cfg.Log,
		images: make(map[fleet.Digest]*entry), changed: make(chan struct{}),
		tracks: tracks{of: make(map[string]*track), moved: make(map[string]int64)},
		limits: newLimits(), copies: make(chan struct{}, copiesAtOnce),
	}
	s.canShare = sync.OnceValue(s.tryShare)
	if s.codecs == nil {
		s.codecs = Formats()
	}
	if s.streams == 0 {
		s.streams = 8
	}
	if s.backoff == 0 {
		s.backoff = 5 * time.Second
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.dir.make(); err != nil {
		return nil, fmt.Errorf("making the image store: %w", err)
	}
	lock, err := s.dir.lock()
	if err != nil {
		return nil, err
	}
	s.lock = lock
	if err := s.recover(); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("recovering the image store %s: %w", cfg.Dir, err)
	}
	return s, nil
}

// Close unlocks the store. Pulls under way must have ended.
func (s *Store) Close() error { return s.lock.Close() }

// List returns every image that is here or under way, sorted by digest.
func (s *Store) List() []fleet.NodeImage {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]fleet.NodeImage, 0, len(s.images))
	for _, e := range s.images {
		if e.State != "" {
			list = append(list, e.report())
		}
	}
	slices.SortFunc(list, func(a, b fleet.NodeImage) int {
		return strings.Compare(string(a.Digest), string(b.Digest))
	})
	return list
}

// Changed returns a channel that is closed at the next change of List: at once for a
// state or a lease, at most every 500 ms for progress.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// progressEvery is how often at most progress alone wakes those who watch Changed.
const progressEvery = 500 * time.Millisecond

// notify closes Changed's channel; s.mu is held.
func (s *Store) notify() {
	close(s.changed)
	s.changed, s.told = make(chan struct{}), time.Now()
}

// progress notifies of bytes that moved in a turn.
func (s *Store) progress(t *turn, n int64) {
	s.meter.add(n)
	s.mu.Lock()
	s.useful(t)
	s.mu.Unlock()
	s.stir()
}

// stir notifies of progress.
func (s *Store) stir() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.told) >= progressEvery {
		s.notify()
	}
}

// Rate is what recent pulls moved over the wire, in bytes per second; 0: unknown.
func (s *Store) Rate() int64 { return s.meter.value() }

// Free is what the store's file system has left for us, in bytes.
func (s *Store) Free() (int64, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(string(s.dir), &stat); err != nil {
		return 0, fmt.Errorf("asking for the free space of %s: %w", s.dir, err)
	}
	return int64(stat.Bavail) * int64(stat.Bsize), nil
}

// Path is the directory of a ready image, whose files must not be written to.
func (s *Store) Path(d fleet.Digest) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.images[d]; e == nil || e.State != fleet.ImageReady {
		return "", fmt.Errorf("image %s: %w", d.Short(), ErrNotReady)
	}
	return s.dir.image(d), nil
}
