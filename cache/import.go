package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// PartlyError is an import that brought an image in part: a pull fetches the rest.
type PartlyError struct {
	Image fleet.Digest
	Flaws []Flaw // what was missing or wrong in the directory
}

func (e *PartlyError) Error() string {
	text := fmt.Sprintf("image %s is here in part: %d of its parts are missing or spoilt where it came from", e.Image.Short(), len(e.Flaws))
	if len(e.Flaws) > 0 {
		text += ": " + e.Flaws[0].String()
	}
	return text
}

// Import takes over an image that another tool has pulled into dir: manifest.json as the
// registry gave it, disk.img, nvram.bin and config.json, as in a Tart cache. The files
// are cloned (where that is not possible, their data is copied), every digest is verified
// and then the image is published; dir is left as it is. ref is what the image is known
// by afterwards. Files are read only if they are plain files in dir.
//
// What is missing or wrong there makes a *PartlyError: the rest is kept as a pull's would
// be, and Pull fetches what remains. So it is with an import that is interrupted or
// killed; Import goes on from there, too. progress is as for Verify.
func (s *Store) Import(ctx context.Context, dir, ref string, progress func(done, total int64)) (fleet.Digest, error) {
	if _, err := image.ParseReference(ref); err != nil {
		return "", &Error{Class: ClassFormat, Err: err}
	}
	raw, d, err := s.foreignManifest(ctx, dir, ref)
	if err != nil {
		return "", fmt.Errorf("importing %s: %w", dir, err)
	}
	m, codec, err := image.Parse(raw, s.codecs)
	if err == nil && slices.ContainsFunc(m.Chunks, func(c image.Chunk) bool { return c.Legacy() }) {
		err = &Error{Class: ClassFormat, Err: ErrUnverifiable}
	}
	if err != nil {
		return d, fmt.Errorf("importing %s: %w", dir, err)
	}
	e, w, err := s.beginImport(d, ref)
	if err != nil || w == nil {
		return d, err
	}
	imp := &importing{store: s, entry: e, from: dir, manifest: m, codec: codec, progress: progress}
	flaws, err := imp.run(ctx, ref)
	if err == nil && len(flaws) > 0 {
		err = &PartlyError{Image: d, Flaws: flaws}
	}
	return d, s.endImport(ctx, e, w, err)
}

// foreignManifest reads the manifest in dir. If dir's name is a digest, that is the
// image: a tool may have written its manifest anew, with other bytes, and then the
// sources are asked for the few kilobytes that it was.
func (s *Store) foreignManifest(ctx context.Context, dir, ref string) ([]byte, fleet.Digest, error) {
	f, err := openPlain(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = f.Close() }()
	raw, err := io.ReadAll(io.LimitReader(f, image.MaxManifestBytes+1))
	if err != nil {
		return nil, "", err
	}
	if len(raw) > image.MaxManifestBytes {
		return nil, "", fmt.Errorf("%w: a manifest of more than %d bytes", image.ErrTooLarge, image.MaxManifestBytes)
	}
	d := image.DigestOf(raw)
	want := fleet.Digest(filepath.Base(dir))
	if r, err := image.ParseReference(ref); err == nil && r.Digest() != "" {
		want = r.Digest()
	}
	if want == d || fleet.CheckDigest(want) != nil {
		return raw, d, nil
	}
	var errs []error
	for _, src := range s.sources {
		raw, err := src.Manifest(ctx, ref, want)
		if err == nil && image.DigestOf(raw) == want {
			return raw, want, nil
		}
		errs = append(errs, err)
	}
	return nil, "", fmt.Errorf("its manifest.json has digest %s, and %s is wanted, which no source gave: %w", d.Short(), want.Short(), errors.Join(append(errs, errNoImage)...))
}

// beginImport marks the image as being worked on; no work and no error: it is ready.
func (s *Store) beginImport(d fleet.Digest, ref string) (*entry, *work, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entry(d)
	switch {
	case e.work != nil:
		return nil, nil, fmt.Errorf("importing image %s: %w", d.Short(), ErrLeased)
	case e.State == fleet.ImageReady:
		return e, nil, nil
	}
	e.Ref, e.work = ref, &work{done: make(chan struct{}), err: errAgain}
	s.move(e, fleet.ImageQueued)
	s.move(e, fleet.ImageCaching)
	return e, e.work, nil
}

// endImport tells how it went to the list and to those who wait.
func (s *Store) endImport(ctx context.Context, e *entry, w *work, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.work = nil
	defer close(w.done)
	partly := (*PartlyError)(nil)
	switch {
	case err == nil:
		e.failures = 0
	case errors.As(err, &partly), cancelled(ctx, err) && e.State != fleet.ImageVerifying: // which no cancellation ends
		to := gone
		if s.dir.begun(e.Digest) {
			to = fleet.ImagePaused
		}
		s.move(e, to)
	default:
		return s.fail(e, fmt.Errorf("importing: %w", err))
	}
	return err
}

// importing is one import under way.
type importing struct {
	store    *Store
	entry    *entry
	from     string
	manifest *image.Manifest
	codec    image.Codec
	progress func(done, total int64)
	partial  *partial
}

// run brings what there is into the partial image, and publishes it if that is all.
func (i *importing) run(ctx context.Context, ref string) ([]Flaw, error) {
	s, m := i.store, i.manifest
	if m, err := s.published(m.Digest); m != nil || err != nil { // by one that failed after that
		if err != nil {
			return nil, diskError(err)
		}
		s.mu.Lock()
		s.move(i.entry, fleet.ImageVerifying)
		s.mu.Unlock()
		return nil, s.arrived(i.entry, m)
	}
	p, err := s.openPartial(fleet.Hold{Digest: m.Digest, Ref: ref})
	if err != nil {
		return nil, diskError(err)
	}
	defer p.close()
	i.partial = p
	if err := writeFile(filepath.Join(p.dir, manifestFile), m.Raw); err != nil {
		return nil, diskError(err)
	}
	flaws, err := i.disk(ctx)
	if err != nil {
		return nil, err
	}
	for _, file := range smallFiles(m) {
		flaw, err := i.small(file)
		if err != nil {
			return nil, err
		}
		if flaw != nil {
			flaws = append(flaws, *flaw)
		}
	}
	s.mu.Lock()
	i.entry.Total = m.Bytes()
	i.entry.done.Store(p.journal.bytes(m, true))
	if len(flaws) == 0 {
		s.move(i.entry, fleet.ImageVerifying)
	}
	s.mu.Unlock()
	if len(flaws) > 0 {
		return flaws, nil
	}
	if err := p.seal(m, ref); err != nil {
		return nil, err
	}
	if err := s.dir.publish(m.Digest); err != nil {
		return nil, fmt.Errorf("publishing the image: %w", diskError(err))
	}
	return nil, s.arrived(i.entry, m)
}

// small takes over a file that is a part of its own.
func (i *importing) small(file small) (*Flaw, error) {
	path := filepath.Join(i.partial.dir, file.file)
	if file.blob.Digest == "" {
		return nil, diskError(writeFile(path, nil)) // an empty file stands for it, as in a pull
	}
	part := item{file.kind, file.blob.Digest}
	if i.partial.journal.has(part) && file.check(i.partial.dir) == nil {
		return nil, nil
	}
	data, flaw := file.read(i.from)
	if flaw != nil {
		return flaw, nil
	}
	if file.kind == aConfig {
		if err := i.codec.CheckConfig(data); err != nil {
			return nil, err
		}
	}
	if err := writeFile(path, data); err != nil {
		return nil, diskError(err)
	}
	return nil, diskError(i.partial.finished(nil, part))
}

// disk takes over the chunks that the journal does not have.
func (i *importing) disk(ctx context.Context) ([]Flaw, error) {
	source, err := openPlain(filepath.Join(i.from, diskFile))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errNoImage) {
		return i.missing(err), diskError(i.partial.openDisk(i.manifest.DiskSize))
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = source.Close() }()
	target := filepath.Join(i.partial.dir, diskFile)
	if i.progress != nil { // a copy, where nothing can be shared, takes a while
		i.progress(0, i.manifest.DiskSize)
	}
	if _, err := os.Lstat(target); errors.Is(err, os.ErrNotExist) {
		if err := i.clone(ctx, source, target); err != nil {
			return nil, diskError(err)
		}
	}
	if err := i.partial.openDisk(i.manifest.DiskSize); err != nil {
		return nil, diskError(err)
	}
	return i.adopt(ctx, source)
}

// clone makes the disk of the source's. It has its name when there are zeros where they
// should be: else a pull that comes after an import was killed would take what the source
// has there, for it looks at what it fetches alone.
func (i *importing) clone(ctx context.Context, source *os.File, target string) error {
	temp := target + tempSuffix
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	err := cloneFrom(ctx, source, temp)
	if err == nil {
		err = blankFor(temp, i.manifest)
	}
	if err != nil {
		if rerr := os.Remove(temp); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	}
	if err := os.Rename(temp, target); err != nil {
		return err
	}
	return syncDir(i.partial.dir)
}

// missing is every chunk that is not here, when there is no disk to take them from.
func (i *importing) missing(why error) []Flaw {
	var flaws []Flaw
	for _, c := range i.manifest.Distinct() {
		if !i.partial.journal.has(item{aChunk, c.Content}) {
			flaws = append(flaws, Flaw{Kind: aChunk, Layer: c.Layer, Offset: c.Offset, Size: c.Size, Want: c.Content, Err: why})
		}
	}
	return flaws
}

// adopt verifies the clone and journals what is right, as it goes. What is not (an earlier
// import or pull may have left it half written) is copied from the source once more.
func (i *importing) adopt(ctx context.Context, source *os.File) ([]Flaw, error) {
	var todo []image.Chunk
	for _, c := range i.manifest.Chunks {
		if c.Zero || !i.partial.journal.has(item{aChunk, c.Content}) {
			todo = append(todo, c)
		}
	}
	t := newTally(todo, i.finished)
	suspects, err := hashChunks(ctx, i.partial.disk, todo, i.progress, t.right)
	if err != nil {
		return nil, err
	}
	var flaws []Flaw
	for _, f := range suspects {
		flaw, err := i.mend(ctx, source, f)
		switch {
		case err != nil:
			return nil, err
		case flaw != nil:
			flaws = append(flaws, *flaw)
		default:
			if err := t.right(image.Chunk{Content: f.Want, Zero: f.zero}); err != nil {
				return nil, err
			}
		}
	}
	return flaws, nil
}

func (i *importing) finished(content fleet.Digest) error {
	return diskError(i.partial.finished(i.partial.disk, item{aChunk, content}))
}

// tally counts the places of each content that are right yet. It is safe for concurrent
// use.
type tally struct {
	mu   sync.Mutex
	left map[fleet.Digest]int
	full func(fleet.Digest) error // called when a content is right in all its places
}

func newTally(chunks []image.Chunk, full func(fleet.Digest) error) *tally {
	t := &tally{left: make(map[fleet.Digest]int), full: full}
	for _, c := range chunks {
		t.left[c.Content]++
	}
	return t
}

func (t *tally) right(c image.Chunk) error {
	t.mu.Lock()
	t.left[c.Content]--
	full := t.left[c.Content] == 0
	t.mu.Unlock()
	if !full || c.Zero { // what is zero is nobody's to note
		return nil
	}
	return t.full(c.Content)
}

// mend copies a bad region from the source and looks at it again; zeros are just written.
func (i *importing) mend(ctx context.Context, source *os.File, f Flaw) (*Flaw, error) {
	if f.zero {
		return nil, diskError(clearZeros(i.partial.disk.Name(), []Flaw{f}))
	}
	chunk := image.Chunk{Layer: f.Layer, Offset: f.Offset, Size: f.Size, Content: f.Want}
	h := hasher{disk: source, buffer: make([]byte, 1<<20), count: func(int64) {}}
	if flaw, err := h.check(ctx, chunk); flaw != nil || err != nil {
		return flaw, err // the source is bad itself
	}
	if err := copyRange(ctx, i.partial.disk, source, f.Offset, f.Offset+f.Size); err != nil {
		return nil, diskError(err)
	}
	h.disk = i.partial.disk
	return h.check(ctx, chunk)
}

// cloneFrom makes dst, which must not exist, of an open file: sharing its blocks where
// the file system can, else copying its data.
func cloneFrom(ctx context.Context, src *os.File, dst string) error {
	shared, err := reflinkFrom(src, dst)
	if shared || err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := sparseCopy(ctx, out, src); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}
