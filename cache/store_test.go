package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// shelf is a Source in memory, for tests in virtual time: nothing in it waits but for
// the test's own channels.
type shelf struct {
	mu    sync.Mutex
	blobs map[fleet.Digest][]byte
	asked []fleet.Digest
	fail  error
	// gate, if there is one for a blob, is waited for in the middle of its body, after
	// its digest was sent to reached.
	gate    map[fleet.Digest]chan struct{}
	reached chan fleet.Digest
}

func newShelf() *shelf {
	return &shelf{blobs: map[fleet.Digest][]byte{}, gate: map[fleet.Digest]chan struct{}{}, reached: make(chan fleet.Digest, 100)}
}

func (s *shelf) get(d fleet.Digest) ([]byte, chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, d)
	data, ok := s.blobs[d]
	if s.fail != nil {
		return nil, nil, s.fail
	}
	if !ok {
		return nil, nil, &Error{Class: ClassNotFound, Err: fmt.Errorf("no blob %s", d)}
	}
	return data, s.gate[d], nil
}

func (s *shelf) Manifest(_ context.Context, _ string, d fleet.Digest) ([]byte, error) {
	data, _, err := s.get(d)
	return data, err
}

func (s *shelf) Name() string { return "shelf" }

func (s *shelf) Kind() Kind { return KindRegistry }

func (s *shelf) Has(w Want) (int64, bool) { return w.Chunk.BlobSize, true }

func (s *shelf) Open(ctx context.Context, w Want, from int64) (io.ReadCloser, error) {
	data, gate, err := s.get(w.Chunk.Blob)
	if err != nil {
		return nil, err
	}
	data = data[from:]
	if gate == nil {
		return io.NopCloser(bytes.NewReader(data)), nil
	}
	half := len(data) / 2
	wait := readerFunc(func([]byte) (int, error) {
		s.reached <- w.Chunk.Blob
		select {
		case <-gate:
			return 0, io.EOF
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	})
	return io.NopCloser(io.MultiReader(bytes.NewReader(data[:half]), wait, bytes.NewReader(data[half:]))), nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// letter is the content of a chunk: 64 KiB of noise, or of zeros.
func letter(c rune) []byte {
	chunk := make([]byte, 64<<10)
	if c != '0' {
		_, _ = rand.NewChaCha8([32]byte{byte(c), byte(c >> 8), 1}).Read(chunk) // never fails
	}
	return chunk
}

// put makes an image of chunks of 64 KiB, one for each letter.
func (s *shelf) put(t *testing.T, pattern string) (fleet.Hold, *image.Manifest) {
	t.Helper()
	var disk []byte
	for _, c := range pattern {
		disk = append(disk, letter(c)...)
	}
	raw, err := tart.Build(t.Context(), tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux"}, NVRAM: []byte(pattern), Disk: bytes.NewReader(disk), ChunkSize: 64 << 10,
	}, func(_ context.Context, l tart.Layer) (err error) {
		s.blobs[l.Digest], err = l.Bytes()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	d := image.DigestOf(raw)
	s.blobs[d] = raw
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	if err != nil {
		t.Fatal(err)
	}
	return fleet.Hold{Digest: d, Ref: "registry.example/base:" + d.Short()}, m
}

// hold makes a blob wait in its middle; the returned function lets it go.
func (s *shelf) hold(d fleet.Digest) func() {
	gate := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate[d] = gate
	return sync.OnceFunc(func() { close(gate) })
}

func openShelf(t *testing.T, s *shelf) *Store {
	t.Helper()
	store, err := Open(Config{Dir: t.TempDir(), Sources: []Source{s}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return store
}

func (s *Store) state(d fleet.Digest) fleet.ImageState {
	for _, i := range s.List() {
		if i.Digest == d {
			return i.State
		}
	}
	return gone
}

// Four images are wanted: two pre-warms, the second of a higher priority, then two that
// jobs wait for. Each pre-warm pauses in the middle of a chunk for what is more urgent;
// the demand pulls go in their order, then the pre-warm of the higher priority, then the
// first goes on where it was.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		store := openShelf(t, shelf)
		var pulls sync.WaitGroup
		release := map[string]func(){}
		digest := map[string]fleet.Digest{}
		begin := func(pattern string, priority int, demand bool) {
			h, m := shelf.put(t, pattern)
			h.Priority, h.Demand = priority, demand
			release[pattern], digest[pattern] = shelf.hold(m.Chunks[0].Blob), h.Digest
			pulls.Go(func() {
				if err := store.Pull(t.Context(), h); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		expect := func(want map[string]fleet.ImageState) {
			t.Helper()
			synctest.Wait()
			for pattern, state := range want {
				if got := store.state(digest[pattern]); got != state {
					t.Errorf("%s is %q; want %q", pattern, got, state)
				}
			}
		}
		begin("A", 1, false)
		begin("B", 2, false)
		expect(map[string]fleet.ImageState{"A": fleet.ImagePaused, "B": fleet.ImageCaching})
		begin("C", 0, true)
		begin("D", 0, true)
		expect(map[string]fleet.ImageState{"A": fleet.ImagePaused, "B": fleet.ImagePaused, "C": fleet.ImageCaching, "D": fleet.ImageQueued})
		// What a paused one waits for comes, and it moves no byte for it.
		release["A"]()
		expect(map[string]fleet.ImageState{"A": fleet.ImagePaused, "B": fleet.ImagePaused, "C": fleet.ImageCaching})
		release["C"]()
		expect(map[string]fleet.ImageState{"A": fleet.ImagePaused, "B": fleet.ImagePaused, "C": fleet.ImageReady, "D": fleet.ImageCaching})
		release["D"]()
		expect(map[string]fleet.ImageState{"A": fleet.ImagePaused, "B": fleet.ImageCaching, "D": fleet.ImageReady})
		release["B"]()
		expect(map[string]fleet.ImageState{"A": fleet.ImageReady, "B": fleet.ImageReady})
		pulls.Wait()
	})
}

// A job that begins to wait for an image that is being pre-warmed makes it a demand pull.
func TestDemandJoinsPrewarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		store := openShelf(t, shelf)
		first, m1 := shelf.put(t, "A")
		second, m2 := shelf.put(t, "B")
		first.Priority = 9
		free1, free2 := shelf.hold(m1.Chunks[0].Blob), shelf.hold(m2.Chunks[0].Blob)
		var pulls sync.WaitGroup
		for _, h := range []fleet.Hold{first, second, {Digest: second.Digest, Ref: second.Ref, Demand: true}} {
			pulls.Go(func() {
				if err := store.Pull(t.Context(), h); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		if a, b := store.state(first.Digest), store.state(second.Digest); a != fleet.ImagePaused || b != fleet.ImageCaching {
			t.Errorf("the pre-warm is %q, the wanted one %q; want paused, caching", a, b)
		}
		free1()
		free2()
		pulls.Wait()
	})
}

// After a failure, the same error comes back without a request until its time; waits
// double, and a success forgets them.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		store := openShelf(t, shelf)
		h, _ := shelf.put(t, "A0B")
		shelf.fail = &Error{Class: ClassAuth, Err: errors.New("no entry")}
		wait := 5 * time.Second
		for range 8 {
			var failure *Error
			if err := store.Pull(t.Context(), h); !errors.As(err, &failure) || failure.Class != ClassAuth {
				t.Fatalf("got %v; want class auth", err)
			}
			if got := time.Until(failure.RetryAt); got != min(wait, 320*time.Second) {
				t.Errorf("may be tried again after %s; want %s", got, min(wait, 320*time.Second))
			}
			asked := len(shelf.asked)
			if err := store.Pull(t.Context(), h); !errors.Is(err, failure) || len(shelf.asked) != asked {
				t.Errorf("before that, got %v after %d requests; want the same error and none", err, len(shelf.asked)-asked)
			}
			if i := store.List()[0]; i.State != fleet.ImageFailed || i.Class != "auth" || i.Error != "fetching the manifest: no entry" || !i.RetryAt.Equal(failure.RetryAt) {
				t.Errorf("listed as %+v", i)
			}
			time.Sleep(time.Until(failure.RetryAt))
			wait *= 2
		}
		shelf.fail = nil
		if err := store.Pull(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		if i := store.List()[0]; i.State != fleet.ImageReady || i.Class != "" || i.Error != "" || !i.RetryAt.IsZero() {
			t.Errorf("listed as %+v", i)
		}
	})
}

// Changed tells of every state, and of bytes at most twice a second.
func TestChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		store := openShelf(t, shelf)
		h, m := shelf.put(t, "A")
		free := shelf.hold(m.Chunks[0].Blob)
		var seen []fleet.ImageState
		ended := make(chan struct{})
		watch := make(chan struct{})
		changed := store.Changed()
		go func() {
			defer close(watch)
			for {
				select {
				case <-changed:
				case <-ended:
					return
				}
				changed = store.Changed()
				if s := store.state(h.Digest); len(seen) == 0 || seen[len(seen)-1] != s {
					seen = append(seen, s)
				}
			}
		}()
		go func() {
			<-shelf.reached
			time.Sleep(time.Second)
			free()
		}()
		if err := store.Pull(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		close(ended)
		<-watch
		if len(seen) == 0 || seen[len(seen)-1] != fleet.ImageReady {
			t.Errorf("the watcher saw %v; want ready at the end", seen)
		}
	})
}

// The table of moves is closed: each state can be reached, and each but gone is left.
func TestMoves(t *testing.T) {
	reached := map[fleet.ImageState]bool{}
	for from, list := range moves {
		if len(list) == 0 {
			t.Errorf("%q is never left", from)
		}
		for _, to := range list {
			reached[to] = true
			if _, ok := moves[to]; !ok {
				t.Errorf("%q goes to %q, which is not in the table", from, to)
			}
		}
	}
	for state := range moves {
		if !reached[state] {
			t.Errorf("%q is never reached", state)
		}
	}
	store := openShelf(t, newShelf())
	store.mu.Lock()
	defer store.mu.Unlock()
	e := store.entry("sha256:x")
	if store.move(e, fleet.ImageVerifying); e.State != gone {
		t.Errorf("a move that is not in the table went to %q", e.State)
	}
}

// Two processes on one store are kept apart.
func TestLock(t *testing.T) {
	store := openShelf(t, newShelf())
	_, err := Open(Config{Dir: string(store.dir)})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("got %v; want %v with the process's number", err, ErrInUse)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(Config{Dir: string(store.dir)})
	if err != nil {
		t.Fatal(err)
	}
	if free, err := again.Free(); err != nil || free <= 0 {
		t.Errorf("%d bytes free, %v", free, err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRefusals(t *testing.T) {
	for _, cfg := range []Config{{}, {Dir: t.TempDir(), Streams: -1}, {Dir: t.TempDir(), Backoff: -1}} {
		if s, err := Open(cfg); err == nil {
			_ = s.Close()
			t.Errorf("%+v was accepted", cfg)
		}
	}
}
