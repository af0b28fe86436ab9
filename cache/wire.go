package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/image"
)

// wire is the bytes of a piece, from one supply after another: when one fails, the next
// goes on at the byte, as long as it gives the same bytes.
type wire struct {
	fetch *fetch
	chunk image.Chunk
	tried map[string]error // sources that failed, by name
	used  map[string]Kind  // sources whose bytes are in the piece, by name

	supply *supply
	body   io.ReadCloser // nil: supply, if there is one, is not opened yet
	late   error         // what body said together with its last bytes
	raw    bool          // bytes are of the content
	at     int64         // the next byte
	end    int64
	fixed  bool // raw cannot change any more
}

// start makes the wire begin at a border; it fails with errAnew if there are only supplies
// of the other kind.
func (w *wire) start(ctx context.Context, border mark) error {
	w.at, w.fixed = border.in, border.in > 0
	if w.fixed {
		w.raw = border.raw
	} else {
		w.used = make(map[string]Kind)
	}
	return w.open(ctx)
}

// open chooses a supply and opens it, until one can be opened.
func (w *wire) open(ctx context.Context) error {
	want := Want{Ref: w.fetch.ref, Image: w.fetch.entry.Digest, Chunk: w.chunk}
	for w.body == nil {
		if w.supply == nil {
			if err := w.fetch.await(ctx); err != nil {
				return err
			}
			s, err := w.fetch.choose(ctx, want, w.tried)
			if err != nil {
				return err
			}
			w.supply = s
		}
		// What is no chunk is the same, as content and as a blob.
		raw := w.supply.raw() || w.chunk.Index < 0
		if w.fixed && raw != w.raw {
			return errAnew
		}
		w.raw, w.fixed = raw, true
		if w.end = w.chunk.BlobSize; raw {
			w.end = w.chunk.Size
		}
		body, err := w.supply.open(ctx, want, w.at)
		if err != nil {
			if err := w.fail(ctx, err); err != nil {
				return err
			}
			w.fixed = w.at > 0
			continue
		}
		w.body = body
		w.used[w.supply.source.Name()] = w.supply.source.Kind()
	}
	return nil
}

// fail gives up the supply; its error is the wire's only if nobody wants the bytes any
// more.
func (w *wire) fail(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	w.tried[w.supply.source.Name()] = err
	w.drop(err)
	return nil
}

// drop closes what is open; err is how it went with the supply.
func (w *wire) drop(err error) {
	if w.body != nil {
		_ = w.body.Close() // what it had to say it said when it was read
	}
	if w.supply != nil {
		w.supply.ended(err)
	}
	w.body, w.supply, w.late = nil, nil, nil
}

// rewind makes the wire ready for another start, if it has sent anything.
func (w *wire) rewind() {
	if w.body != nil {
		w.drop(context.Canceled)
	}
}

// blame notes whose bytes were wrong, so that they are not asked again: the only one that
// had a hand in it. If there were several, or some bytes came in a former pull, it may be
// any, and the registry, whose bytes are the origin of the others', gets another chance.
func (w *wire) blame(err error, resumed bool) {
	alone := len(w.used) == 1 && !resumed
	origins := 0
	for name, kind := range w.used {
		if alone || kind != KindRegistry {
			w.tried[name] = err
		} else {
			origins++
		}
	}
	if origins == len(w.used) && !resumed {
		for name := range w.used { // several registries: they may all be wrong
			w.tried[name] = err
		}
	}
	w.drop(err)
}

// hands are the names of those whose bytes are in the piece.
func (w *wire) hands() string {
	return strings.Join(slices.Sorted(maps.Keys(w.used)), " and ")
}

// reader reads the wire under a context.
func (w *wire) reader(ctx context.Context) io.Reader {
	return wireReader(func(b []byte) (int, error) { return w.read(ctx, b) })
}

type wireReader func([]byte) (int, error)

func (f wireReader) Read(b []byte) (int, error) { return f(b) }

func (w *wire) read(ctx context.Context, b []byte) (int, error) {
	for {
		if w.at == w.end {
			return 0, io.EOF
		}
		if err := w.open(ctx); err != nil {
			return 0, err
		}
		err := w.late
		if err == nil {
			var n int
			n, err = w.body.Read(b[:min(int64(len(b)), w.end-w.at)])
			w.at += int64(n)
			if n > 0 || err == nil {
				w.late = err
				return n, nil
			}
		}
		if errors.Is(err, io.EOF) {
			err = &Error{Class: ClassDigest, Err: fmt.Errorf("%s: it ends after %d of %d bytes", w.supply.source.Name(), w.at, w.end)}
		}
		if err := w.fail(ctx, err); err != nil {
			return 0, err
		}
	}
}
