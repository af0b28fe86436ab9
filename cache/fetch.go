package cache

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// fetch brings the parts of one image into its partial directory.
type fetch struct {
	store   *Store
	entry   *entry
	partial *partial
	turn    *turn
	ref     string

	image *image.Manifest
	codec image.Codec

	committer *committer
	streams   chan *stream // those that no piece uses
	small     []*os.File   // what is not the disk, open until all is committed
}

// await returns when it is this pull's turn to move bytes.
func (f *fetch) await(ctx context.Context) error { return f.store.await(ctx, f.turn) }

// manifest reads the manifest from the partial directory, or fetches it there. Nothing of
// a manifest that is no good is kept.
func (f *fetch) manifest(ctx context.Context) error {
	d := f.entry.Digest
	m, codec, err := f.store.readManifest(f.partial.dir, d)
	if err != nil {
		raw, err := f.fetchManifest(ctx)
		if err != nil {
			return fmt.Errorf("fetching the manifest: %w", err)
		}
		if m, codec, err = image.Parse(raw, f.store.codecs); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(f.partial.dir, manifestFile), raw); err != nil {
			return diskError(err)
		}
	}
	f.image, f.codec = m, codec
	return nil
}

// disk opens the disk; a new one begins as a clone of the ready image's that is closest to
// it, where that costs nothing.
func (f *fetch) disk(ctx context.Context) error {
	path := filepath.Join(f.partial.dir, diskFile)
	var same []image.Chunk
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		base, dir, shared, release, ok := f.reuseBase(ctx)
		if ok {
			err := f.cloneBase(filepath.Join(dir, diskFile), path)
			release()
			if err != nil {
				f.store.log.Warn("a disk could not begin as a clone", "image", f.entry.Digest, "base", base, "error", err)
			} else {
				same = shared
			}
		}
	}
	if err := f.partial.openDisk(f.image.DiskSize); err != nil {
		return diskError(err)
	}
	if len(same) == 0 {
		return nil
	}
	whole := f.whole(same)
	notes := make([]note, len(whole))
	for i, c := range whole {
		notes[i] = note{item: itemOf(c)}
		f.reused(c)
	}
	return diskError(f.partial.journal.add(notes))
}

// cloneBase makes a disk of another image's, on disk in full before it has its name.
func (f *fetch) cloneBase(from, to string) error {
	temp := to + tempSuffix
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if shared, err := reflink(from, temp); err != nil || !shared {
		return errors.Join(err, errors.ErrUnsupported)
	}
	if err := blankFor(temp, f.image); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if err := os.Rename(temp, to); err != nil {
		return err
	}
	return syncDir(f.partial.dir)
}

// blankFor gives a cloned disk the size of an image's, and zeros where it has them: nothing
// will be written there, nor looked at again.
func blankFor(path string, m *image.Manifest) error {
	disk, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }() // synced below
	if err := disk.Truncate(m.DiskSize); err != nil {
		return err
	}
	for _, c := range m.Chunks {
		if !c.Zero {
			continue
		}
		if err := blank(disk, c.Offset, c.Size); err != nil {
			return err
		}
	}
	return disk.Sync()
}

// whole are the contents that are in all their places, given the chunks that are in theirs.
func (f *fetch) whole(same []image.Chunk) []image.Chunk {
	missing := make(map[fleet.Digest]int)
	for _, c := range f.image.Chunks {
		missing[c.Content]++
	}
	for _, c := range same {
		missing[c.Content]--
	}
	var whole []image.Chunk
	for _, c := range f.image.Distinct() {
		if missing[c.Content] <= 0 {
			whole = append(whole, c)
		}
	}
	return whole
}

// all brings all that is missing, and tells the site of what is here already.
func (f *fetch) all(ctx context.Context) error {
	defer f.begin(ctx)()
	for _, c := range f.image.Pieces() {
		if f.partial.journal.has(itemOf(c)) {
			f.has(c.Content)
		}
	}
	return f.bring(ctx)
}

// bring fetches all that is missing. What came is in the journal when it returns, also
// after an error.
func (f *fetch) bring(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f.streams = make(chan *stream, f.store.streams)
	f.committer = newCommitter(f.partial.journal, func(i item) { f.has(i.digest) }, cancel)
	defer func() {
		if cerr := f.committer.close(); cerr != nil {
			err = cerr
		}
		for _, file := range f.small {
			_ = file.Close() // the committer has synced it
		}
	}()
	// The VM config first: it may show that the rest is not worth fetching.
	if err := f.file(ctx, f.image.ConfigChunk(), configFile); err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(f.partial.dir, configFile))
	if err != nil {
		return diskError(err)
	}
	if err := f.codec.CheckConfig(config); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return f.file(ctx, f.image.NVRAMChunk(), nvramFile) })
	places := make(map[fleet.Digest][]int64)
	for _, c := range f.image.Chunks {
		places[c.Content] = append(places[c.Content], c.Offset)
	}
	for _, c := range f.image.Distinct() {
		if f.partial.journal.has(itemOf(c)) {
			continue
		}
		group.Go(func() error {
			if err := f.one(ctx, c, f.partial.disk, places[c.Content]); err != nil {
				return fmt.Errorf("layer %d (disk offset %d, blob %s): %w", c.Layer, c.Offset, c.Blob.Short(), err)
			}
			return nil
		})
	}
	return group.Wait()
}

// file brings a piece that is a file of its own.
func (f *fetch) file(ctx context.Context, c image.Chunk, name string) error {
	path := filepath.Join(f.partial.dir, name)
	info, err := os.Stat(path)
	if err == nil && info.Size() == c.Size && f.partial.journal.has(itemOf(c)) {
		return nil
	}
	if c.Content == "" { // an image without it: an empty file stands for it in clones
		return diskError(writeFile(path, nil))
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return diskError(err)
	}
	f.small = append(f.small, file) // by one goroutine: the VM config is before all else
	if err := file.Truncate(c.Size); err != nil {
		return diskError(err)
	}
	if err := f.one(ctx, c, file, []int64{0}); err != nil {
		return fmt.Errorf("fetching the %s (%s): %w", names[itemOf(c).kind], c.Blob.Short(), err)
	}
	return nil
}

// one brings one piece: from a ready image, else from a source.
func (f *fetch) one(ctx context.Context, c image.Chunk, file *os.File, offsets []int64) error {
	if err := f.await(ctx); err != nil {
		return err
	}
	done := false
	if _, begun := f.partial.journal.mark(itemOf(c)); !begun { // else its bytes must stay
		var err error
		if done, err = f.local(ctx, c, file, offsets); err != nil {
			return err
		}
	}
	p := &piece{fetch: f, chunk: c, item: itemOf(c), file: file, offsets: offsets}
	defer f.free(p)
	if !done {
		if err := p.run(ctx); err != nil {
			return err
		}
	}
	f.committer.offer(p.stream, file, note{item: p.item})
	return nil
}

// engage gives a piece that has a supply a stream. There are as many as supplies at a
// time: who may have one was decided when it was chosen.
func (f *fetch) engage(p *piece) {
	if p.stream != nil {
		return
	}
	select {
	case p.stream = <-f.streams:
	default:
		p.stream = &stream{buffer: bufio.NewReaderSize(nil, readSize)}
	}
}

// free gives a piece's stream to the next one.
func (f *fetch) free(p *piece) {
	if p.stream == nil {
		return
	}
	p.stream.buffer.Reset(nil)
	select {
	case f.streams <- p.stream:
	default: // one too many: a supply was given up before its piece's stream
	}
}
