package node

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// asOther says that this process is TestRemoveTree again, as a user whom modes bind.
const asOther = "PADDOCK_TEST_AS_OTHER"

// TestRemoveTree removes what a job left without write permission: a directory with a
// file, one within another, one that cannot even be listed, a link that leads out of the
// clone, and the clone itself. Root may do all of it anyway, so root becomes nobody.
func TestRemoveTree(t *testing.T) {
	if os.Getuid() == 0 {
		dir := t.TempDir()
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		t.Chdir(dir) // inherited: the other user may not be able to come here by the path
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		if runtime.GOOS == "linux" {
			self = "/proc/self/exe" // go test builds in a directory of its own user's
		}
		again := exec.CommandContext(t.Context(), self, "-test.run=^TestRemoveTree$", "-test.v")
		again.Env = append(os.Environ(), asOther+"=yes")
		again.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := again.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestRemoveTree")) {
			t.Fatalf("as another user: %v\n%s", err, out)
		}
		return
	}
	if os.Getenv(asOther) == "" {
		t.Chdir(t.TempDir())
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir("outside", 0o555))
	must(os.MkdirAll("clone/a/b", 0o755))
	must(os.MkdirAll("clone/closed/c", 0o755))
	must(os.WriteFile("clone/a/b/file", nil, 0o444))
	must(os.Symlink(filepath.Join("..", "outside"), "clone/link"))
	for _, dir := range []struct {
		path string
		mode fs.FileMode
	}{{"clone/a/b", 0o555}, {"clone/a", 0o555}, {"clone/closed", 0}, {"clone", 0o500}} {
		must(os.Chmod(dir.path, dir.mode))
	}
	if err := os.RemoveAll("clone/a"); !errors.Is(err, fs.ErrPermission) {
		t.Fatalf("the tree is no obstacle to this user: %v", err)
	}
	must(removeTree("clone"))
	if _, err := os.Lstat("clone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the clone is still there: %v", err)
	}
	outside, err := os.Stat("outside")
	must(err)
	if outside.Mode().Perm() != 0o555 {
		t.Errorf("a directory outside the clone got mode %v", outside.Mode())
	}
	must(removeTree("clone")) // a teardown may find nothing to do
}

// nobody is the user and group that owns nothing, on Linux.
const nobody = 65534
