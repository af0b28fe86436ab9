package ssh

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	xssh "golang.org/x/crypto/ssh"
)

func wireKey(t *testing.T) []byte {
	t.Helper()
	_, public := newKey(t)
	key, _, _, _, err := xssh.ParseAuthorizedKey([]byte(public))
	must(t, err)
	return key.Marshal()
}

// TestChangedHostKey: a server with another key than at first sight is refused before a
// password is sent, until a person forgets the key.
func TestChangedHostKey(t *testing.T) {
	s := startSSHD(t)
	path := filepath.Join(t.TempDir(), "hosts")
	keys, err := OpenHostKeys(path)
	must(t, err)
	dial := func(name string) error {
		c, err := Dial(t.Context(), s.conn(t), Config{Login: s.byKey(), HostKey: keys, Key: name})
		if err == nil {
			c.Close()
		}
		return err
	}
	must(t, dial("sha256:one"))
	must(t, dial("sha256:one"))
	s.kill(t)
	s.newHostKey(t)
	s.start(t)
	err = dial("sha256:one")
	if !errors.Is(err, ErrHostKey) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "first boot") {
		t.Errorf("another key: %v", err)
	}
	if log, _ := os.ReadFile(filepath.Join(s.dir, "log")); strings.Count(string(log), "Accepted") != 2 {
		t.Errorf("the server was told who we are:\n%s", log)
	}
	must(t, dial("sha256:two")) // another image may have any key
	text, err := os.ReadFile(path)
	must(t, err)
	_, rest, _ := strings.Cut(string(text), "\n")
	must(t, os.WriteFile(path, []byte("# by hand\n\n"+rest), 0o600))
	must(t, dial("sha256:one"))
}

// TestHostKeysTogether: many at once, in two processes, lose no key.
func TestHostKeysTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts")
	if other := os.Getenv("PADDOCK_HOSTKEYS"); other != "" {
		path = other
	}
	var wg sync.WaitGroup
	if os.Getenv("PADDOCK_HOSTKEYS") == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestHostKeysTogether$", "-test.count=1")
		cmd.Env = append(os.Environ(), "PADDOCK_HOSTKEYS="+path)
		wg.Go(func() {
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("the other process: %v: %s", err, out)
			}
		})
	}
	for i := range 20 {
		wg.Go(func() {
			keys, err := OpenHostKeys(path)
			if err == nil {
				err = keys.Check(fmt.Sprintf("sha256:%d-%d", os.Getpid(), i), wireKey(t))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if os.Getenv("PADDOCK_HOSTKEYS") != "" {
		return
	}
	keys, err := OpenHostKeys(path)
	must(t, err)
	pins, err := keys.load()
	must(t, err)
	if len(pins) != 40 {
		t.Errorf("%d pins, want 40", len(pins))
	}
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode())
	}
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 2 { // and the lock
		t.Errorf("left beside: %v", entries)
	}
}

// TestHostKeysBroken: a file that cannot be read trusts nobody.
func TestHostKeysBroken(t *testing.T) {
	for _, text := range []string{"sha256:x\n", "sha256:x ssh-ed25519 !!!\n", "sha256:x ssh-ed25519 AAAA\n", strings.Repeat("#", maxPinsFile+1)} {
		path := filepath.Join(t.TempDir(), "hosts")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		if _, err := OpenHostKeys(path); err == nil {
			t.Errorf("%.40q was read", text)
		}
		if err := (&KeyFile{path: path}).Check("sha256:x", wireKey(t)); err == nil {
			t.Errorf("%.40q: a key was trusted", text)
		}
	}
	keys, err := OpenHostKeys(filepath.Join(t.TempDir(), "hosts"))
	must(t, err)
	for _, name := range []string{"", "a b", "a\nb", "#a", strings.Repeat("x", maxPinName+1)} {
		if err := keys.Check(name, wireKey(t)); err == nil {
			t.Errorf("%.40q was taken for a name", name)
		}
	}
	if err := keys.Check("a", []byte("no key")); err == nil {
		t.Error("something was taken for a key")
	}
	if _, err := OpenHostKeys(t.TempDir()); err == nil {
		t.Error("a directory was read")
	}
}
