package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// View reads a store without its lock, beside the process that has it open or none. It
// writes nothing. What it tells was so a moment ago: images come and go underneath, and
// one that goes while it is read is left out rather than an error.
type View struct {
	dir    layout
	codecs []image.Codec
}

// Seen is an image as it lies in a store.
type Seen struct {
	Digest fleet.Digest
	Ref    string // by which it was ordered; empty: not known
	Dir    string // of its files
	Ready  bool   // published and to be used; else it is here in part
	// Manifest is nil if none is there yet, or Err says what is wrong with it.
	Manifest  *image.Manifest
	Done      int64     // bytes on the wire of the disk chunks that are here; of a ready one all
	DiskBytes int64     // that its files occupy; a clone counts in full although it shares blocks
	UsedAt    time.Time // last leased; zero while it is here in part
	Leases    []string  // the holders, sorted
	Err       error     // why it is no image, although it lies in an image's place

	journal *journal    // of one that is here in part and has a manifest, else nil
	info    os.FileInfo // of Dir
}

// LookAt makes a view of the store in dir, which must be one. nil codecs: Tart's.
func LookAt(dir string, codecs []image.Codec) (*View, error) {
	v := &View{dir: layout(dir), codecs: codecs}
	if v.codecs == nil {
		v.codecs = Formats()
	}
	for _, kind := range []string{"images", "partial"} {
		info, err := os.Stat(filepath.Join(dir, kind))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || err == nil && !info.IsDir() {
			return nil, fmt.Errorf("%s: %w", dir, ErrNoStore)
		}
		if err != nil {
			return nil, fmt.Errorf("looking at the image store: %w", err)
		}
	}
	return v, nil
}

// ErrNoStore: what was given as an image store is none.
var ErrNoStore = errors.New("this is no image store; name the directory that images were pulled into")

// List returns all images, sorted by reference and digest.
func (v *View) List() ([]Seen, error) {
	// Partial ones first: an image that is published in between is then seen twice, and
	// not never.
	seen := make(map[fleet.Digest]Seen)
	for _, kind := range []string{"partial", "images"} {
		names, err := os.ReadDir(filepath.Join(string(v.dir), kind))
		if err != nil {
			return nil, fmt.Errorf("looking at the image store: %w", err)
		}
		for _, name := range names {
			d := fleet.Digest("sha256:" + name.Name())
			if fleet.CheckDigest(d) != nil {
				continue // not ours, and the next start of the store removes it
			}
			if i, ok := v.look(d, kind == "images"); ok {
				seen[d] = i
			}
		}
	}
	list := make([]Seen, 0, len(seen))
	for _, i := range seen {
		list = append(list, i)
	}
	slices.SortFunc(list, func(a, b Seen) int {
		return strings.Compare(a.Ref+" "+string(a.Digest), b.Ref+" "+string(b.Digest))
	})
	return list, nil
}

// Image returns one image; ErrNotReady if it is not here, in full or in part.
func (v *View) Image(d fleet.Digest) (Seen, error) {
	if err := fleet.CheckDigest(d); err != nil {
		return Seen{}, err
	}
	// Twice in this order, for one that is published between the two looks.
	for _, ready := range []bool{true, false, true} {
		if i, ok := v.look(d, ready); ok {
			return i, nil
		}
	}
	return Seen{}, fmt.Errorf("image %s: %w", d.Short(), ErrNotReady)
}

// look reads what is in one image's directory; false: it is not there (any more).
func (v *View) look(d fleet.Digest, ready bool) (Seen, bool) {
	i := Seen{Digest: d, Dir: v.dir.partial(d), Ready: ready}
	if ready {
		i.Dir = v.dir.image(d)
	}
	info, err := os.Lstat(i.Dir)
	if err != nil || !info.IsDir() {
		return Seen{}, false
	}
	i.info = info
	i.Ref, i.UsedAt = readMeta(i.Dir)
	m, _, err := readManifest(i.Dir, d, v.codecs)
	switch {
	case err == nil:
		i.Manifest = m
	case ready:
		i.Err = err
	default: // a pull that has just begun has none, or is writing it
	}
	if size, err := allocated(i.Dir); err == nil {
		i.DiskBytes = size
	}
	switch {
	case i.Err != nil || m == nil:
	case ready:
		i.Done, i.Leases, i.Err = m.Bytes(), v.holders(d), checkFiles(i.Dir, m)
	default:
		i.UsedAt, i.journal = time.Time{}, finishedIn(i.Dir)
		i.Done = i.journal.bytes(m, true)
	}
	return i, isDir(i.Dir) // what was read of one that has gone meanwhile says nothing
}

// isDir reports whether there is a directory of that very name.
func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}

// holders are who has leased an image.
func (v *View) holders(d fleet.Digest) []string {
	files, err := os.ReadDir(v.dir.leases(d))
	if err != nil {
		return nil // there were never any
	}
	var names []string
	for _, f := range files {
		if h, ok := holder(f.Name()); ok {
			names = append(names, h)
		}
	}
	slices.Sort(names)
	return names
}

// finishedIn is what the journal in a directory says, not to be added to; a journal that
// cannot be read says nothing.
func finishedIn(dir string) *journal {
	done, marks, _, _ := readJournal(filepath.Join(dir, journalFile))
	return &journal{done: done, marks: marks}
}

// Plan is what a pull would do.
type Plan struct {
	Chunks   []image.Chunk // to be requested, each content once, in disk order
	Requests int64         // bytes on the wire of those and of the small files
	Kept     int64         // bytes on the wire that an earlier pull brought already
	Reused   int64         // bytes on the wire saved by chunks that other images hold
	Zero     int64         // bytes of disk that are zero, and need no request
	Ready    bool          // all of it is here, and nothing would be done
}

// Plan says what a pull of m would request now.
func (v *View) Plan(m *image.Manifest) (Plan, error) {
	images, err := v.List()
	if err != nil {
		return Plan{}, err
	}
	held, own := make(map[stuff]bool), &journal{}
	for _, i := range images {
		switch {
		case i.Digest == m.Digest && i.Ready && i.Err == nil:
			return Plan{Ready: true}, nil
		case i.Digest == m.Digest && i.journal != nil:
			own = i.journal
		case i.Ready && i.Err == nil:
			for _, c := range i.Manifest.Chunks {
				held[stuff{c.Content, c.Size}] = true
			}
		}
	}
	return plan(m, held, own), nil
}

// PlanAfresh says what a pull of m into an empty store would request.
func PlanAfresh(m *image.Manifest) Plan { return plan(m, nil, &journal{}) }

// stuff is what a chunk is made of, as far as it can be reused: two that do not agree in
// the size are not the same, whatever their manifests say.
type stuff struct {
	content fleet.Digest
	size    int64
}

// plan plans with what other images hold, and what is here of this one.
func plan(m *image.Manifest, held map[stuff]bool, own *journal) Plan {
	var p Plan
	for _, c := range m.Chunks {
		if c.Zero {
			p.Zero += c.Size
		}
	}
	for _, c := range m.Distinct() {
		switch begun, marked := own.mark(itemOf(c)); {
		case own.has(itemOf(c)):
			p.Kept += c.BlobSize
		case held[stuff{c.Content, c.Size}] && !c.Legacy(): // of which the content's digest is not known
			p.Reused += c.BlobSize
		default:
			p.Chunks = append(p.Chunks, c)
			p.Requests += c.BlobSize
			if marked {
				p.Kept += begun.wire(c)
				p.Requests -= begun.wire(c)
			}
		}
	}
	for _, s := range smallFiles(m) {
		if s.blob.Digest != "" && !own.has(item{s.kind, s.blob.Digest}) {
			p.Requests += s.blob.Size
		}
	}
	return p
}

// Shared is how much of an image another one holds, too.
type Shared struct {
	With   fleet.Digest
	Ref    string
	Chunks int   // that both have, zero ones not counted
	Bytes  int64 // of disk in those
}

// Sharing compares an image with the other ready ones, the closest first.
func (v *View) Sharing(i Seen) ([]Shared, error) {
	images, err := v.List()
	if err != nil || i.Manifest == nil {
		return nil, err
	}
	var all []Shared
	for _, other := range images {
		if other.Digest == i.Digest || !other.Ready || other.Err != nil {
			continue
		}
		held := make(map[stuff]bool)
		for _, c := range other.Manifest.Chunks {
			held[stuff{c.Content, c.Size}] = true
		}
		s := Shared{With: other.Digest, Ref: other.Ref}
		for _, c := range i.Manifest.Distinct() {
			if held[stuff{c.Content, c.Size}] {
				s.Chunks++
				s.Bytes += c.Size
			}
		}
		if s.Chunks > 0 {
			all = append(all, s)
		}
	}
	slices.SortStableFunc(all, func(a, b Shared) int { return int(max(-1, min(1, b.Bytes-a.Bytes))) })
	return all, nil
}

// readManifest reads the manifest of an image on disk and holds it to its digest.
func readManifest(dir string, d fleet.Digest, codecs []image.Codec) (*image.Manifest, image.Codec, error) {
	raw, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, nil, err
	}
	if got := image.DigestOf(raw); got != d {
		return nil, nil, fmt.Errorf("%w: its manifest has digest %s", errNoImage, got)
	}
	return image.Parse(raw, codecs)
}
