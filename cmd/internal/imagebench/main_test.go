//go:build linux

package imagebench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"
)

var (
	diskMiB  = flag.Int64("disk", 4096, "MiB of disk of the image that is moved")
	chunkMiB = flag.Int64("chunk", 64, "MiB of one chunk of it")
	rounds   = flag.Int("rounds", 3, "how often each way is measured")
)

// roles are what this binary does as a process of its own: its first argument names one.
var roles = map[string]func(ctx context.Context, args []string) error{
	"make":     makeImages,
	"registry": serveRegistry,
	"crane":    cranePull,
	"decode":   decodeAlone,
	"pull":     pullAlone,
	"clone":    cloneAlone,
}

// TestMain plays a role, or runs what is to be measured.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if role, ok := roles[os.Args[1]]; ok {
			if err := role(context.Background(), os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
	}
	flag.Parse()
	code := m.Run()
	if err := removeProgram(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// want checks the number of a role's arguments.
func want(args []string, names ...string) error {
	if len(args) != len(names) {
		return fmt.Errorf("%d arguments, want %v", len(args), names)
	}
	return nil
}

var errDisk = errors.New("the disk that came is not the one that was made")
