package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/image/tart"
)

func TestBootFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, DiskFile), []byte("....kernel..initrd"), 0o600); err != nil {
		t.Fatal(err)
	}
	kernel, initrd, err := BootFiles(dir, &tart.Boot{Kernel: tart.Extent{Offset: 4, Size: 6}, Initrd: tart.Extent{Offset: 12, Size: 6}})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{kernel: "kernel", initrd: "initrd"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", path, got, err, want)
		}
	}
	if _, initrd, err := BootFiles(dir, &tart.Boot{Kernel: tart.Extent{Offset: 4, Size: 6}}); err != nil || initrd != "" {
		t.Errorf("without an initrd: %q, %v", initrd, err)
	}
	_, _, err = BootFiles(dir, &tart.Boot{Kernel: tart.Extent{Offset: 10, Size: 100}})
	if err == nil || !strings.Contains(err.Error(), "ends after 8 of its 100 bytes") {
		t.Errorf("a kernel beyond the disk's end: %v", err)
	}
}

func TestReadConfig(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadConfig(dir); err == nil {
		t.Error("a clone without a config was read")
	}
	config := `{"version":1,"os":"linux","paddockBoot":{"kernel":{"offset":4096,"size":10},"commandLine":"quiet"}}`
	if err := os.WriteFile(filepath.Join(dir, ConfigFile), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := ReadConfig(dir)
	if err != nil || c.Boot == nil || c.Boot.Kernel.Offset != 4096 || c.Boot.CommandLine != "quiet" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestConsoleTail(t *testing.T) {
	dir := t.TempDir()
	if got := ConsoleTail(dir); got != "" {
		t.Errorf("a console that is not there ends %q", got)
	}
	long := strings.Repeat("x", 3*maxConsole) + "\xff the end\n"
	if err := os.WriteFile(filepath.Join(dir, ConsoleFile), []byte(long), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ConsoleTail(dir); !strings.HasSuffix(got, "\uFFFD the end") || len(got) > maxConsole+2 {
		t.Errorf("%d bytes, ending %q", len(got), got[max(0, len(got)-20):])
	}
}
