package cache_test

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/image"
)

// Blobs of 3, 4 and 5 bytes are one of 12, from each byte on, and whatever is opened is
// closed, one at a time.
func TestOpenParts(t *testing.T) {
	whole := []byte("abcdefghijkl")
	parts := []image.Blob{{Digest: "0", Size: 3}, {Digest: "3", Size: 4}, {Digest: "7", Size: 5}}
	opened := 0
	open := func(b image.Blob, from int64) (io.ReadCloser, error) {
		if opened++; opened > 1 {
			t.Error("two blobs are open at once")
		}
		start := int64(b.Digest[0] - '0')
		return closer{iotest.OneByteReader(bytes.NewReader(whole[start+from : start+b.Size])), func() { opened-- }}, nil
	}
	for from := range len(whole) + 1 {
		body, err := cache.OpenParts(parts, int64(from), open)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		if err != nil || !bytes.Equal(got, whole[from:]) {
			t.Errorf("from %d: %q, %v; want %q", from, got, err, whole[from:])
		}
		if err := body.Close(); err != nil || opened != 0 {
			t.Errorf("from %d: closing: %v, %d blobs are open", from, err, opened)
		}
	}
	broken := errors.New("broken")
	body, err := cache.OpenParts(parts, 0, func(b image.Blob, from int64) (io.ReadCloser, error) {
		if b.Digest == "3" {
			return nil, broken
		}
		return open(b, from)
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(body); !errors.Is(err, broken) || string(got) != "abc" {
		t.Errorf("%q, %v; want the first blob and the error", got, err)
	}
}

type closer struct {
	io.Reader
	close func()
}

func (c closer) Close() error { c.close(); return nil }
