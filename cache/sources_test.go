package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// well is a source in virtual time: its streams share a rate, it has the images of a
// shelf, as blobs or (a peer) as content, and it can fail or hang.
type well struct {
	name    string
	kind    Kind
	shelf   *shelf
	content map[fleet.Digest][]byte // of a peer

	mu     sync.Mutex
	rate   float64 // bytes per second, of all streams together
	open   int
	fail   error         // of every Open and Read
	stall  time.Duration // every Read hangs that long, and fails
	asked  []fleet.Digest
	before func(Want) // called at each Open
}

func newWell(name string, kind Kind, from *shelf, perSecond float64) *well {
	return &well{name: name, kind: kind, shelf: from, rate: perSecond}
}

func (w *well) Name() string { return w.name }
func (w *well) Kind() Kind   { return w.kind }

func (w *well) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *well) Manifest(_ context.Context, _ string, d fleet.Digest) ([]byte, error) {
	raw, ok := w.data(image.Chunk{Blob: d})
	w.mu.Lock()
	defer w.mu.Unlock()
	if !ok && w.fail == nil {
		return nil, &Error{Class: ClassNotFound, Err: errors.New("no such manifest")}
	}
	return raw, w.fail
}

func (w *well) data(c image.Chunk) ([]byte, bool) {
	if w.kind == KindPeer {
		w.mu.Lock()
		defer w.mu.Unlock()
		b, ok := w.content[c.Content]
		return b, ok
	}
	w.shelf.mu.Lock()
	defer w.shelf.mu.Unlock()
	b, ok := w.shelf.blobs[c.Blob]
	return b, ok
}

func (w *well) Has(x Want) (int64, bool) {
	b, ok := w.data(x.Chunk)
	return int64(len(b)), ok
}

func (w *well) Open(ctx context.Context, x Want, from int64) (io.ReadCloser, error) {
	data, ok := w.data(x.Chunk)
	w.mu.Lock()
	w.asked = append(w.asked, x.Chunk.Content)
	fail, before := w.fail, w.before
	w.mu.Unlock()
	if before != nil {
		before(x)
	}
	if fail != nil {
		return nil, fail
	}
	if !ok {
		return nil, &Error{Class: ClassNotFound, Err: errors.New("no such piece")}
	}
	w.set(func() { w.open++ })
	rest := bytes.NewReader(data[from:])
	return bodyOf{readerFunc(func(b []byte) (int, error) { return w.read(ctx, rest, b) }), func() { w.set(func() { w.open-- }) }}, nil
}

func (w *well) read(ctx context.Context, rest *bytes.Reader, b []byte) (int, error) {
	n, err := rest.Read(b[:min(len(b), 16<<10)])
	w.mu.Lock()
	wait, failure := time.Duration(float64(n)*float64(w.open)/w.rate*float64(time.Second)), w.fail
	if w.stall > 0 {
		wait, failure = w.stall, &Error{Class: ClassNetwork, Err: fmt.Errorf("no byte came for %s", w.stall)}
	}
	w.mu.Unlock()
	if !pause(ctx, wait) {
		return 0, ctx.Err()
	}
	if failure != nil {
		return 0, failure
	}
	return n, err
}

type bodyOf struct {
	io.Reader
	close func()
}

func (b bodyOf) Close() error { b.close(); return nil }

func (w *well) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.asked)
}

// lend gives a peer the contents of an image.
func (w *well) lend(pattern string) *well {
	w.content = make(map[fleet.Digest][]byte)
	for _, c := range pattern {
		b := letter(c)
		w.content[image.DigestOf(b)] = b
	}
	return w
}

// openWells opens a store on sources.
func openWells(t *testing.T, cfg Config, wells ...*well) *Store {
	t.Helper()
	cfg.Dir = t.TempDir()
	for _, w := range wells {
		cfg.Sources = append(cfg.Sources, w)
	}
	store, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// alphabet is an image of n chunks that all differ; another script has others.
func alphabet(script, n int) string {
	var letters []rune
	for i := range n {
		letters = append(letters, rune(0x100*(script+1)+i))
	}
	return string(letters)
}

// pullTook pulls and returns how long it took, in virtual time.
func pullTook(t *testing.T, s *Store, h fleet.Hold) time.Duration {
	t.Helper()
	began := time.Now()
	if err := s.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	return time.Since(began)
}

// Nothing is measured yet: a store on a shared directory goes before a mirror, and that
// before the registry, in whatever order they were configured.
func TestNearerSourceWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, "AB")
		far, near := newWell("registry", KindRegistry, shelf, 1e6), newWell("mirror", KindMirror, shelf, 1e6)
		s := openWells(t, Config{Streams: 1}, far, near)
		pullTook(t, s, h)
		if far.count() != 0 || near.count() != len(m.Pieces()) {
			t.Errorf("%d pieces from the registry, %d from the mirror; want all of %d from the mirror", far.count(), near.count(), len(m.Pieces()))
		}
		if got := s.Moved(); got["mirror"] == 0 || got["registry"] != 0 {
			t.Errorf("moved %v; want bytes of the mirror only", got)
		}
	})
}

// A mirror of 60 kB/s and a registry of 25 kB/s, by which the priors are right in
// proportion: queued pieces make the registry the sooner one for some, in proportion to
// the rates, and together they take the time that their sum allows.
func TestQueueingShiftsWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, alphabet(0, 64))
		var all int64
		for _, c := range m.Distinct() {
			all += c.BlobSize
		}
		near, far := newWell("mirror", KindMirror, shelf, 60e3), newWell("registry", KindRegistry, shelf, 25e3)
		s := openWells(t, Config{Streams: 16}, near, far)
		took := pullTook(t, s, h)
		share := float64(far.count()) / float64(near.count()+far.count())
		if share < 0.15 || share > 0.45 {
			t.Errorf("the registry gave %.0f %% of the pieces; its share of the rate is 29 %%", 100*share)
		}
		if best := time.Duration(float64(all) / 85e3 * float64(time.Second)); took > best*14/10 {
			t.Errorf("the pull took %s; both sources at once need %s", took, best)
		}
	})
}

// The best source by its kind is dead: it costs its stall once, not once for each piece,
// and the next pulls go without it. When it is well again, it is found out.
func TestDeadSourceCostsItsStallOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const stall = 30 * time.Second
		shelf := newShelf()
		dead, well := newWell("mirror", KindMirror, shelf, 60e6), newWell("registry", KindRegistry, shelf, 25e6)
		dead.stall = stall
		s := openWells(t, Config{Streams: 4}, dead, well)
		first, _ := shelf.put(t, alphabet(0, 40))
		if took := pullTook(t, s, first); took < stall || took > stall+2*time.Second {
			t.Errorf("the first pull took %s; want one stall of %s", took, stall)
		}
		tried := dead.count()
		second, _ := shelf.put(t, "xyz")
		if took := pullTook(t, s, second); took > time.Second || dead.count() != tried {
			t.Errorf("the second pull took %s, and tried the dead source %d times", took, dead.count()-tried)
		}
		// When its rest is over and most is forgotten, one piece tries it, and no more.
		time.Sleep(restFirst + 3*paceHalf)
		third, _ := shelf.put(t, "pqrstuv")
		if took := pullTook(t, s, third); took > stall+2*time.Second || dead.count() != tried+1 {
			t.Errorf("the third pull took %s, and tried the dead source %d times; want once", took, dead.count()-tried)
		}
		dead.set(func() { dead.stall = 0 })
		time.Sleep(restMost)
		before := well.count()
		fourth, _ := shelf.put(t, alphabet(1, 30))
		if pullTook(t, s, fourth); dead.count() == tried+1 || well.count()-before > dead.count()-tried {
			t.Errorf("a source that is well again gave %d pieces, the other %d", dead.count()-tried-1, well.count()-before)
		}
	})
}

// A source that refuses an image is left out of its pull, and of no other. If all do, the
// registry's word comes first.
func TestRefusingSourceIsLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf, bare := newShelf(), newShelf()
		h, _ := shelf.put(t, "ABCDEF")
		mirror, far := newWell("mirror", KindMirror, shelf, 60e6), newWell("registry", KindRegistry, shelf, 25e6)
		mirror.fail = &Error{Class: ClassAuth, Err: errors.New("who are you")}
		s := openWells(t, Config{Streams: 1, Backoff: time.Nanosecond}, mirror, far)
		if pullTook(t, s, h); mirror.count() != 1 {
			t.Errorf("the mirror was asked %d times; want once", mirror.count())
		}
		mirror.set(func() { mirror.fail = nil })
		other, _ := shelf.put(t, "GH")
		before := mirror.count()
		if pullTook(t, s, other); mirror.count() == before {
			t.Error("the mirror was not asked for another image")
		}
		third, _ := shelf.put(t, "IJ")
		mirror.shelf = bare
		far.set(func() { far.fail = &Error{Class: ClassNotFound, Err: errors.New("gone")} })
		if err := s.Pull(t.Context(), third); ClassOf(err) != ClassNotFound {
			t.Errorf("got %v; want class not-found", err)
		}
	})
}

// A link becomes slow and then quick again: what is measured follows, while bytes move;
// and while none do, it is forgotten.
func TestRatesFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &track{prior: 25e6}
		move := func(perSecond float64, seconds int) {
			k.start(time.Now())
			for range seconds * 10 {
				time.Sleep(100 * time.Millisecond)
				k.bytes += int64(perSecond / 10)
				k.fold(time.Now())
			}
			k.stop(time.Now())
		}
		expect := func(what string, want float64) {
			t.Helper()
			if got := k.value(time.Now()); got < want*0.8 || got > want*1.25 {
				t.Errorf("%s: %.1f MB/s; want about %.1f", what, got/1e6, want/1e6)
			}
		}
		expect("at first", 25e6)
		move(100e6, 10)
		expect("a quick link", 100e6)
		move(1e6, 40)
		expect("a slow link", 1e6)
		time.Sleep(10 * paceHalf)
		expect("after a long time", 25e6)
		move(50e6, 20)
		expect("measured anew", 50e6)
		// A source that is open and silent loses its credit before it fails.
		k.start(time.Now())
		time.Sleep(20 * time.Second)
		if got := k.value(time.Now()); got > 5e6 {
			t.Errorf("after 20 s of silence: %.1f MB/s", got/1e6)
		}
	})
}

// Two sources send the same bytes, one of them wrong ones: every piece comes from the other.
func TestWrongBytesComeFromElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf, spoilt := newShelf(), newShelf()
		h, m := shelf.put(t, "ABCD")
		for d, b := range shelf.blobs {
			b = bytes.Clone(b)
			if d != h.Digest {
				b[len(b)/2] ^= 1
			}
			spoilt.blobs[d] = b
		}
		bad, good := newWell("mirror", KindMirror, spoilt, 60e6), newWell("registry", KindRegistry, shelf, 25e6)
		s := openWells(t, Config{Streams: 1}, bad, good)
		pullTook(t, s, h)
		if good.count() != len(m.Pieces()) {
			t.Errorf("%d pieces from the good source; want %d", good.count(), len(m.Pieces()))
		}
		if i := s.List()[0]; i.State != fleet.ImageReady {
			t.Errorf("listed as %+v", i)
		}
	})
}

// Progress is what the registry would have sent, wherever the bytes come from, and never
// runs beyond the whole.
func TestProgressCountsBlobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, "ABCDEFGH")
		peer := newWell("peer", KindPeer, shelf, 100e3).lend("ABCDEFGH")
		s := openWells(t, Config{Streams: 2}, peer, newWell("registry", KindRegistry, shelf, 100e3))
		ended := make(chan error, 1)
		go func() { ended <- s.Pull(t.Context(), h) }()
		var seen []int64
		for {
			select {
			case err := <-ended:
				if err != nil {
					t.Fatal(err)
				}
				if len(seen) < 4 || !slices.IsSorted(seen) || seen[len(seen)-1] > m.Bytes() {
					t.Errorf("progress went %v of %d", seen, m.Bytes())
				}
				return
			case <-time.After(200 * time.Millisecond):
				if i := s.List()[0]; i.State == fleet.ImageCaching && i.Total > 0 {
					seen = append(seen, i.Done)
				}
			}
		}
	})
}
