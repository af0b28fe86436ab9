package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// aboutStore is what the commands say that look at a store.
const aboutStore = `--store is the directory that images are kept in; by default it is that of this host's node, by
the configuration. The node's agent may have it open meanwhile: nothing is locked or changed.`

// given is the value of a flag that must not be empty if it is given: an empty one is what
// comes of a shell variable that is not set, and would mean the default.
type given string

func (g *given) String() string { return string(*g) }
func (g *given) Type() string   { return "string" }

func (g *given) Set(value string) error {
	if value == "" {
		return errors.New("it is empty; is a variable not set?")
	}
	*g = given(value)
	return nil
}

// storeFlag is --store; path finds the directory.
type storeFlag struct{ given }

func (s *storeFlag) add(cmd *cobra.Command) {
	cmd.Flags().Var(&s.given, "store", "directory of the image store (default: this host's node's)")
}

// path is absolute, since it is printed for other programs.
func (s storeFlag) path(g *globals) (string, error) {
	dir := string(s.given)
	if dir == "" {
		c, err := g.load()
		if err != nil {
			return "", err
		}
		dir = parts.ImagesDir(c.Node)
	}
	return filepath.Abs(dir)
}

// view looks at the store without its lock.
func (s storeFlag) view(g *globals) (*cache.View, error) {
	dir, err := s.path(g)
	if err != nil {
		return nil, err
	}
	v, err := cache.LookAt(dir, nil)
	if errors.Is(err, cache.ErrNoStore) {
		return nil, fmt.Errorf("%s is no image store (hint: --store names the directory that images were pulled into; paddock image pull makes one)", dir)
	}
	return v, s.failed(err)
}

// change takes the store for this process while do works with it.
func (s storeFlag) change(g *globals, c cache.Config, do func(*cache.Store) error) (err error) {
	if c.Dir, err = s.path(g); err != nil {
		return err
	}
	c.Log = g.quietLog()
	store, err := cache.Open(c)
	if errors.Is(err, cache.ErrInUse) {
		return fmt.Errorf("%w (hint: a node's agent keeps its store to itself, and pulls what the controller orders; to do it by hand stop the agent, or name another --store. list, inspect and verify work meanwhile)", err)
	}
	if err != nil {
		return s.failed(err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	return do(store)
}

// failed adds that it is the flag's directory that cannot be used, and not one of the
// configuration.
func (s storeFlag) failed(err error) error {
	for _, is := range []error{fs.ErrNotExist, syscall.ENOTDIR, fs.ErrPermission, syscall.EROFS} {
		if s.given != "" && errors.Is(err, is) {
			return fmt.Errorf("%w (hint: --store names a directory that is yours, or that you may make)", err)
		}
	}
	return err
}

// jsonFlag adds --json, which people type before they find -o json.
func jsonFlag(cmd *cobra.Command, g *globals) {
	cmd.Flags().BoolFunc("json", "the same as -o json", func(string) error {
		g.output = "json"
		return nil
	})
}

// minPrefix is how much of a digest names an image at least, in hexadecimal digits.
const minPrefix = 4

// findImage finds the one image that is meant by what a person typed: a reference, a
// digest or the beginning of one.
func findImage(v *cache.View, word string) (cache.Seen, error) {
	list, err := v.List()
	if err != nil {
		return cache.Seen{}, err
	}
	var found []cache.Seen
	for _, i := range list {
		if means(word, i) {
			found = append(found, i)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return cache.Seen{}, fmt.Errorf("no image %q here (hint: paddock image list shows those that are; say REF as it is there, or %d digits of its digest)", word, minPrefix)
	}
	var digests []string
	for _, i := range found {
		digests = append(digests, i.Digest.Short())
	}
	return cache.Seen{}, fmt.Errorf("%q is %d images here (hint: say which by its digest: %s)", word, len(found), strings.Join(digests, ", "))
}

// means reports whether a word names an image.
func means(word string, i cache.Seen) bool {
	hex := strings.TrimPrefix(word, "sha256:")
	if len(hex) >= minPrefix && strings.HasPrefix(strings.TrimPrefix(string(i.Digest), "sha256:"), strings.ToLower(hex)) {
		return true
	}
	asked, err := image.ParseReference(word)
	if err != nil {
		return false
	}
	if asked.Digest() != "" {
		return asked.Digest() == i.Digest
	}
	has, err := image.ParseReference(i.Ref)
	return err == nil && asked.Repository().Name() == has.Repository().Name() && asked.Tag() == has.Tag()
}

// classOf is the class of a failure that has one: what is no failure of a pull, such as a
// store in use, is not the network's.
func classOf(err error) cache.Class {
	known := (*cache.Error)(nil)
	class := cache.ClassOf(err)
	if errors.As(err, &known) || class == cache.ClassFormat {
		return class
	}
	return ""
}

// pullHint is what people can do about a pull from host that failed, of which there are
// kept bytes.
func pullHint(host string, kept int64, err error) string {
	goesOn := "what was fetched is kept, and the same command goes on from there"
	switch class := classOf(err); {
	case class == cache.ClassAuth:
		return "docker login " + host + " with an account that may read it, or a credential helper in ~/.docker/config.json"
	case class == cache.ClassNotFound:
		return "a private image looks like this without docker login " + host
	case class == cache.ClassDisk && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)):
		return "make room, for one with paddock image remove; " + goesOn
	case class == cache.ClassDisk:
		return "look at the disk that the store is on; " + goesOn
	case class == cache.ClassDigest:
		return "nothing spoilt was kept, and the same command fetches only what is missing; if it stays so, ask another source with --mirror or --layout"
	case class == cache.ClassFormat:
		return "docs/images.md says which images can be used"
	case class == cache.ClassNetwork && kept > 0:
		return goesOn
	case class == cache.ClassNetwork:
		return "nothing was fetched; is " + host + " the right host, and can this one reach it?"
	}
	return "the same command begins anew"
}

// pullFailed makes one line of a failed pull: what went wrong, its class, and a hint.
func pullFailed(host string, kept int64, err error) error {
	if strings.Contains(err.Error(), "(hint: ") {
		return err
	}
	what := ""
	if class := classOf(err); class != "" {
		what = "; class " + string(class)
	}
	return fmt.Errorf("%w%s (hint: %s)", err, what, pullHint(host, kept, err))
}

// interrupted says what is left of a command that Ctrl-C ended.
type interruptedError struct{ what, hint string }

func (e *interruptedError) Error() string {
	return "interrupted: " + e.what + " (hint: " + e.hint + ")"
}

// wasInterrupted reports whether err is only that a person ended the command.
func wasInterrupted(ctx context.Context, err error) bool {
	return err != nil && ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, ctx.Err()))
}

// plainRef is a reference without the digest, which is beside it wherever people see it.
func plainRef(ref string) string {
	name, _, _ := strings.Cut(ref, "@")
	return name
}

// stateOf is how an image is, in the words of a list.
func stateOf(i cache.Seen) string {
	switch {
	case i.Err != nil:
		return "broken"
	case i.Ready:
		return string(fleet.ImageReady)
	default:
		return "partial"
	}
}
