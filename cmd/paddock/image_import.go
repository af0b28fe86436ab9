package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

func imageImportCommand(g *globals) *cobra.Command {
	var (
		store storeFlag
		from  given
		as    given
	)
	cmd := &cobra.Command{
		Use: "import [DIR|REF]", Short: "Take over images of Tart's cache, without a download", Args: cobra.MaximumNArgs(1),
		Long: `Take over images that Tart has pulled on this host: all of its cache, or those in DIR (a cache, a part
of one, or one image's directory), or the one that REF names there. The files are cloned where the
file system can, else copied; every digest is verified; then the image is published. The original
is left alone. Tags become references by digest, so that a tag that has moved means no other image.

Of an image with missing or spoilt parts the rest is kept: paddock image pull fetches what is not.
The registry is asked for nothing, but for a manifest that Tart has written in other words.

--json prints an array with an object per image, whether it was imported or not, or one object
if it does not get so far.
` + aboutFailure,
		Example: `paddock image import --store ~/store
paddock image import ghcr.io/cirruslabs/macos-sequoia-base:latest --store ~/store
paddock image import /Volumes/old/cache/OCIs --store ~/store`,
		RunE: func(cmd *cobra.Command, args []string) error {
			word := ""
			if len(args) == 1 {
				word = args[0]
			}
			if len(args) == 1 && word == "" {
				return usage("leave it out for all of the cache", "%s of nothing; is a variable not set?", cmd.CommandPath())
			}
			found, err := toImport(or(string(from), tartCache()), word, string(as))
			if err != nil {
				return err
			}
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			return importImages(ctx, cmd, g, store, found)
		},
	}
	store.add(cmd)
	cmd.Flags().Var(&from, "cache", "directory of the cache (default: TART_HOME's cache/OCIs, or ~/.tart/cache/OCIs)")
	cmd.Flags().Var(&as, "as", "reference of the image, for a directory that does not tell it")
	jsonFlag(cmd, g)
	return cmd
}

// tartCache is where Tart keeps what it has pulled.
func tartCache() string {
	home := os.Getenv("TART_HOME")
	if home == "" {
		user, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		home = filepath.Join(user, ".tart")
	}
	return filepath.Join(home, "cache", "OCIs")
}

// toImport lists what a person means: nothing is all of the cache.
func toImport(root, word, as string) ([]cache.Foreign, error) {
	if as != "" {
		if _, err := image.ParseReference(as); err != nil {
			return nil, usage("like ghcr.io/acme/macos:15", "--as: %v", err)
		}
	}
	dir := or(word, root)
	info, err := os.Stat(dir)
	if err == nil && info.IsDir() {
		return inDirectory(dir, as)
	}
	if word == "" {
		return nil, fmt.Errorf("there is no cache of Tart's in %s (hint: name its directory, or set TART_HOME)", root)
	}
	r, err := image.ParseReference(word)
	if err != nil {
		return nil, usage("a directory, or a reference like ghcr.io/acme/macos:15", "%q is neither a directory nor a reference", word)
	}
	return byReference(root, r)
}

// inDirectory finds the images in a directory, which may be one itself.
func inDirectory(dir, as string) ([]cache.Foreign, error) {
	path, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	// A tag of the cache is a link to the image.
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(path, "manifest.json")); err == nil {
		ref := or(as, referenceOf(path))
		if ref == "" {
			return nil, usage("name it with --as ghcr.io/acme/macos:15", "the path of %s does not tell what image it is", dir)
		}
		return []cache.Foreign{{Dir: path, Ref: ref, Digest: fleet.Digest(filepath.Base(path))}}, nil
	}
	if as != "" {
		return nil, usage("--as names the one image of a directory", "%s has no manifest.json", dir)
	}
	found, err := cache.Foreigners(path)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("no image in %s (hint: images are in directories host/name/sha256:…, as Tart's cache has them in %s)", dir, tartCache())
	}
	// Below a part of a cache, the path above tells the host and the beginning of the name.
	for i, f := range found {
		if _, perr := image.ParseReference(f.Ref); perr != nil {
			found[i].Ref = referenceOf(f.Dir)
		}
		if err == nil && found[i].Ref == "" {
			err = usage("name the directory that has the hosts in it", "the path of %s does not tell what image it is", f.Dir)
		}
	}
	return found, err
}

// referenceOf reads host/name@digest from the path of an image in a cache; empty: it is
// not in one.
func referenceOf(path string) string {
	d := fleet.Digest(filepath.Base(path))
	if fleet.CheckDigest(d) != nil {
		return ""
	}
	// What is above the host is no part of the name: Tart's caches are called OCIs.
	_, name, inCache := strings.Cut(filepath.ToSlash(filepath.Dir(path)), "/OCIs/")
	ref := strings.ReplaceAll(name, "%3A", ":") + "@" + string(d)
	if _, err := image.ParseReference(ref); !inCache || err != nil {
		return ""
	}
	return ref
}

// byReference finds the one image of a cache that a reference names.
func byReference(root string, r image.Reference) ([]cache.Foreign, error) {
	found, err := cache.Foreigners(root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, f := range found {
		has, err := image.ParseReference(f.Ref)
		if err != nil || has.Repository().Name() != r.Repository().Name() {
			continue
		}
		if r.Digest() == f.Digest || r.Digest() == "" && r.Tag() == has.Tag() {
			return []cache.Foreign{f}, nil
		}
	}
	return nil, fmt.Errorf("%s is not in the cache %s (hint: --cache names another; paddock image pull brings it from its registry)", r, root)
}

// imported is one image of an import, as scripts see it.
type imported struct {
	Digest fleet.Digest `json:"digest"`
	Ref    string       `json:"ref"`
	From   string       `json:"from"`
	State  string       `json:"state"` // ready, partial or failed
	Disk   string       `json:"disk,omitempty"`
	Error  string       `json:"error,omitempty"`
}

func importImages(ctx context.Context, cmd *cobra.Command, g *globals, store storeFlag, found []cache.Foreign) error {
	client, err := registry.New(registry.Config{Log: g.quietLog()})
	if err != nil {
		return err
	}
	return store.change(g, cache.Config{Sources: []cache.Source{client}}, func(s *cache.Store) error {
		return importAll(ctx, cmd, g, s, found)
	})
}

func importAll(ctx context.Context, cmd *cobra.Command, g *globals, s *cache.Store, found []cache.Foreign) error {
	rows, bad := []imported{}, 0
	var last error
	for _, f := range found {
		row, err := importOne(ctx, cmd, g, s, f)
		if wasInterrupted(ctx, err) {
			return &interruptedError{fmt.Sprintf("%d of %s imported", len(rows), count(len(found), "image")), "the same command goes on from there"}
		}
		rows = append(rows, row)
		if err != nil {
			bad, last = bad+1, err
		}
	}
	if bad > 0 && len(found) > 1 {
		last = fmt.Errorf("%d of %s not imported in full; the last: %w", bad, count(len(found), "image"), last)
	}
	if g.output == "json" {
		if err := writeJSON(cmd.OutOrStdout(), rows); err != nil {
			return err
		}
		if last != nil {
			last = &toldError{last}
		}
	}
	return last
}

func importOne(ctx context.Context, cmd *cobra.Command, g *globals, s *cache.Store, f cache.Foreign) (imported, error) {
	start := time.Now()
	_, missing := s.Path(f.Digest)
	bar := g.progress(cmd, plainRef(f.Ref), inBytes)
	d, err := s.Import(ctx, f.Dir, f.Ref, bar.tell)
	bar.end()
	row := imported{Digest: d, Ref: f.Ref, From: f.Dir, State: string(fleet.ImageReady)}
	if err == nil {
		var path string
		if path, err = s.Path(d); err == nil {
			row.Disk = filepath.Join(path, "disk.img")
			if g.output != "json" {
				how := "is ready and verified, after " + short(time.Since(start))
				if missing == nil {
					how = "was here already"
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s (%s) %s\n%s\n", plainRef(f.Ref), d.Short(), how, row.Disk)
			}
			return row, err
		}
	}
	row.State, row.Error = "failed", err.Error()
	if partly := (*cache.PartlyError)(nil); errors.As(err, &partly) {
		row.State = "partial"
		err = fmt.Errorf("%w (hint: paddock image pull %s fetches what is missing, and nothing else)", err, f.Ref)
	} else if !wasInterrupted(ctx, err) {
		err = importFailed(f, err)
	}
	return row, err
}

// importFailed gives what people can do about an image that could not be taken over.
func importFailed(f cache.Foreign, err error) error {
	switch {
	case errors.Is(err, cache.ErrUnverifiable):
		return fmt.Errorf("%w (hint: paddock image pull %s)", err, f.Ref)
	case cache.ClassOf(err) == cache.ClassDisk:
		return fmt.Errorf("%w (hint: what was taken over is kept, and the same command goes on from there)", err)
	}
	return fmt.Errorf("%w (hint: nothing of it is used; paddock image pull %s brings it from its registry)", err, f.Ref)
}
