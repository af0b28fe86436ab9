package vm_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/paddock-ci/paddock/vm"
)

// A copy is the whole file and nobody else's, never takes another's place, and is not
// there at all if it failed.
func TestCopyFile(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := os.WriteFile(src, []byte("all of it"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := vm.CopyFile(t.Context(), src, dst); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dst)
	if raw, _ := os.ReadFile(dst); string(raw) != "all of it" || err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%q, %v, %v", raw, info, err)
	}
	if err := vm.CopyFile(t.Context(), src, dst); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over another file: %v", err)
	}
	if err := vm.CopyFile(t.Context(), filepath.Join(dir, "none"), filepath.Join(dir, "c")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no file: %v", err)
	}
	if err := vm.CopyFile(t.Context(), dir, filepath.Join(dir, "c")); err == nil {
		t.Error("a directory was copied")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := vm.CopyFile(ended, src, filepath.Join(dir, "c")); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "c")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left of what failed: %v", err)
	}
}
