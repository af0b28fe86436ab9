package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// The only source wants to be left alone for two minutes, then does not say how long: a
// pull is not tried again before that, and for longer than an hour nobody is waited for.
func TestRetryAfterWasForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, "A")
		registry := newWell("registry", KindRegistry, shelf, 1e6)
		s := openWells(t, Config{}, registry)
		for wait, want := range map[time.Duration]time.Duration{2 * time.Minute: 2 * time.Minute, 0: 0, 30 * time.Hour: time.Hour} {
			busy := &Error{Class: ClassNetwork, Err: errors.New("429")}
			if wait > 0 {
				busy.RetryAt = time.Now().Add(wait)
			}
			registry.set(func() { registry.fail = fmt.Errorf("registry: %w", busy) })
			var failure *Error
			if err := s.Pull(t.Context(), h); !errors.As(err, &failure) {
				t.Fatal(err)
			}
			if got := time.Until(failure.RetryAt); want > 0 && got != want || got < 5*time.Second {
				t.Errorf("asked to wait for %s, it waits for %s; want %s", wait, got, want)
			}
			if i := s.List()[0]; !i.RetryAt.Equal(failure.RetryAt) {
				t.Errorf("listed as %+v", i)
			}
			time.Sleep(2 * retryMost) // and the source rests no longer
		}
		registry.set(func() { registry.fail = nil })
		pullTook(t, s, h)
		if s.List()[0].State != fleet.ImageReady || registry.count() < len(m.Pieces()) {
			t.Errorf("listed as %+v", s.List()[0])
		}
	})
}

// A mirror wants to be left alone for ten minutes: it is not asked meanwhile, as long as
// there is the registry.
func TestSourceRestsAsLongAsItAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		mirror, registry := newWell("mirror", KindMirror, shelf, 1e6), newWell("registry", KindRegistry, shelf, 1e6)
		s := openWells(t, Config{Streams: 1}, mirror, registry)
		h, _ := shelf.put(t, "AB")
		mirror.fail = &Error{Class: ClassNetwork, RetryAt: time.Now().Add(10 * time.Minute), Err: errors.New("503")}
		pullTook(t, s, h)
		mirror.set(func() { mirror.fail, mirror.asked = nil, nil })
		time.Sleep(9 * time.Minute)
		h, _ = shelf.put(t, "CD")
		if pullTook(t, s, h); mirror.count() != 0 {
			t.Errorf("it was asked %d times while it wanted none", mirror.count())
		}
		time.Sleep(2 * time.Minute)
		h, _ = shelf.put(t, "EF")
		if pullTook(t, s, h); mirror.count() == 0 {
			t.Error("it was not asked any more")
		}
	})
}

// Of several that failed, the first that wants to be asked again counts.
func TestRetryAt(t *testing.T) {
	now := time.Now()
	at := func(d time.Duration) error { return fmt.Errorf("x: %w", &Error{RetryAt: now.Add(d), Err: io.EOF}) }
	for name, test := range map[string]struct {
		err  error
		want time.Time
	}{
		"none":     {nil, time.Time{}},
		"not said": {&Error{Err: io.EOF}, time.Time{}},
		"inside":   {&Error{Err: at(time.Minute)}, now.Add(time.Minute)},
		"first":    {errors.Join(io.EOF, at(3*time.Minute), at(2*time.Minute)), now.Add(2 * time.Minute)},
	} {
		if got := retryAt(test.err); !got.Equal(test.want) {
			t.Errorf("%s: %s; want %s", name, got, test.want)
		}
	}
}

// forgetful is a codec that takes no mark.
type forgetful struct{ tart.Codec }

func (c forgetful) NewDecoder(r io.Reader, chunk image.Chunk, at image.Mark) (image.Decoder, error) {
	if at.In > 0 {
		return nil, fmt.Errorf("%w: byte %d", tart.ErrMark, at.In)
	}
	return c.Codec.NewDecoder(r, chunk, at)
}

// A mark that the decoder does not take is dropped, and the piece begins anew; it was taken
// for an error of the network, of which the next try made another.
func TestMarkThatNobodyTakes(t *testing.T) {
	shelf := newShelf()
	h, m := shelf.put(t, "AB")
	cfg := Config{Dir: t.TempDir(), Sources: []Source{shelf}, Codecs: []image.Codec{forgetful{}}}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	p, err := s.openPartial(h)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.openDisk(m.DiskSize); err != nil {
		t.Fatal(err)
	}
	c := m.Chunks[0]
	blob, half := shelf.blobs[c.Blob], int64(100)
	if _, err := p.disk.WriteAt(letter('A')[:half], 0); err != nil {
		t.Fatal(err)
	}
	hashed := func(b []byte) []byte {
		sum := sha256.New()
		_, _ = sum.Write(b) // never fails
		return saveState(nil, sum)
	}
	begun := mark{in: half, out: half, blob: hashed(blob[:half]), content: hashed(letter('A')[:half])}
	if err := p.journal.add([]note{{item: itemOf(c), mark: &begun}}); err != nil {
		t.Fatal(err)
	}
	p.close()
	if err := s.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
}
