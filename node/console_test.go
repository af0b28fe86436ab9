package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/vm"
)

// A console whose file was made shorter, since it was full, is followed on.
func TestConsoleThatWasShortened(t *testing.T) {
	path := filepath.Join(t.TempDir(), vm.ConsoleFile)
	write := func(flag int, text string) {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flag, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	write(0, strings.Repeat("early ", 1000))
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	var said strings.Builder
	if err := catchUp(&said, f); err != nil {
		t.Fatal(err)
	}
	write(os.O_TRUNC, "early … late ")
	if err := catchUp(&said, f); err != nil {
		t.Fatal(err)
	}
	write(os.O_APPEND, "and on")
	if err := catchUp(&said, f); err != nil {
		t.Fatal(err)
	}
	if got := said.String(); !strings.HasSuffix(got, "a part of it was left out]\r\nand on") || strings.Count(got, "left out") != 1 {
		t.Errorf("the follower got %d bytes, ending %q", len(got), got[max(0, len(got)-80):])
	}
}
