package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// removeTree removes a clone with all that a job may have left in it. A job of the
// process driver may leave directories without write permission (a Go module cache is
// full of them), which nobody but root can empty before their modes are changed.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if opened := openUp(dir); opened != nil {
		return errors.Join(err, opened)
	}
	return os.RemoveAll(dir)
}

// openUp lets the owner into every directory of the tree. Links are not followed, and
// through os.Root nothing outside is changed even if something changes the tree meanwhile.
func openUp(dir string) error {
	top, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("making a clone removable: %w", err)
	}
	if !top.IsDir() {
		return nil
	}
	if err := os.Chmod(dir, top.Mode().Perm()|ownerAll); err != nil { // or it could not be opened
		return fmt.Errorf("making a clone removable: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("making a clone removable: %w", err)
	}
	defer func() { _ = root.Close() }()
	// The walk names a directory before it reads it, so it can be opened up in between.
	err = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Mode()&ownerAll == ownerAll {
			return err
		}
		return root.Chmod(path, info.Mode().Perm()|ownerAll)
	})
	if err != nil {
		return fmt.Errorf("making a clone removable: %w", err)
	}
	return nil
}

// ownerAll is what the owner of a directory needs to list, enter and empty it.
const ownerAll = 0o700
