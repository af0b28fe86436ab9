package cache

import (
	"errors"
	"io"

	"github.com/paddock-ci/paddock/image"
)

// OpenParts opens blobs that follow each other as one, from a byte on: what a Source
// does for a chunk that is cut over several. Each is opened when the one before it has
// ended, the first at once; open is given the byte of the blob to begin with.
func OpenParts(parts []image.Blob, from int64, open func(b image.Blob, from int64) (io.ReadCloser, error)) (io.ReadCloser, error) {
	for len(parts) > 0 && from >= parts[0].Size {
		from -= parts[0].Size
		parts = parts[1:]
	}
	p := &partReader{parts: parts, open: open}
	if len(parts) == 0 {
		return p, nil
	}
	return p, p.next(from)
}

// partReader reads one blob after the other.
type partReader struct {
	parts []image.Blob // not opened yet
	open  func(b image.Blob, from int64) (io.ReadCloser, error)
	body  io.ReadCloser // nil: between two
}

// next opens the next blob.
func (p *partReader) next(from int64) (err error) {
	p.body, err = p.open(p.parts[0], from)
	if err != nil {
		p.body = nil
		return err
	}
	p.parts = p.parts[1:]
	return nil
}

func (p *partReader) Read(b []byte) (int, error) {
	for {
		if p.body == nil {
			if len(p.parts) == 0 {
				return 0, io.EOF
			}
			if err := p.next(0); err != nil {
				return 0, err
			}
		}
		n, err := p.body.Read(b)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			if errors.Is(err, io.EOF) {
				err = nil // it comes again, or the next blob does
			}
			return n, err
		}
		if err != nil {
			if err := p.Close(); err != nil {
				return 0, err
			}
		}
	}
}

// Close closes the blob that is open.
func (p *partReader) Close() error {
	if p.body == nil {
		return nil
	}
	body := p.body
	p.body = nil
	return body.Close()
}
