package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// aboutStore is what the commands say that look at a store.
const aboutStore = `--store is the directory that images are kept in; by default it is that of this host's node, by
the configuration. The node's agent may have it open meanwhile: nothing is locked or changed.`

// storeFlag is --store; path finds the directory.
type storeFlag string

func (s *storeFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVar((*string)(s), "store", "", "directory of the image store (default: this host's node's)")
}

// path is absolute, since it is printed for other programs.
func (s storeFlag) path(g *globals) (string, error) {
	dir := string(s)
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
	return v, err
}

// openStore takes the store for this process.
func openStore(c cache.Config) (*cache.Store, error) {
	s, err := cache.Open(c)
	if errors.Is(err, cache.ErrInUse) {
		return nil, fmt.Errorf("%w (hint: a node's agent keeps its store to itself, and pulls what the controller orders; to do it by hand stop the agent, or name another --store. list, inspect and verify work meanwhile)", err)
	}
	return s, err
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

// pullHint is what people can do about a pull that failed.
func pullHint(ref string, err error) string {
	host := "HOST"
	if r, perr := image.ParseReference(ref); perr == nil {
		host = r.Host()
	}
	switch cache.ClassOf(err) {
	case cache.ClassAuth:
		return "docker login " + host + " with an account that may read it, or a credential helper in ~/.docker/config.json"
	case cache.ClassNotFound:
		return "a private image looks like this without docker login " + host
	case cache.ClassDisk:
		return "make room, for one with paddock image remove; what was fetched is kept, and the same command goes on from there"
	case cache.ClassDigest:
		return "nothing spoilt was kept, and the same command fetches only what is missing; if it stays so, ask another source with --mirror or --layout"
	case cache.ClassFormat:
		return "docs/images.md says which images can be used"
	case cache.ClassNetwork:
		return "what was fetched is kept, and the same command goes on from there"
	}
	return "what was fetched is kept"
}

// pullFailed makes one line of a failed pull: its class, what went wrong, and a hint.
func pullFailed(ref string, err error) error {
	if strings.Contains(err.Error(), "(hint: ") {
		return err
	}
	return fmt.Errorf("%w; class %s (hint: %s)", err, cache.ClassOf(err), pullHint(ref, err))
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
