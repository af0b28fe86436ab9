package helper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// folder is what is on disk of one machine: it exists from Boot until Destroy.
type folder string

// Files in a folder.
const (
	socketName = "s"           // the helper's socket: one letter, since its path is short
	specName   = "spec.json"   // for reaping
	pidName    = "helper.pid"  // for killing a helper that hangs
	resultName = "result.json" // the final report, written before the socket closes
	logName    = "helper.log"  // the helper's standard error: a panic, if there was one
)

func (f folder) path(name string) string { return filepath.Join(string(f), name) }

// exists reports whether the machine is known here.
func (f folder) exists() (bool, error) {
	_, err := os.Stat(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// put writes a file in one step: a reader finds all of it or nothing. There is no
// fsync: no machine outlives the host, so nothing needs to be known after its crash.
func (f folder) put(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", name, err)
	}
	temporary := f.path(name + ".new" + strconv.Itoa(os.Getpid()))
	if err := os.WriteFile(temporary, b, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, f.path(name))
}

// get reads what put wrote; ok is false if there is none.
func (f folder) get(name string, v any) (ok bool, err error) {
	b, err := os.ReadFile(f.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("reading %s: %w", f.path(name), err)
	}
	return true, nil
}

// lastWords is the line of the helper's log that tells most: that of a panic, else the
// last, at most 500 bytes; "" if it wrote nothing.
func (f folder) lastWords() string {
	b, err := os.ReadFile(f.path(logName))
	if err != nil {
		return ""
	}
	line := ""
	for l := range strings.Lines(string(b)) {
		if l = strings.TrimSpace(l); l != "" {
			line = l
		}
		if strings.HasPrefix(l, "panic: ") || strings.HasPrefix(l, "fatal error: ") {
			break
		}
	}
	return strings.ToValidUTF8(line[:min(500, len(line))], "\uFFFD")
}

// maxSocketPath is what fits into sun_path with its final zero: 104 bytes on darwin,
// 108 on Linux.
const maxSocketPath = 103

// checkID keeps a machine's id from being a path of its own.
func checkID(id fleet.VMID) error {
	for _, c := range id {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("machine id %q: use lower-case letters, digits and hyphens", id)
		}
	}
	if id == "" {
		return errors.New("a machine without an id")
	}
	return nil
}

// folder is where the machine id is, or would be.
func (d *Driver) folder(id fleet.VMID) (folder, error) {
	if err := checkID(id); err != nil {
		return "", err
	}
	f := folder(filepath.Join(d.config.Dir, string(id)))
	if n := len(f.path(socketName)); n > maxSocketPath {
		return "", fmt.Errorf("socket path of %d bytes in %s: at most %d; use a shorter runtime directory", n, d.config.Dir, maxSocketPath)
	}
	return f, nil
}

// spec reads back what the machine was made of; ok is false if it was never started.
func (f folder) spec() (spec vm.Spec, ok bool, err error) {
	ok, err = f.get(specName, &spec)
	return spec, ok, err
}
