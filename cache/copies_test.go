package cache

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// of makes an image with a VM config and NVRAM of its own, so that its chunks are all that
// is reused.
func (s *shelf) of(t *testing.T, name, letters string) fleet.Hold {
	t.Helper()
	var chunks [][]byte
	for _, l := range letters {
		chunks = append(chunks, letter(l))
	}
	return s.assemble(t, []byte(`{"version":1,"os":"linux","name":"`+name+`"}`), []byte("NVRAM of "+name), chunks...)
}

// parsed is the manifest of an image on the shelf.
func (s *shelf) parsed(t *testing.T, h fleet.Hold) *image.Manifest {
	t.Helper()
	m, _, err := image.Parse(s.blobs[h.Digest], Formats())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// busy takes all the slots of a store, as if other chunks were copied.
func busy(s *Store) (free func()) {
	for range copiesAtOnce {
		s.copies <- struct{}{}
	}
	return func() {
		for range copiesAtOnce {
			<-s.copies
		}
	}
}

// A pre-warm has queued its local copies when a job's pull comes, which has some, too. They
// had to wait for all of the pre-warm's, although it was paused.
func TestCopiesOfAPausedPullWentAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		s := openShelf(t, shelf)
		base, pre, dem := shelf.of(t, "base", "ABCDEFGH"), shelf.of(t, "pre", "PABCDEFGH"), shelf.of(t, "dem", "XAB")
		if err := s.Pull(t.Context(), base); err != nil {
			t.Fatal(err)
		}
		m := shelf.parsed(t, dem)
		gate := shelf.hold(m.Chunks[0].Blob)
		free := busy(s)
		ended := make(chan error, 2)
		go func() { ended <- s.Pull(t.Context(), pre) }()
		synctest.Wait()
		dem.Demand = true
		go func() { ended <- s.Pull(t.Context(), dem) }()
		synctest.Wait()
		free()
		synctest.Wait() // for what may be copied now
		if got, want := s.Moved()[reusedName], m.Chunks[1].BlobSize+m.Chunks[2].BlobSize; got != want {
			t.Errorf("%d bytes were reused while the job's pull is under way; want its %d", got, want)
		}
		if a, b := s.state(pre.Digest), s.state(dem.Digest); a != fleet.ImagePaused || b != fleet.ImageCaching {
			t.Errorf("the pre-warm is %s, the job's pull %s", a, b)
		}
		gate()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}

// A pull is paused in the middle of a copy: it gives its slot to the one that is wanted more,
// and goes on later.
func TestCopyGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		s := openShelf(t, shelf)
		turns := make([]*turn, 2)
		for i, name := range []string{"pre", "dem"} {
			s.mu.Lock()
			e := s.entry(shelf.of(t, name, "A").Digest)
			s.move(e, fleet.ImageQueued)
			e.demand = i
			turns[i] = s.take(e)
			s.mu.Unlock()
		}
		s.leave(turns[1])
		c := &slot{fetch: &fetch{store: s, turn: turns[0]}}
		if err := errors.Join(c.take(t.Context()), c.keep(t.Context())); err != nil || len(s.copies) != 1 {
			t.Fatalf("%d slots are taken: %v", len(s.copies), err)
		}
		s.mu.Lock()
		s.move(turns[1].entry, fleet.ImageQueued)
		second := s.take(turns[1].entry)
		s.mu.Unlock()
		kept := make(chan error, 1)
		go func() { kept <- c.keep(t.Context()) }()
		synctest.Wait()
		if len(s.copies) != 0 || len(kept) != 0 {
			t.Errorf("a paused pull keeps %d slots", len(s.copies))
		}
		s.leave(second)
		if err := <-kept; err != nil || len(s.copies) != 1 {
			t.Errorf("it goes on with %d slots, %v", len(s.copies), err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.keep(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("it goes on when nobody wants it: %v", err)
		}
		c.free()
		c.free() // again
		if s.leave(turns[0]); len(s.copies) != 0 {
			t.Errorf("%d slots are taken at the end", len(s.copies))
		}
	})
}

// Twenty chunks are here already. Each was opened before it was its turn to be copied, and
// when no more files could be opened, the rest was fetched. Now none is open that is not
// copied, and a shortage fails the pull, which is tried again.
func TestCopiesOpenedTooManyFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		s := openShelf(t, shelf)
		base, next := shelf.of(t, "base", alphabet(0, 20)), shelf.of(t, "next", alphabet(0, 20)+"X")
		if err := s.Pull(t.Context(), base); err != nil {
			t.Fatal(err)
		}
		free := busy(s)
		ended := make(chan error, 1)
		go func() { ended <- s.Pull(t.Context(), next) }()
		synctest.Wait()
		s.mu.Lock()
		if n := s.images[base.Digest].pins; n != 0 {
			t.Errorf("%d chunks are open that wait for their turn", n)
		}
		s.mu.Unlock()
		shelf.mu.Lock()
		shelf.asked = nil
		shelf.mu.Unlock()
		restore := noMoreFiles(t)
		free()
		err := <-ended
		restore()
		if ClassOf(err) != ClassDisk || !strings.Contains(err.Error(), "let this process open more files") {
			t.Errorf("pulled with %v", err)
		}
		if len(shelf.asked) != 0 {
			t.Errorf("asked for %d things that are here", len(shelf.asked))
		}
	})
}

// noMoreFiles keeps this process from opening files.
func noMoreFiles(t *testing.T) (restore func()) {
	t.Helper()
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	none := before
	none.Cur = 0
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
			t.Fatal(err)
		}
	}
}

// An import fails while it publishes, and its caller goes: it stayed verifying for ever.
func TestImportStayedVerifying(t *testing.T) {
	s := openShelf(t, newShelf())
	e, w, err := s.beginImport(image.DigestOf([]byte("x")), "registry.example/base:x")
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.move(e, fleet.ImageVerifying)
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.endImport(ctx, e, w, diskError(syscall.EIO)); ClassOf(err) != ClassDisk {
		t.Errorf("the import ended with %v", err)
	}
	if state := s.state(e.Digest); state != fleet.ImageFailed {
		t.Errorf("it is %s", state)
	}
}

// An import failed when its image was in its place already: the next one could not put it
// there again.
func TestImportOfWhatIsPublished(t *testing.T) {
	shelf := newShelf()
	s := openShelf(t, shelf)
	h, _ := shelf.put(t, "AB")
	if err := s.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.images[h.Digest].State = fleet.ImageFailed
	s.mu.Unlock()
	if _, err := s.Import(t.Context(), s.dir.image(h.Digest), h.Ref, nil); err != nil || s.state(h.Digest) != fleet.ImageReady {
		t.Errorf("it is %s, %v", s.state(h.Digest), err)
	}
}
