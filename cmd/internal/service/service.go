// Package service has this host's service manager keep a node's agent running: as a
// LaunchAgent on macOS, as a systemd user unit on Linux, both of the user who asks.
//
//  1. Install writes the manager's file and has it loaded; what was installed before is
//     replaced, and comes back if the new one cannot be loaded.
//  2. Uninstall has the agent stopped by SIGTERM, which leaves its VMs running, and
//     removes what Install made.
//
// Both files say that only the agent itself is stopped, and not what it started: the
// helpers of its VMs go on through a restart or an upgrade. It installs no system-wide
// daemon, since Virtualization.framework wants the login keychain and the display of a
// user, and it does not run the agent itself. The install commands in cmd/paddock call it.
package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
	"unicode"
)

// Config says what is to run, and for whom.
type Config struct {
	OS   string // darwin or linux. Needed
	Home string // the user's, absolute. Needed
	// ConfigHome is the user's directory of configurations (XDG), "": .config in Home.
	ConfigHome string
	UID        int
	// Program is the absolute path of paddock, and Args what follows it. Needed.
	Program string
	Args    []string
	Env     []Variable // in this order
}

// Variable is one of the agent's environment, which is not for secrets: the file is
// readable by others.
type Variable struct{ Name, Value string }

// Service is one agent at its service manager.
type Service struct {
	c Config
	m manager
}

// manager is one kind of service manager. Its methods run its program.
type manager interface {
	path() string // of the file
	text() string // of the file
	// start has the agent run as the file says; changed: with what the file says now.
	start(ctx context.Context, changed bool) error
	// stop ends the agent gracefully and forgets it; not known: nothing to do.
	stop(ctx context.Context) error
	// leftovers are files and, after them, directories besides the file that are removed
	// with it; directories only if they are empty.
	leftovers() []string
	// notes are for people, once it is installed.
	notes() []string
}

// Outcome is what Install did.
type Outcome string

// The outcomes.
const (
	Installed Outcome = "installed"
	Updated   Outcome = "updated"
	Unchanged Outcome = "unchanged" // it was there and is sure to run
)

// patience is how long an undone installation may take: a manager that stops an agent
// waits for it, and an agent waits for its VMs' helpers.
const patience = 2 * time.Minute

// New checks the configuration.
func New(c Config) (*Service, error) {
	s := &Service{c: c}
	switch c.OS {
	case "darwin":
		s.m = &launchd{c}
	case "linux":
		s.m = &systemd{c}
	default:
		return nil, fmt.Errorf("no service manager is known for %s (hint: have what there is run: paddock node)", c.OS)
	}
	if !filepath.IsAbs(c.Home) || !filepath.IsAbs(c.Program) {
		return nil, fmt.Errorf("home %q and program %q must be absolute paths", c.Home, c.Program)
	}
	words := append([]string{c.Home, c.ConfigHome, c.Program}, c.Args...)
	for _, v := range c.Env {
		words = append(words, v.Name, v.Value)
	}
	for _, w := range words {
		if strings.ContainsFunc(w, unicode.IsControl) {
			return nil, fmt.Errorf("%q has control characters, which the service manager's file cannot hold (hint: use another path)", w)
		}
	}
	return s, nil
}

// Path is where the service manager's file is, or would be.
func (s *Service) Path() string { return s.m.path() }

// Program is what the agent is started from.
func (s *Service) Program() string { return s.c.Program }

// Text is that file.
func (s *Service) Text() string { return s.m.text() }

// Notes are for people, once it is installed: where the log is, and what to see to.
func (s *Service) Notes() []string { return s.m.notes() }

// Install has the agent run now and at every login.
func (s *Service) Install(ctx context.Context) (Outcome, error) {
	if s.c.OS == "darwin" && s.c.UID == 0 {
		return "", errors.New("root's agent cannot run VMs: Virtualization.framework wants the login keychain and the display session of a user (hint: run this as the user who is logged in, without sudo)")
	}
	former, err := os.ReadFile(s.Path())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read what is installed: %w", err)
	}
	outcome, text := Installed, []byte(s.Text())
	switch {
	case bytes.Equal(former, text):
		outcome = Unchanged
	case err == nil:
		outcome = Updated
	}
	if err := s.write(text); err != nil {
		return "", err
	}
	if err := s.m.start(ctx, outcome != Unchanged); err != nil {
		return "", errors.Join(err, s.undo(ctx, outcome, former))
	}
	return outcome, nil
}

// write puts the file in place in one step: a manager that looks now finds all of it.
func (s *Service) write(text []byte) error {
	if err := os.MkdirAll(filepath.Dir(s.Path()), 0o755); err != nil {
		return fmt.Errorf("make the service manager's directory: %w", err)
	}
	if err := s.writeBeside(s.Path()+".new", text); err != nil {
		return fmt.Errorf("write the service manager's file: %w", err)
	}
	return nil
}

func (s *Service) writeBeside(temporary string, text []byte) error {
	err := os.WriteFile(temporary, text, 0o644)
	if err == nil {
		err = os.Rename(temporary, s.Path())
	}
	if err != nil {
		_ = os.Remove(temporary)
	}
	return err
}

// undo makes an installation that failed as if it had not been tried: nothing half
// installed, and what ran before runs again.
func (s *Service) undo(ctx context.Context, outcome Outcome, former []byte) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	switch outcome {
	case Installed:
		// Whatever of it was loaded: a manager that cannot be asked to forget it has not
		// got it running either.
		_ = s.m.stop(ctx)
		return s.remove()
	case Updated:
		if err := s.write(former); err != nil {
			return err
		}
		if err := s.m.start(ctx, true); err != nil {
			return fmt.Errorf("bring back what was installed before: %w", err)
		}
	case Unchanged:
	}
	return nil
}

// Uninstall stops the agent and removes what Install made; false: there was nothing. The
// agent's VMs go on.
func (s *Service) Uninstall(ctx context.Context) (bool, error) {
	found := there(s.Path())
	// Also without a file the manager may still know it.
	if err := s.m.stop(ctx); err != nil {
		return found, err
	}
	if err := s.remove(); err != nil {
		return found, err
	}
	if found && s.c.OS == "linux" {
		return found, systemctl(ctx, "daemon-reload")
	}
	return found, nil
}

// remove removes the files that are there.
func (s *Service) remove() error {
	for _, path := range append([]string{s.Path()}, s.m.leftovers()...) {
		// A directory that is not empty has something of somebody else.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !isDir(path) {
			return fmt.Errorf("remove %s: %w", path, err)
		}
	}
	return nil
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}

// failure is a manager's program that failed.
type failure struct {
	command string
	code    int // -1: it did not run, or was killed
	output  string
	err     error
}

// Error has the program's own words, at most 2 KB of them.
func (f *failure) Error() string {
	text := strings.ToValidUTF8(f.output[:min(len(f.output), 2<<10)], "?")
	if text = strings.TrimSpace(text); text != "" {
		return fmt.Sprintf("%s: %v: %s", f.command, f.err, text)
	}
	return fmt.Sprintf("%s: %v", f.command, f.err)
}

func (f *failure) Unwrap() error { return f.err }

// run runs a manager's program; its error is a *failure.
func run(ctx context.Context, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	output, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	f := &failure{command: strings.Join(append([]string{program}, args...), " "), code: -1, output: string(output), err: err}
	if cmd.ProcessState != nil {
		f.code = cmd.ProcessState.ExitCode()
	}
	return f
}
