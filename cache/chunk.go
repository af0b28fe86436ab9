package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// windowSize is how far back a block may refer, and so what a decoder is given of the
// content before a mark.
const windowSize = 64 << 10

// piece is a part of an image on its way to the disk. One goroutine works on it:
//
//	choose a supply → open it at the border → hash the blob → decode → hash the content
//	→ write → note the border now and then → both digests are right → note the end
//
// The border is where the last whole block ended. From there it can begin again, with
// another supply of the same bytes or in another process.
type piece struct {
	fetch   *fetch
	chunk   image.Chunk
	item    item
	file    *os.File
	offsets []int64
	stream  *stream

	border  mark // the states in it are overwritten at the next one
	offered int64
	told    time.Time // when a mark was offered, or the first byte came
	marked  bool      // the journal has a mark of it, or soon will
	resumed bool      // what is before the border came in another pull
	touched bool      // what is behind the border may not be zeros
}

// readSize is how much is read of a body at a time: enough that a system call for each is
// nothing, and 16 streams of it are 2 MiB.
const readSize = 128 << 10

// errAnew ends an attempt of which nothing can be used, for another one to begin.
var errAnew = errors.New("begin the piece anew")

// spoilt marks an error as the sources': they sent other bytes than were asked for.
type spoilt struct{ error }

func (s spoilt) Unwrap() error { return s.error }

// pushed marks an error as the image's: the blob is right and its content is not.
type pushed struct{ error }

func (p pushed) Unwrap() error { return p.error }

func spoiltf(format string, args ...any) error {
	return spoilt{&Error{Class: ClassDigest, Err: fmt.Errorf(format, args...)}}
}

// run brings the piece here from supplies. When it fails, what came up to the border is kept.
func (p *piece) run(ctx context.Context) (err error) {
	w := &wire{fetch: p.fetch, chunk: p.chunk, tried: make(map[string]error), used: make(map[string]Kind)}
	defer func() {
		if err != nil {
			w.drop(context.Canceled) // whatever it was, it was not the fault of this one
			return
		}
		w.drop(nil)
	}()
	if m, ok := p.fetch.partial.journal.mark(p.item); ok {
		p.border, p.offered, p.marked, p.resumed, p.touched = m.clone(), m.in, true, true, true
	}
	for {
		err := p.attempt(ctx, w)
		var wrong spoilt
		var bad pushed
		switch {
		case err == nil:
			return nil
		case errors.As(err, &wrong):
			w.blame(wrong.error, p.resumed) // as it is, for it comes back when nobody is left
		case errors.Is(err, errAnew):
			w.rewind()
		case errors.As(err, &bad) && p.resumed:
			// Perhaps the disk is not what it was when the mark was made.
			w.rewind()
		default:
			p.offer()
			return err
		}
		if err := p.anew(ctx); err != nil {
			return err
		}
	}
}

// anew goes back to the beginning. The journal must not promise any more what is about to
// be overwritten.
func (p *piece) anew(ctx context.Context) error {
	p.border, p.offered, p.resumed, p.touched = mark{}, 0, false, true
	if !p.marked {
		return nil
	}
	p.marked = false
	return p.fetch.committer.commitNow(ctx, p.stream, p.file, note{item: p.item, mark: &mark{}})
}

// attempt goes from the border to the end, as long as there are supplies of one kind.
func (p *piece) attempt(ctx context.Context, w *wire) error {
	if err := w.start(ctx, p.border); err != nil {
		return err
	}
	p.fetch.engage(p)
	p.told = time.Now()
	p.border.raw = w.raw
	content, err := p.contentHash()
	if err != nil {
		return err
	}
	out := &sparseWriter{file: p.file, offsets: p.offsets, at: p.border.out}
	switch rest := shifted(p.offsets, p.border.out); {
	case p.chunk.Index < 0: // a small file, written as it is
	case p.touched:
		out.clean = punch(p.file, rest, p.chunk.Size-p.border.out)
	default:
		out.clean = p.fetch.partial.clean(p.file, rest, p.chunk.Size)
	}
	p.touched = true
	if w.raw {
		raw := &rawDecoder{r: w.reader(ctx), buffer: make([]byte, readSize), at: p.border.in, size: p.chunk.Size}
		if err := p.copy(ctx, raw, nil, content, out); err != nil {
			return err
		}
	} else if err := p.decode(ctx, w, content, out); err != nil {
		return err
	}
	if got := sum(content); got != p.chunk.Content && !p.chunk.Legacy() {
		if w.raw {
			return spoiltf("the digest is %s, want %s: wrong bytes came from %s", got, p.chunk.Content, w.hands())
		}
		return pushed{&Error{Class: ClassDigest, Err: fmt.Errorf("the content's digest is %s, the manifest says %s: the image was pushed wrongly", got, p.chunk.Content)}}
	}
	return nil
}

// contentHash is the SHA-256 of the content up to the border; a state that is none makes
// the piece begin anew.
func (p *piece) contentHash() (hash.Hash, error) {
	if p.border.out == 0 {
		return sha256.New(), nil
	}
	if p.chunk.Legacy() && p.border.content == nil {
		return sha256.New(), nil // nobody asks for its sum
	}
	h, ok := loadState(p.border.content, p.border.out)
	if !ok || p.border.out > p.chunk.Size {
		return nil, errAnew
	}
	return h, nil
}

// decode reads a blob from the border to its end.
func (p *piece) decode(ctx context.Context, w *wire, content hash.Hash, out io.Writer) error {
	blob, ok := newVerifier(p.chunk, p.border)
	if !ok {
		return errAnew
	}
	at := image.Mark{In: p.border.in, Out: p.border.out}
	if at.Out > 0 {
		var err error
		if at.Window, err = before(p.file, p.offsets[0]+at.Out, p.offsets[0], windowSize); err != nil {
			return diskError(err)
		}
	}
	p.stream.buffer.Reset(w.reader(ctx))
	in := io.TeeReader(p.stream.buffer, blob)
	decoder, err := p.fetch.codec.NewDecoder(in, p.chunk, at)
	if errors.Is(err, tart.ErrMark) && at.In > 0 {
		return errAnew
	}
	if err != nil {
		return err
	}
	err = p.copy(ctx, decoder, blob, content, out)
	if err == nil {
		return blob.whole()
	}
	if ClassOf(err) != ClassFormat {
		return err
	}
	// Read to the end also what does not decode: if the digest of the blob is wrong, the
	// bytes were spoilt on the way; if it is right, the image is bad as it was pushed.
	if _, rerr := io.Copy(io.Discard, io.LimitReader(in, blob.left)); rerr != nil {
		if wrong := (spoilt{}); errors.As(rerr, &wrong) {
			return spoilt{fmt.Errorf("%w; %w", wrong.error, err)}
		}
		return rerr
	}
	return pushed{err}
}

// copy takes what the decoder gives to the disk. blob is nil if the bytes are not a blob's.
func (p *piece) copy(ctx context.Context, d image.Decoder, blob *verifier, content hash.Hash, out io.Writer) error {
	for {
		block, err := d.Next()
		if err == io.EOF { //nolint:errorlint // a reader's own error that wraps it is no end
			return nil
		}
		if err != nil {
			return err
		}
		if !p.chunk.Legacy() {
			_, _ = content.Write(block) // never fails
		}
		if _, err := out.Write(block); err != nil {
			return err
		}
		at := d.Mark()
		took := at.In - p.border.in
		p.border.in, p.border.out = at.In, at.Out
		if blob != nil {
			p.border.blob = saveState(p.border.blob, blob.hash)
		}
		if !p.chunk.Legacy() {
			p.border.content = saveState(p.border.content, content)
		}
		if err := p.pace(ctx, took); err != nil {
			return err
		}
	}
}

// pace offers a mark when it is time for one, and waits while too much is not on disk yet.
func (p *piece) pace(ctx context.Context, took int64) error {
	hold, err := p.fetch.committer.took(p.stream, took)
	if err != nil {
		return err
	}
	due := p.border.in-p.offered >= markEvery || time.Since(p.told) >= commitEvery
	if hold == nil && !due || !p.offer() {
		return nil
	}
	for hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if hold, err = p.fetch.committer.took(p.stream, 0); err != nil {
			return err
		}
	}
	return nil
}

// offer hands the border in for the journal; false: there is none that can be.
func (p *piece) offer() bool {
	m := p.border.clone()
	if m.out == 0 || m.raw == (m.blob != nil) || p.chunk.Legacy() == (m.content != nil) {
		return false
	}
	p.offered, p.told, p.marked = m.in, time.Now(), true
	p.fetch.committer.offer(p.stream, p.file, note{item: p.item, mark: &m})
	return true
}

// rawDecoder gives content that comes as it is.
type rawDecoder struct {
	r        io.Reader
	buffer   []byte
	at, size int64
}

// Next implements image.Decoder.
func (d *rawDecoder) Next() ([]byte, error) {
	if d.at == d.size {
		return nil, io.EOF
	}
	n := min(int64(len(d.buffer)), d.size-d.at)
	if _, err := io.ReadFull(d.r, d.buffer[:n]); err != nil {
		return nil, err
	}
	d.at += n
	return d.buffer[:n], nil
}

// Mark implements image.Decoder.
func (d *rawDecoder) Mark() image.Mark { return image.Mark{In: d.at, Out: d.at} }

// verifier holds the bytes of a blob, or of the blobs that it is cut over, to their
// digests: a Write fails as soon as one is wrong, and so do all after it.
type verifier struct {
	parts []image.Blob // the first one is under way
	hash  hash.Hash    // of the first one
	left  int64        // bytes of the first one
	err   error
}

// newVerifier goes on where a mark was made; false: it is no mark of this blob.
func newVerifier(c image.Chunk, at mark) (*verifier, bool) {
	v := &verifier{parts: c.Parts, hash: sha256.New()}
	if !c.Legacy() {
		v.parts = []image.Blob{{Digest: c.Blob, Size: c.BlobSize, MediaType: c.MediaType}}
	}
	in := at.in
	for len(v.parts) > 0 && in >= v.parts[0].Size {
		in -= v.parts[0].Size
		v.parts = v.parts[1:]
	}
	if len(v.parts) == 0 {
		return nil, false
	}
	v.left = v.parts[0].Size - in
	if at.in == 0 {
		return v, true
	}
	h, ok := loadState(at.blob, in)
	v.hash = h
	return v, ok
}

// Write implements io.Writer. It takes nothing of what it refuses: readers of a whole block
// would overlook an error that comes with all the bytes they want.
func (v *verifier) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0 && v.err == nil; {
		if len(v.parts) == 0 {
			v.err = spoiltf("bytes follow the blob's end")
			break
		}
		n := min(int64(len(rest)), v.left)
		_, _ = v.hash.Write(rest[:n]) // never fails
		v.left -= n
		rest = rest[n:]
		if v.left == 0 {
			v.err = v.next()
		}
	}
	if v.err != nil {
		return 0, v.err
	}
	return len(b), nil
}

// next verifies a part that is here in full.
func (v *verifier) next() error {
	if got := sum(v.hash); got != v.parts[0].Digest {
		return spoiltf("the blob's digest is %s, want %s: wrong bytes came", got, v.parts[0].Digest)
	}
	v.hash.Reset()
	if v.parts = v.parts[1:]; len(v.parts) > 0 {
		v.left = v.parts[0].Size
	}
	return nil
}

// whole fails unless every part was here in full and right.
func (v *verifier) whole() error {
	if v.err == nil && len(v.parts) > 0 {
		return pushed{fmt.Errorf("%w: %d bytes of the blob follow the end of its content", image.ErrMalformed, v.left)}
	}
	return v.err
}

func sum(h hash.Hash) fleet.Digest {
	return fleet.Digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
}
