package parts

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A node.layout that is none, by a typo or for want of a mount, is said at the start, and
// one that is there is not.
func TestCheckLayout(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	dir := t.TempDir()
	if err := checkLayout(t.Context(), filepath.Join(dir, "nosuch"), log); err != nil {
		t.Fatal(err)
	}
	if text := out.String(); !strings.Contains(text, "no images come from node.layout") || !strings.Contains(text, "nosuch") {
		t.Errorf("of a directory that is not there it says %q", text)
	}
	out.Reset()
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(`{"schemaVersion":2,"manifests":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, good := range []string{"", dir} {
		if err := checkLayout(t.Context(), good, log); err != nil || out.Len() > 0 {
			t.Errorf("%q: %v, and it says %q", good, err, out.String())
		}
	}
}
