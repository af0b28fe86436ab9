package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// maxFile bounds a file that is put, in bytes: more than any runner's archive, less than
// what fills a disk by mistake.
const maxFile = 16 << 30

// put writes a file that the host streams. What is written is beside the file's place
// until it is whole, and removed if that never comes.
func (s *session) put(ctx context.Context, r *request, f frame) (err error) {
	var b putBody
	if err := f.decode(&b); err != nil {
		return err
	}
	path, err := s.agent.place(b)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making the file's directory: %w", err)
	}
	beside, err := os.CreateTemp(filepath.Dir(path), ".paddock-put-*")
	if err != nil {
		return fmt.Errorf("writing beside the file: %w", err)
	}
	defer func() {
		_ = beside.Close() // an error that matters was seen when it was synced
		if err != nil {
			_ = os.Remove(beside.Name())
		}
	}()
	if err := s.fill(ctx, r, beside, b.Size); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	mode := b.Mode.Perm()
	if mode == 0 {
		mode = 0o600
	}
	if err := beside.Chmod(mode); err != nil {
		return fmt.Errorf("setting the file's mode: %w", err)
	}
	if err := beside.Sync(); err != nil {
		return fmt.Errorf("writing %s to the disk: %w", path, err)
	}
	if err := os.Rename(beside.Name(), path); err != nil {
		return fmt.Errorf("moving the file to its place: %w", err)
	}
	s.send(kindDone, r.id, nil)
	return nil
}

// place is where a file goes.
func (a *agent) place(b putBody) (string, error) {
	switch {
	case b.Path == "" || len(b.Path) > maxText || strings.ContainsRune(b.Path, 0):
		return "", errors.New("a file needs a path of at most 1024 bytes")
	case strings.HasSuffix(b.Path, "/"):
		return "", fmt.Errorf("%q is a directory's name, not a file's", b.Path)
	case strings.HasPrefix(b.Path, "~"):
		return "", fmt.Errorf("%q: the agent knows no home directories: give an absolute path, or one below its directory", b.Path)
	case b.Size < 0 || b.Size > maxFile:
		return "", fmt.Errorf("%q has %d bytes, at most %d", b.Path, b.Size, int64(maxFile))
	case filepath.IsAbs(b.Path):
		return filepath.Clean(b.Path), nil
	case !filepath.IsLocal(b.Path):
		return "", fmt.Errorf("%q leaves the agent's directory: give an absolute path", b.Path)
	}
	return filepath.Join(a.config.Dir, b.Path), nil
}

// fill asks for the data piece by piece; it is never more than size.
func (s *session) fill(ctx context.Context, r *request, to *os.File, size int64) error {
	if !s.send(kindTaken, r.id, nil) { // the host may begin
		return ErrLost
	}
	for size > 0 {
		var piece []byte
		select {
		case piece = <-r.data:
		case <-ctx.Done():
			return ctx.Err()
		}
		if int64(len(piece)) > size {
			return errors.New("the file is longer than was said")
		}
		if _, err := to.Write(piece); err != nil {
			return err
		}
		size -= int64(len(piece))
		if !s.send(kindTaken, r.id, nil) {
			return ErrLost
		}
	}
	return nil
}
