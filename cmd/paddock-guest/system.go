package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"github.com/paddock-ci/paddock/runner/guest"
)

// commandLimit keeps what a failed command has printed, in bytes.
const commandLimit = 500

// Wake sets the clock and stirs the random pool: by ourselves as root, else by sudo.
func (s *system) Wake(ctx context.Context, w guest.Wake) error {
	err := wake(w.Now, w.Entropy)
	if err == nil || !errors.Is(err, os.ErrPermission) {
		return err
	}
	self, pathErr := os.Executable()
	if pathErr != nil {
		return errors.Join(err, pathErr)
	}
	cmd := exec.CommandContext(ctx, "sudo", "-n", self, wakeCommand, strconv.FormatInt(w.Now.UnixNano(), 10))
	cmd.Stdin = bytes.NewReader(w.Entropy) // not in an argument, which others can read
	if out, sudoErr := cmd.CombinedOutput(); sudoErr != nil {
		return fmt.Errorf("%w; and by sudo: %w: %s; run the agent as root, or let its user sudo without a password", err, sudoErr, clip(out))
	}
	return nil
}

// tryCommands runs one command after the other until one succeeds.
func tryCommands(ctx context.Context, commands ...[]string) error {
	var all error
	for _, argv := range commands {
		out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
		if err == nil {
			return nil
		}
		all = errors.Join(all, fmt.Errorf("%s: %w: %s", argv[0], err, clip(out)))
	}
	return all
}

func clip(out []byte) []byte { return bytes.TrimSpace(out[:min(len(out), commandLimit)]) }
