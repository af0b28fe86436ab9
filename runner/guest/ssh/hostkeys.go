package ssh

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/runner/guest"
)

// HostKeys remembers which host key belongs to which image.
//
// A key is pinned per image digest, so that of all the clones of one image the second
// must show the key of the first. That is right for images with host keys in them, as
// every image has that somebody logged into before it was saved. An image that makes its
// keys at its first boot has others in every clone: nobody could tell such a clone from
// an impostor, so it is refused from the second on, and the error says what to do.
type HostKeys interface {
	// Check pins the key, in SSH's wire form, if the name is new, and returns ErrHostKey
	// if the name has another one.
	Check(name string, key []byte) error
}

// Bounds of the file of host keys. A line has about 200 bytes.
const (
	maxPins     = 4096    // the oldest is forgotten: a node sees a few images a day
	maxPinsFile = 4 << 20 // bytes; more was not written by us
	maxPinName  = 512     // bytes of a name; a digest has 71
)

// KeyFile is HostKeys in a file, which several processes may share: a lock beside it
// holds them apart, and it is replaced as a whole. Each line is a name, the key's type
// and the key in base64, as in authorized_keys; a person forgets a key by deleting its
// line, at any time.
type KeyFile struct {
	path string
}

// OpenHostKeys keeps host keys in the file at path, which appears with the first key;
// its directory must exist.
func OpenHostKeys(path string) (*KeyFile, error) {
	f := &KeyFile{path: path}
	if _, err := f.load(); err != nil {
		return nil, err
	}
	return f, nil
}

// pin is one line.
type pin struct {
	name string
	key  []byte // wire form
}

// Check pins the key if the name is new, and compares it otherwise.
func (f *KeyFile) Check(name string, key []byte) (err error) {
	if name == "" || len(name) > maxPinName || strings.ContainsAny(name, " \t\r\n#") {
		return fmt.Errorf("host key: %q is no name to pin a key under", guest.Plain(name, maxPinName))
	}
	if _, err := xssh.ParsePublicKey(key); err != nil {
		return fmt.Errorf("host key of %s: %w", name, err)
	}
	unlock, err := f.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	pins, err := f.load()
	if err != nil {
		return err
	}
	for _, p := range pins {
		if p.name != name {
			continue
		}
		if bytes.Equal(p.key, key) {
			return nil
		}
		return f.changed(name, p.key, key)
	}
	pins = append(pins, pin{name, key})
	return f.save(pins[max(0, len(pins)-maxPins):])
}

// changed is the error for another key: what happened, what it may mean, what to do.
func (f *KeyFile) changed(name string, old, shown []byte) error {
	return fmt.Errorf("%w: image %s showed %s when it was first booted, and now %s. "+
		"Either something else answers in its place, or the image makes its host keys at its first boot, so that every clone has its own: "+
		"boot it once, log in and save it as a new image, so that the keys are part of it. "+
		"To trust the new key on purpose, delete the line of %s from %s",
		ErrHostKey, name, fingerprint(old), fingerprint(shown), name, f.path)
}

func fingerprint(key []byte) string {
	parsed, err := xssh.ParsePublicKey(key)
	if err != nil {
		return "an unreadable key"
	}
	return parsed.Type() + " " + xssh.FingerprintSHA256(parsed)
}

// lock holds other processes off, and other goroutines: each call opens its own file.
func (f *KeyFile) lock() (unlock func() error, err error) {
	file, err := os.OpenFile(f.path+".lock", os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the host keys: %w", err)
	}
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("locking the host keys: %w", err)
	}
	return file.Close, nil // which gives the lock back
}

// load reads all pins; no file is no pins. A line that cannot be read is an error, since
// leaving it out would trust the next key that comes.
func (f *KeyFile) load() ([]pin, error) {
	file, err := os.Open(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the host keys: %w", err)
	}
	defer func() { _ = file.Close() }() // was read
	data, err := io.ReadAll(io.LimitReader(file, maxPinsFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading the host keys: %w", err)
	}
	if len(data) > maxPinsFile {
		return nil, fmt.Errorf("reading the host keys: %s has more than %d bytes: it is no file of host keys", f.path, maxPinsFile)
	}
	pins, err := parsePins(string(data))
	if err != nil {
		return nil, fmt.Errorf("reading the host keys: %s, %w", f.path, err)
	}
	return pins, nil
}

// parsePins reads the lines of a file; empty ones and comments are left out.
func parsePins(text string) ([]pin, error) {
	var pins []pin
	number := 0
	for line := range strings.Lines(text) {
		number++
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) != 3 {
			return nil, fmt.Errorf("line %d: want a name, a type and a key", number)
		}
		key, err := base64.StdEncoding.DecodeString(fields[2])
		if err != nil {
			return nil, fmt.Errorf("line %d: the key is not base64; delete the line to forget it", number)
		}
		parsed, err := xssh.ParsePublicKey(key)
		if err != nil || parsed.Type() != fields[1] {
			return nil, fmt.Errorf("line %d: not a key of type %s; delete the line to forget it", number, guest.Plain(fields[1], maxPinName))
		}
		pins = append(pins, pin{fields[0], key})
	}
	return pins, nil
}

// save replaces the file as a whole; a crash leaves the old one or the new one.
func (f *KeyFile) save(pins []pin) (err error) {
	var text bytes.Buffer
	for _, p := range pins {
		kind := "unknown"
		if parsed, err := xssh.ParsePublicKey(p.key); err == nil {
			kind = parsed.Type()
		}
		fmt.Fprintf(&text, "%s %s %s\n", p.name, kind, base64.StdEncoding.EncodeToString(p.key))
	}
	// CreateTemp makes it 0600.
	file, err := os.CreateTemp(filepath.Dir(f.path), filepath.Base(f.path)+".new-")
	if err != nil {
		return fmt.Errorf("pinning a host key: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}()
	_, err = file.Write(text.Bytes())
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("pinning a host key: %w", err)
	}
	if err := os.Rename(file.Name(), f.path); err != nil {
		return fmt.Errorf("pinning a host key: %w", err)
	}
	return nil
}
