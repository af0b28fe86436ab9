package self

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/paddock-ci/paddock/runner/guest"
)

// maxName bounds a runner's name, in bytes; GitHub takes 64.
const maxName = 256

// claim notes, beside the share and out of the guest's reach, which runner the guest is
// for; false if it is another's. It outlives us: a guest takes one runner.
func (c *Client) claim(name string) (bool, error) {
	if name == "" || guest.Plain(name, maxName) != name {
		return false, fmt.Errorf("a runner needs a name of one line and at most %d bytes", maxName)
	}
	// A link is made as a whole or not at all, and only once.
	part, err := os.CreateTemp(c.dir, "runner.new-")
	if err != nil {
		return false, fmt.Errorf("noting the guest's runner: %w", err)
	}
	defer func() { _ = os.Remove(part.Name()) }() // has its second name by now
	_, err = part.WriteString(name)
	if err = errors.Join(err, part.Close()); err != nil {
		return false, fmt.Errorf("noting the guest's runner: %w", err)
	}
	err = os.Link(part.Name(), filepath.Join(c.dir, "runner"))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return false, fmt.Errorf("noting the guest's runner: %w", err)
	}
	return c.name() == name, nil
}

// name is the runner that the guest is for; "" if there is none yet.
func (c *Client) name() string {
	name, err := os.ReadFile(filepath.Join(c.dir, "runner"))
	if err != nil {
		return ""
	}
	return string(name)
}

// hand puts the order into the share: made outside of it and renamed, so that the guest
// never sees a part.
func (c *Client) hand(r guest.Run) error {
	environment, err := guest.Exports(r.Env)
	if err != nil {
		return err
	}
	part, err := os.MkdirTemp(c.dir, "run.new-") // 0700
	if err != nil {
		return fmt.Errorf("handing the runner over: %w", err)
	}
	defer func() { _ = os.RemoveAll(part) }() // is gone already if all went well
	files := map[string][]byte{"jitconfig": r.Input, "env": []byte(environment)}
	if len(r.Argv) > 0 {
		words := make([]string, len(r.Argv))
		for i, a := range r.Argv {
			words[i] = guest.Quote(a)
		}
		files["command"] = []byte("set -- " + strings.Join(words, " ") + "\n")
	}
	if err := os.Mkdir(filepath.Join(part, "jit"), 0o700); err != nil {
		return fmt.Errorf("handing the runner over: %w", err)
	}
	// What is no JIT config of GitHub's is a matter between the pool and its launcher.
	if unpacked, err := guest.JITFiles(r.Input); err == nil {
		for _, f := range unpacked {
			files[filepath.Join("jit", f.Name)] = f.Content
		}
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(part, name), content, 0o600); err != nil {
			return fmt.Errorf("handing the runner over: %w", err)
		}
	}
	// Of two that hand over at once the second finds the place taken: by the same order.
	err = os.Rename(part, c.order())
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("handing the runner over: %w", err)
	}
	return nil
}

func (c *Client) order() string { return filepath.Join(inDir(c.dir), "run") }

// settle takes the order back once the launcher has it: an agent that was killed while it
// waited for that could not. It costs a look at two directories where nothing is left.
func (c *Client) settle(r report) error {
	if !r.started() {
		return nil
	}
	_, err := os.Lstat(c.order())
	if left, _ := filepath.Glob(c.parts()); errors.Is(err, fs.ErrNotExist) && len(left) == 0 {
		return nil
	}
	return c.takeBack()
}

func (c *Client) parts() string { return filepath.Join(c.dir, "run.*") }

// takeBack removes the order, with the JIT config: first from the guest's sight, then
// from the disk. Parts that a killed agent left go as well.
func (c *Client) takeBack() error {
	gone, err := os.MkdirTemp(c.dir, "run.old-")
	if err == nil {
		err = os.Rename(c.order(), filepath.Join(gone, "run"))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if left, globErr := filepath.Glob(c.parts()); globErr == nil {
		for _, l := range left {
			err = errors.Join(err, os.RemoveAll(l))
		}
	}
	if err != nil {
		return fmt.Errorf("taking the runner's order out of the share: %w", err)
	}
	return nil
}
