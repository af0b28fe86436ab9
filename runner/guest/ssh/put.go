package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Put writes a file of exactly f.Size bytes of r in the guest: beside its place and then
// renamed, so that it is there as a whole or not at all. A relative path is below the
// runner's directory. What r has beyond the size is not read.
func (c *Client) Put(ctx context.Context, f guest.File, r io.Reader) error {
	err := checkFile(f)
	if err == nil {
		err = c.put(ctx, f, r)
	}
	if err != nil {
		return fmt.Errorf("putting %s into the guest: %w", f.Path, err)
	}
	c.log.Debug("file put into the guest over SSH", "path", f.Path, "bytes", f.Size)
	return nil
}

func checkFile(f guest.File) error {
	switch {
	case f.Path == "" || strings.HasSuffix(f.Path, "/") || strings.ContainsRune(f.Path, 0) || len(f.Path) > maxLine:
		return errors.New("not the path of a file")
	case f.Size < 0:
		return errors.New("the size must be known")
	}
	return nil
}

func (c *Client) put(ctx context.Context, f guest.File, r io.Reader) error {
	mode := f.Mode.Perm()
	if mode == 0 {
		mode = 0o600
	}
	text := script(scriptPut, "dir="+quotePath(c.dir), "path="+quotePath(f.Path),
		fmt.Sprintf("mode=%04o", mode), fmt.Sprintf("size=%d", f.Size))
	// The guest, which counts as well, hears of a source that is short by its end.
	input := &exactly{r: r, left: f.Size}
	return c.run(ctx, job{script: text, input: input, answer: func(r *reader) error { return r.word("ok") }})
}

// exactly is the first bytes of a reader, which must not have fewer.
type exactly struct {
	r    io.Reader
	left int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	if errors.Is(err, io.EOF) {
		if err = nil; e.left > 0 {
			err = fmt.Errorf("%w: %d bytes are missing", io.ErrUnexpectedEOF, e.left)
		}
	}
	return n, err
}

// Output passes on what is kept of the runner's output, the last MiB or more and 2.5 MiB
// at most, and then what follows, until the runner has exited; if there is none yet it
// waits for it. A slow reader does not stop the runner: what it misses is left out.
func (c *Client) Output(ctx context.Context, p func([]byte)) error {
	err := c.run(ctx, job{script: script(scriptOutput), hold: true, answer: func(r *reader) error {
		piece := make([]byte, maxPiece)
		for {
			n, err := r.Read(piece)
			if n > 0 {
				p(piece[:n])
			}
			if errors.Is(err, io.EOF) {
				return r.ended()
			}
			if err != nil {
				return err
			}
		}
	}})
	if err != nil {
		return fmt.Errorf("following the runner's output: %w", err)
	}
	return nil
}
