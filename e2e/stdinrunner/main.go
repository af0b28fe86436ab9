// Stdinrunner gives a real runner its JIT config without showing it to anybody: it reads
// the config from its standard input, writes the files that it stands for into the
// current directory (mode 0600), and becomes the command in its arguments, which finds
// them there.
//
// It is for github-act-runner, which takes a JIT config on its command line or in its
// environment, where every process of the machine can read it, and not from its input.
// GitHub's own runner needs nothing like it. The end-to-end tests use it as a pool's
// runner command:
//
//	stdinrunner github-act-runner run --once
package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "stdinrunner:", err)
		os.Exit(1)
	}
}

// maxConfig bounds the input; a JIT config is 4 KB.
const maxConfig = 1 << 20

func run() error {
	if len(os.Args) < 2 {
		return fmt.Errorf("no command: want stdinrunner COMMAND ARGUMENTS")
	}
	command, err := exec.LookPath(os.Args[1])
	if err != nil {
		return fmt.Errorf("find the runner: %w", err)
	}
	config, err := io.ReadAll(io.LimitReader(os.Stdin, maxConfig))
	if err != nil {
		return fmt.Errorf("read the JIT config: %w", err)
	}
	files, err := testrunner.Unpack(strings.TrimSpace(string(config)))
	if err != nil {
		return err
	}
	for name, content := range files {
		if strings.ContainsAny(name, `/\`) {
			return fmt.Errorf("JIT config: a file outside of the directory")
		}
		if err := os.WriteFile(name, content, 0o600); err != nil {
			return fmt.Errorf("unpack the JIT config: %w", err)
		}
	}
	if err := syscall.Exec(command, os.Args[1:], os.Environ()); err != nil {
		return fmt.Errorf("start %s: %w", command, err)
	}
	return nil
}
