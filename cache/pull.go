package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// errAgain ends a work whose outcome says nothing to those who waited for it.
var errAgain = errors.New("look again")

// Pull returns when image h.Digest is ready here, or with an error: an *Error, or ctx's.
// Calls for the same image share the work; when the caller that does it goes, another
// takes over. After a failure, the same error comes back without a try until its RetryAt.
// What was fetched is kept on disk through errors, cancellation and crashes.
func (s *Store) Pull(ctx context.Context, h fleet.Hold) error {
	if err := fleet.CheckDigest(h.Digest); err != nil {
		return &Error{Class: ClassFormat, Err: err}
	}
	if _, err := image.ParseReference(h.Ref); err != nil {
		return &Error{Class: ClassFormat, Image: h.Digest, Err: err}
	}
	e := s.call(h)
	defer s.hangUp(e, h)
	for {
		w, mine, err := s.claim(e, h)
		switch {
		case err != nil:
			return err
		case w == nil:
			return nil
		case mine:
			return s.work(ctx, e, w, h)
		}
		select {
		case <-w.done:
			if !errors.Is(w.err, errAgain) {
				return w.err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// call notes a caller of Pull, who may make a pull more urgent that is under way.
func (s *Store) call(h fleet.Hold) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entry(h.Digest)
	e.callers++
	if h.Demand {
		e.demand++
	}
	e.priority = max(e.priority, h.Priority)
	s.reorder()
	return e
}

// hangUp is the end of call.
func (s *Store) hangUp(e *entry, h fleet.Hold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.callers--
	if h.Demand {
		e.demand--
	}
	if e.callers == 0 {
		e.priority = 0
		if e.State == gone && s.images[e.Digest] == e {
			delete(s.images, e.Digest)
		}
	}
	s.reorder()
}

// claim looks what there is to do: nothing (no work, no error), wait for the work, or do
// it (mine).
func (s *Store) claim(e *entry, h fleet.Hold) (w *work, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.work != nil {
		return e.work, false, nil
	}
	if e.State == fleet.ImageReady {
		return nil, false, nil
	}
	if e.failed != nil && time.Until(e.failed.RetryAt) > 0 {
		return nil, false, e.failed
	}
	if len(s.sources) == 0 {
		return nil, false, &Error{Class: ClassNetwork, Image: h.Digest, Err: errors.New("this store has no source of images")}
	}
	e.Ref = h.Ref
	e.work = &work{done: make(chan struct{})}
	s.move(e, fleet.ImageQueued)
	return e.work, true, nil
}

// work pulls, and tells all who wait how it ended.
func (s *Store) work(ctx context.Context, e *entry, w *work, h fleet.Hold) error {
	s.mu.Lock()
	t := s.take(e)
	s.mu.Unlock()
	err := s.pull(ctx, e, t, h)
	s.leave(t)

	s.mu.Lock()
	defer s.mu.Unlock()
	e.work = nil
	defer close(w.done)
	switch {
	case err == nil:
		e.failures = 0
		return nil
	case cancelled(ctx, err) && e.State != fleet.ImageVerifying: // which no cancellation ends
		w.err = errAgain
		if s.dir.begun(e.Digest) {
			s.move(e, fleet.ImagePaused)
		} else {
			s.move(e, gone)
		}
		return ctx.Err()
	default:
		failure := s.fail(e, err)
		w.err = failure
		return failure
	}
}

// pull brings one image from wherever it stands to published.
func (s *Store) pull(ctx context.Context, e *entry, t *turn, h fleet.Hold) error {
	if err := s.await(ctx, t); err != nil {
		return err
	}
	if m, err := s.published(e.Digest); m != nil || err != nil {
		if err != nil {
			return diskError(err)
		}
		s.verifying(t)
		return s.arrived(e, m)
	}
	p, err := s.openPartial(h)
	if err != nil {
		return fmt.Errorf("opening the partial image: %w", diskError(err))
	}
	defer p.close()
	f := &fetch{store: s, entry: e, partial: p, turn: t, ref: h.Ref}
	if err := f.manifest(ctx); err != nil {
		return err
	}
	if err := f.disk(ctx); err != nil {
		return fmt.Errorf("making the disk: %w", err)
	}
	s.mu.Lock()
	e.Total = f.image.Bytes()
	s.mu.Unlock()
	// Pieces that are here in part count when they are opened at their mark.
	e.done.Store(p.journal.bytes(f.image, false))
	if err := f.all(ctx); err != nil {
		e.done.Store(p.journal.bytes(f.image, true))
		return err
	}
	s.verifying(t)
	if err := p.seal(f.image, h.Ref); err != nil {
		return err
	}
	if err := s.dir.publish(e.Digest); err != nil {
		return fmt.Errorf("publishing the image: %w", diskError(err))
	}
	return s.arrived(e, f.image)
}

// published returns the manifest of an image that is in its place already, although it is
// not listed: what a pull left that failed after the rename. What is there and is no
// image is removed. nil: nothing is there (any more).
func (s *Store) published(d fleet.Digest) (*image.Manifest, error) {
	m, err := s.inspect(d)
	switch {
	case err == nil:
		return m, s.dir.discard(s.dir.partial(d))
	case unusable(err):
		return nil, s.dir.discard(s.dir.image(d))
	default:
		return nil, fmt.Errorf("looking for the image on disk: %w", err)
	}
}

// arrived lists a published image as ready.
func (s *Store) arrived(e *entry, m *image.Manifest) error {
	size, err := allocated(s.dir.image(e.Digest))
	if err != nil {
		return fmt.Errorf("measuring the image: %w", diskError(err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if from := e.State; !s.move(e, fleet.ImageReady) {
		return fmt.Errorf("the image is on disk, and cannot become ready from %q", from)
	}
	e.DiskBytes, e.ReadyAt = size, time.Now()
	s.log.Info("image ready", "image", e.Digest, "ref", e.Ref, "wire_bytes", m.Bytes(), "disk_bytes", size)
	return nil
}
