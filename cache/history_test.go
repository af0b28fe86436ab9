package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// history is a store to which anything happens, in any order, beside what has to be true
// of it. Its images share chunks, so that they are copied from each other.
type history struct {
	t     *testing.T
	rand  *rand.Rand
	shelf *shelf
	store *Store
	log   []string // what happened, for a failure

	holds    []fleet.Hold
	disks    map[fleet.Digest][]byte
	letters  []image.Chunk
	held     map[fleet.Digest]func()                  // blobs that wait in their middle
	leases   map[fleet.Digest]map[string]func() error // by holder
	pieces   []servedPiece
	pulls    map[fleet.Digest][]context.CancelFunc
	ended    chan pullEnd
	crashes  int
	refused  int // evictions
	evicted  int
	finished int
}

type servedPiece struct {
	*Piece
	image fleet.Digest
	want  []byte
}

type pullEnd struct {
	image fleet.Digest
	err   error
}

func newHistory(t *testing.T, seed uint64) *history {
	h := &history{
		t: t, rand: rand.New(rand.NewPCG(seed, 1)), shelf: newShelf(), disks: map[fleet.Digest][]byte{},
		held: map[fleet.Digest]func(){}, leases: map[fleet.Digest]map[string]func() error{},
		pulls: map[fleet.Digest][]context.CancelFunc{}, ended: make(chan pullEnd, 1000),
	}
	seen := map[fleet.Digest]bool{}
	for _, pattern := range []string{"AB", "A0C", "BCD", "EFA0"} {
		hold, m := h.shelf.put(t, pattern)
		h.holds = append(h.holds, hold)
		h.leases[hold.Digest] = map[string]func() error{}
		for i, c := range pattern {
			h.disks[hold.Digest] = append(h.disks[hold.Digest], letter(c)...)
			if !m.Chunks[i].Zero && !seen[m.Chunks[i].Blob] {
				seen[m.Chunks[i].Blob] = true
				h.letters = append(h.letters, m.Chunks[i])
			}
		}
	}
	h.store = openShelf(t, h.shelf)
	return h
}

// step does one thing, drawn at random.
func (h *history) step() {
	hold := h.holds[h.rand.IntN(len(h.holds))]
	holder := fmt.Sprint("vm-", h.rand.IntN(3))
	c := h.letters[h.rand.IntN(len(h.letters))]
	switch n := h.rand.IntN(100); {
	case n < 25:
		hold.Demand, hold.Priority = h.rand.IntN(2) == 0, h.rand.IntN(3)
		h.pull(hold)
	case n < 35:
		h.note("cancel %s", hold.Digest.Short())
		for _, cancel := range h.pulls[hold.Digest] {
			cancel()
		}
		delete(h.pulls, hold.Digest)
	case n < 43:
		if h.held[c.Blob] == nil {
			h.note("hold chunk %s", c.Content.Short())
			h.held[c.Blob] = h.shelf.hold(c.Blob)
		}
	case n < 53:
		h.free(c.Blob)
	case n < 63:
		h.lease(hold.Digest, holder)
	case n < 70:
		h.release(hold.Digest, holder)
	case n < 78:
		h.serve(hold.Digest, c)
	case n < 84:
		h.close()
	case n < 94:
		h.evict(hold.Digest)
	case n < 97:
		h.note("time passes")
		time.Sleep(2 * idleTurn)
	default:
		h.crash()
	}
}

func (h *history) note(format string, args ...any) {
	h.log = append(h.log, fmt.Sprintf(format, args...))
}

func (h *history) pull(hold fleet.Hold) {
	h.note("pull %s, demand %v, priority %d", hold.Digest.Short(), hold.Demand, hold.Priority)
	ctx, cancel := context.WithCancel(h.t.Context())
	h.pulls[hold.Digest] = append(h.pulls[hold.Digest], cancel)
	store := h.store
	go func() { h.ended <- pullEnd{hold.Digest, store.Pull(ctx, hold)} }()
}

func (h *history) free(blob fleet.Digest) {
	if free := h.held[blob]; free != nil {
		h.note("free blob %s", blob.Short())
		h.shelf.mu.Lock()
		delete(h.shelf.gate, blob)
		h.shelf.mu.Unlock()
		free()
		delete(h.held, blob)
	}
}

func (h *history) lease(d fleet.Digest, holder string) {
	release, err := h.store.Lease(d, holder)
	h.note("lease %s for %s: %v", d.Short(), holder, err)
	if ready := h.store.state(d) == fleet.ImageReady; ready != (err == nil) {
		h.fail("lease: %v, ready: %v", err, ready)
	}
	if err != nil {
		return
	}
	h.leases[d][holder] = release
	dir := filepath.Join(h.t.TempDir(), "clone")
	if err := h.store.Clone(h.t.Context(), d, dir, 0); err != nil {
		h.fail("cloning a leased image: %v", err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, diskFile)); err != nil || !bytes.Equal(got, h.disks[d]) {
		h.fail("the clone is wrong (%v)", err)
	}
}

func (h *history) release(d fleet.Digest, holder string) {
	release := h.leases[d][holder]
	if release == nil {
		return
	}
	h.note("release %s of %s", d.Short(), holder)
	delete(h.leases[d], holder)
	if err := release(); err != nil {
		h.fail("release: %v", err)
	}
}

func (h *history) serve(d fleet.Digest, c image.Chunk) {
	at := -1
	for i := 0; i < len(h.disks[d]); i += int(c.Size) {
		if image.DigestOf(h.disks[d][i:i+int(c.Size)]) == c.Content {
			at = i
		}
	}
	p, err := h.store.Serve(d, c.Content)
	h.note("serve %s of %s: %v", c.Content.Short(), d.Short(), err)
	if err == nil && at < 0 {
		h.fail("served what is not in the image")
	}
	if ready := h.store.state(d) == fleet.ImageReady; ready && at >= 0 && err != nil {
		h.fail("serving a ready image: %v", err)
	}
	if err == nil {
		h.pieces = append(h.pieces, servedPiece{p, d, h.disks[d][at : at+int(c.Size)]})
	}
}

// close reads the piece that has been open longest, and closes it.
func (h *history) close() {
	if len(h.pieces) == 0 {
		return
	}
	p := h.pieces[0]
	h.pieces = h.pieces[1:]
	h.note("close a piece of %s", p.image.Short())
	got, err := io.ReadAll(p)
	if err := errors.Join(err, p.Close()); err != nil || !bytes.Equal(got, p.want) {
		h.fail("a served piece was wrong (%v)", err)
	}
}

func (h *history) evict(d fleet.Digest) {
	h.store.mu.Lock()
	e := h.store.images[d]
	busy := e != nil && e.work != nil
	h.store.mu.Unlock()
	served := slices.ContainsFunc(h.pieces, func(p servedPiece) bool { return p.image == d })
	used := busy || served || len(h.leases[d]) > 0
	err := h.store.Evict(d)
	h.note("evict %s: %v", d.Short(), err)
	switch {
	case used && !errors.Is(err, ErrLeased):
		h.fail("evicted although it was pulled (%v), served (%v) or leased (%d): %v", busy, served, len(h.leases[d]), err)
	case !used && err != nil:
		h.fail("an image that nobody uses could not be evicted: %v", err)
	case used:
		h.refused++
	case e != nil:
		h.evicted++
	}
}

// crash goes on with a copy of the directory as it is at this moment: what kill -9 would
// have left. The processes of the VMs, and so the leases, survive it.
func (h *history) crash() {
	h.note("crash")
	h.crashes++
	dir := filepath.Join(h.t.TempDir(), "store")
	if err := os.CopyFS(dir, os.DirFS(string(h.store.dir))); err != nil {
		h.fail("copying the store: %v", err)
	}
	for d := range h.pulls {
		for _, cancel := range h.pulls[d] {
			cancel()
		}
	}
	clear(h.pulls)
	for _, p := range h.pieces {
		_ = p.Close()
	}
	h.pieces = nil
	synctest.Wait()
	if err := h.store.Close(); err != nil {
		h.fail("closing: %v", err)
	}
	store, err := Open(Config{Dir: dir, Sources: []Source{h.shelf}})
	if err != nil {
		h.fail("reopening: %v", err)
	}
	h.t.Cleanup(func() { _ = store.Close() })
	h.store = store
	for d, holders := range h.leases {
		for holder := range holders {
			release, err := store.Lease(d, holder)
			if err != nil {
				h.fail("a lease did not survive: %v", err)
			}
			holders[holder] = release
		}
	}
}

func (h *history) fail(format string, args ...any) {
	h.t.Helper()
	h.t.Fatalf(format+"\n%s", append(args, strings.Join(h.log, "\n"))...)
}

// check holds the store to its list and to its disk, when nothing moves.
func (h *history) check() {
	synctest.Wait()
	for len(h.ended) > 0 {
		if end := <-h.ended; end.err == nil {
			h.finished++
		} else if !errors.Is(end.err, context.Canceled) {
			h.fail("pull of %s: %v", end.image.Short(), end.err)
		}
	}
	ready, partial := map[string]bool{}, map[string]bool{}
	for _, i := range h.store.List() {
		name := strings.TrimPrefix(string(i.Digest), "sha256:")
		switch i.State {
		case fleet.ImageReady:
			ready[name] = true
			got, err := os.ReadFile(filepath.Join(h.store.dir.image(i.Digest), diskFile))
			if err != nil || !bytes.Equal(got, h.disks[i.Digest]) {
				h.fail("the disk of %s is wrong (%v)", i.Digest.Short(), err)
			}
		case fleet.ImagePaused, fleet.ImageCaching, fleet.ImageQueued:
			partial[name] = true
		default:
			h.fail("%s is %q", i.Digest.Short(), i.State)
		}
		if i.Leases != len(h.leases[i.Digest]) || i.Done > i.Total {
			h.fail("listed as %+v; want %d leases", i, len(h.leases[i.Digest]))
		}
	}
	for d, holders := range h.leases {
		if len(holders) > 0 && h.store.state(d) != fleet.ImageReady {
			h.fail("%s is leased and %q", d.Short(), h.store.state(d))
		}
	}
	h.names("images", func(name string) bool { return ready[name] }, len(ready))
	h.names("partial", func(name string) bool { return partial[name] }, -1) // one that is queued need not be there
	h.names("trash", func(string) bool { return false }, 0)
}

// names checks which directories there are.
func (h *history) names(kind string, may func(string) bool, want int) {
	entries, err := os.ReadDir(filepath.Join(string(h.store.dir), kind))
	if err != nil {
		h.fail("%v", err)
	}
	for _, e := range entries {
		if !may(e.Name()) {
			h.fail("%s has %s, which is not listed", kind, e.Name())
		}
	}
	if want >= 0 && len(entries) != want {
		h.fail("%s has %d entries; %d are listed", kind, len(entries), want)
	}
}

// Pulls, leases, clones, served pieces, evictions and crashes in any order: nothing that
// is leased, served or pulled is ever evicted, what is listed is what is on disk, and in
// the end every image can be had.
func TestRandomHistories(t *testing.T) {
	var crashes, refused, evicted, finished int
	for seed := range uint64(16) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newHistory(t, seed)
				for range 70 {
					h.step()
					h.check()
				}
				for _, blob := range slices.Collect(maps.Keys(h.held)) {
					h.free(blob)
				}
				for len(h.pieces) > 0 {
					h.close()
				}
				for _, hold := range h.holds {
					if err := h.store.Pull(t.Context(), hold); err != nil {
						h.fail("at the end: %v", err)
					}
				}
				h.check()
				crashes, refused, evicted, finished = crashes+h.crashes, refused+h.refused, evicted+h.evicted, finished+h.finished
			})
		})
	}
	if crashes == 0 || refused == 0 || evicted == 0 || finished == 0 {
		t.Errorf("%d crashes, %d evictions refused, %d done, %d pulls finished: the histories try too little", crashes, refused, evicted, finished)
	}
	t.Logf("%d crashes, %d evictions refused, %d done, %d pulls finished", crashes, refused, evicted, finished)
}
