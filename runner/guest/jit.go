package guest

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// Bounds of a JIT config: GitHub's has three files and about 8 KiB.
const (
	maxJIT      = 512 << 10 // bytes, as it comes
	maxJITFiles = 32
	maxJITName  = 128 // bytes
)

// JITFile is one file of a runner's just-in-time configuration. Its content is a secret.
type JITFile struct {
	Name    string // of a file in the runner's own directory
	Content []byte `json:"-"`
}

// String hides the content.
func (f JITFile) String() string { return fmt.Sprintf("%s, %d bytes", f.Name, len(f.Content)) }

// GoString hides the content from %#v, too.
func (f JITFile) GoString() string { return f.String() }

// errJIT says no more: what is wrong with a secret is no matter for a log.
var errJIT = errors.New("the JIT config is not what GitHub's runner takes: base64 of a JSON object of files in base64; was it cut?")

// JITFiles makes of a JIT config, as GitHub returned it, the files that its runner starts
// from, sorted by name. They go into the runner's directory with mode 0600. No error
// quotes any of it but a file's name.
func JITFiles(jit []byte) ([]JITFile, error) {
	jit = bytes.TrimSpace(jit)
	if len(jit) > maxJIT {
		return nil, fmt.Errorf("a JIT config of %d bytes, at most %d", len(jit), maxJIT)
	}
	decoded := make([]byte, base64.StdEncoding.DecodedLen(len(jit)))
	n, err := base64.StdEncoding.Decode(decoded, jit)
	if err != nil {
		return nil, errJIT
	}
	var byName map[string][]byte // a []byte is base64 in JSON
	if err := json.Unmarshal(decoded[:n], &byName); err != nil || len(byName) == 0 {
		return nil, errJIT
	}
	if len(byName) > maxJITFiles {
		return nil, fmt.Errorf("a JIT config of %d files, at most %d", len(byName), maxJITFiles)
	}
	files := make([]JITFile, 0, len(byName))
	for name, content := range byName {
		// A plain name, wherever the runner lives: never out of its directory.
		if len(name) > maxJITName || name == "." || !filepath.IsLocal(name) || strings.ContainsAny(name, "/\\:\x00\n\r") {
			return nil, fmt.Errorf("a JIT config with a file %.40q: a plain name is due", name)
		}
		files = append(files, JITFile{Name: name, Content: content})
	}
	slices.SortFunc(files, func(a, b JITFile) int { return strings.Compare(a.Name, b.Name) })
	return files, nil
}
