package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/ocidir"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/vm"
)

// sourceFlags say where an image may come from besides its registry.
type sourceFlags struct {
	mirror, layout given
}

func (f *sourceFlags) add(cmd *cobra.Command) {
	cmd.Flags().Var(&f.mirror, "mirror", "HOST[/PREFIX] of a registry that has the same images, nearby")
	cmd.Flags().Var(&f.layout, "layout", "directory with an OCI image layout that may have them, such as a shared mount")
}

// origins are the places of one command.
type origins struct {
	registry *registry.Client
	mirror   *registry.Client // nil: none
	layout   *ocidir.Layout   // nil: none
}

// open makes the sources of an image; nothing is asked yet.
func (f *sourceFlags) open(r image.Reference, log *slog.Logger) (o origins, err error) {
	if o.registry, err = registry.New(registry.Config{Log: log}); err != nil {
		return o, err
	}
	if f.mirror != "" {
		o.mirror, err = registry.New(registry.Config{Log: log, Mirror: string(f.mirror), For: r.Host()})
		if err != nil {
			return o, usage("a mirror is written as HOST or HOST/PREFIX, like mirror.example.com/ghcr", "--mirror %s: %v", f.mirror, err)
		}
	}
	if f.layout != "" {
		dir, err := filepath.Abs(string(f.layout))
		if err == nil {
			o.layout, err = ocidir.Open(dir)
		}
		if err != nil {
			return o, err
		}
	}
	return o, nil
}

// look tells the person of a layout that is none, or not mounted: it is given for what it
// saves, and without it everything comes from farther away.
func (o origins) look(ctx context.Context, say func(string)) {
	if o.layout == nil {
		return
	}
	if _, err := o.layout.List(ctx); err != nil && ctx.Err() == nil {
		say(fmt.Sprintf("nothing comes from --layout: %v", err))
	}
}

// sources are the places with the nearest first, which is preferred until rates are known.
func (o origins) sources() []cache.Source {
	var list []cache.Source
	if o.layout != nil {
		list = append(list, o.layout)
	}
	if o.mirror != nil {
		list = append(list, o.mirror)
	}
	return append(list, o.registry)
}

// resolve finds which image ref is now. The registry knows; what is nearer may be stale,
// and is believed, with a word to the person, if the registry cannot tell.
func (o origins) resolve(ctx context.Context, r image.Reference, say func(string)) (fleet.Digest, error) {
	if r.Digest() != "" {
		return r.Digest(), nil
	}
	found, err := o.registry.Resolve(ctx, r.String())
	if err == nil {
		return found.Digest, nil
	}
	if class := cache.ClassOf(err); class == cache.ClassFormat || class == cache.ClassDigest || ctx.Err() != nil {
		return "", err
	}
	if o.mirror != nil {
		if found, merr := o.mirror.Resolve(ctx, r.String()); merr == nil {
			say(fmt.Sprintf("%s cannot tell (%v): the mirror says that the image is %s", r.Host(), err, found.Digest))
			return found.Digest, nil
		}
	}
	if o.layout != nil {
		if d, lerr := o.layout.Resolve(ctx, r.String()); lerr == nil {
			say(fmt.Sprintf("%s cannot tell (%v): the layout says that the image is %s", r.Host(), err, d))
			return d, nil
		}
	}
	return "", err
}

// manifest reads the manifest of an image from the first place that has it.
func (o origins) manifest(ctx context.Context, ref string, d fleet.Digest) (*image.Manifest, error) {
	var errs []error
	for _, s := range o.sources() {
		raw, err := s.Manifest(ctx, ref, d)
		if err == nil && image.DigestOf(raw) != d {
			err = &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s gave another manifest than %s", s.Name(), d.Short())}
		}
		if err == nil {
			m, _, err := image.Parse(raw, cache.Formats())
			return m, err
		}
		errs = append(errs, err)
	}
	return nil, errs[len(errs)-1] // the registry's, which is the last
}

func imagePullCommand(g *globals) *cobra.Command {
	var (
		store   storeFlag
		from    sourceFlags
		streams int
		dry     bool
	)
	cmd := &cobra.Command{
		Use: "pull REF", Short: "Bring an image into a store, and verify it", Args: cobra.ExactArgs(1),
		Long: `Bring an image into a store: host/name:tag or host/name@sha256:…, from its registry, and from a
mirror or a layout nearby if they have it. Only what is missing is requested: neither zeros, nor
what other images of the store hold, nor what an earlier pull brought. All of it is verified while
it comes, and the image is there when it is whole, or not at all. The status is 0 only then.

Credentials are those of docker login. A registry on 127.0.0.1 or localhost is spoken to in plain
HTTP. Ctrl-C keeps what was fetched; the same command goes on from there. --dry-run shows what
would be requested, and needs no lock.

--json prints one object per line: state (queued, caching, paused, verifying, ready or failed), done,
total (bytes on the wire), rate (bytes per second) and eta (seconds). The last one has state ready,
digest, disk (its path), seconds, bytes by source, and reused.
` + aboutFailure,
		Example: `paddock image pull ghcr.io/cirruslabs/macos-sequoia-base:latest --store ~/store
paddock image pull ghcr.io/acme/macos:15 --mirror mirror.local:5000/ghcr --dry-run
DISK=$(paddock image pull 127.0.0.1:5000/test/base:v1 --store s --json | tail -1 | jq -r .disk)`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := image.ParseReference(args[0])
			if err != nil {
				return usage("like ghcr.io/acme/macos:15", "%v", err)
			}
			if streams < 0 || streams > 64 {
				return usage("1 to 64; 0 is the default of 8", "--streams %d", streams)
			}
			p := &pull{cmd: cmd, g: g, ref: r, store: store, streams: streams}
			if p.dir, err = store.path(g); err != nil {
				return err
			}
			if p.from, err = from.open(r, g.quietLog()); err != nil {
				return err
			}
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			p.from.look(ctx, p.note)
			if dry {
				return p.plan(ctx)
			}
			return p.run(ctx)
		},
	}
	store.add(cmd)
	from.add(cmd)
	cmd.Flags().IntVar(&streams, "streams", 0, "chunks that are fetched at once (default 8)")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only show what would be requested")
	jsonFlag(cmd, g)
	return cmd
}

// quietLog is the log of a command that shows its progress: retries and decisions are for
// --debug.
func (g *globals) quietLog() *slog.Logger {
	if g.debug {
		return g.log()
	}
	return slog.New(slog.DiscardHandler)
}

// pull is one pull by hand.
type pull struct {
	cmd     *cobra.Command
	g       *globals
	ref     image.Reference
	store   storeFlag
	dir     string // of the store
	from    origins
	streams int

	start time.Time
	bar   *progress
}

func (p *pull) json() bool { return p.g.output == "json" }

// note tells a person something beside the progress.
func (p *pull) note(text string) { fmt.Fprintln(p.cmd.ErrOrStderr(), "note:", text) }

// pulled is the last line of --json.
type pulled struct {
	ending
	Ref     string           `json:"ref"`
	Digest  fleet.Digest     `json:"digest,omitempty"`
	Disk    string           `json:"disk,omitempty"`
	Seconds float64          `json:"seconds"`
	Bytes   map[string]int64 `json:"bytes,omitempty"` // on the wire, by source
	Reused  int64            `json:"reused"`          // bytes on the wire that other images saved
}

func (p *pull) run(ctx context.Context) (err error) {
	p.start = time.Now()
	last := pulled{Ref: p.ref.String()}
	defer func() {
		if err == nil || !p.json() {
			return
		}
		last.Seconds, last.ending = p.seconds(), endingOf(err)
		err = &toldError{errors.Join(err, writeLine(p.cmd, last))}
	}()
	d, err := p.from.resolve(ctx, p.ref, p.note)
	if err != nil {
		if wasInterrupted(ctx, err) {
			return &interruptedError{"nothing was begun", "the same command begins again"}
		}
		return pullFailed(p.ref.Host(), 0, err)
	}
	last.Digest = d
	err = p.store.change(p.g, cache.Config{Sources: p.from.sources(), Streams: p.streams}, func(s *cache.Store) error {
		if err := p.bring(ctx, s, d); err != nil {
			return err
		}
		path, err := s.Path(d)
		if err != nil {
			return err
		}
		last.State, last.Disk, last.Seconds = string(fleet.ImageReady), filepath.Join(path, vm.DiskFile), p.seconds()
		last.Bytes, last.Reused = bySource(s.Moved(), p.ref.Host())
		return nil
	})
	if err != nil {
		return err
	}
	if p.json() {
		return writeLine(p.cmd, last)
	}
	_, err = fmt.Fprintf(p.cmd.OutOrStdout(), "%s is ready and verified (%s) after %s: %s\n%s\n", p.ref, d.Short(), short(time.Since(p.start)), last.origin(), last.Disk)
	return err
}

// bySource calls the image's registry by its host, and tells apart what no source gave.
func bySource(moved map[string]int64, host string) (bytes map[string]int64, reused int64) {
	bytes = make(map[string]int64)
	for source, n := range moved {
		switch source {
		case "reused":
			reused = n
		case "registry":
			bytes[host] = n
		default:
			bytes[source] = n
		}
	}
	return bytes, reused
}

func (p *pull) seconds() float64 { return float64(time.Since(p.start).Milliseconds()) / 1000 }

// origin says where the bytes came from.
func (l pulled) origin() string {
	var parts []string
	for _, source := range slices.Sorted(maps.Keys(l.Bytes)) {
		if n := l.Bytes[source]; n > 0 {
			parts = append(parts, size(n)+" from "+source)
		}
	}
	if l.Reused > 0 {
		parts = append(parts, size(l.Reused)+" saved by other images here")
	}
	if len(parts) == 0 {
		return "nothing had to be fetched"
	}
	return strings.Join(parts, ", ")
}

// bring pulls, and shows how it goes.
func (p *pull) bring(ctx context.Context, s *cache.Store, d fleet.Digest) error {
	p.bar = p.g.steps(p.cmd, p.ref.String())
	defer p.bar.end()
	watching, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		p.watch(watching, s, d)
	}()
	err := s.Pull(ctx, fleet.Hold{Ref: p.ref.String(), Digest: d, Demand: true})
	stop()
	<-watched
	p.look(s, d) // as it is in the end
	switch {
	case wasInterrupted(ctx, err):
		what := "nothing has come yet"
		if done, total := kept(s, d); done > 0 {
			what = fmt.Sprintf("%s of %s are here and kept", size(done), size(total))
		}
		return &interruptedError{what, "the same command goes on from there"}
	case err != nil:
		done, _ := kept(s, d)
		return pullFailed(p.ref.Host(), done, err)
	}
	return nil
}

// kept is what a pull that did not end leaves, in bytes on the wire.
func kept(s *cache.Store, d fleet.Digest) (done, total int64) {
	for _, i := range s.List() {
		if i.Digest == d {
			return i.Done, i.Total
		}
	}
	return 0, 0
}

// watchEvery is how often the rate is looked at when nothing is told.
const watchEvery = 500 * time.Millisecond

// watch shows what changes until the pull is over.
func (p *pull) watch(ctx context.Context, s *cache.Store, d fleet.Digest) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		changed := s.Changed()
		p.look(s, d)
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look tells the progress how the image is now.
func (p *pull) look(s *cache.Store, d fleet.Digest) {
	for _, i := range s.List() {
		switch {
		case i.Digest != d:
		case i.State == fleet.ImageReady:
			p.bar.finish(string(i.State), p.whole(d))
		case i.Total > 0:
			p.bar.begin(string(i.State))
			p.bar.tell(i.Done, i.Total)
		default:
			p.bar.begin(string(i.State))
		}
	}
}

// whole is what there was to fetch of an image that is ready, in bytes; it may have come
// before anybody looked.
func (p *pull) whole(d fleet.Digest) int64 {
	if _, total := p.bar.at(); total > 0 {
		return total
	}
	if v, err := cache.LookAt(p.dir, nil); err == nil {
		if i, err := v.Image(d); err == nil {
			return i.Done
		}
	}
	return 0
}

// plan shows what a pull would do.
func (p *pull) plan(ctx context.Context) error {
	d, err := p.from.resolve(ctx, p.ref, p.note)
	if err != nil {
		return pullFailed(p.ref.Host(), 0, err)
	}
	m, err := p.from.manifest(ctx, p.ref.String(), d)
	if err != nil {
		return pullFailed(p.ref.Host(), 0, err)
	}
	plan, err := planIn(p.dir, m)
	if err != nil {
		return err
	}
	if p.json() {
		return writeJSON(p.cmd.OutOrStdout(), map[string]any{
			"ref": p.ref.String(), "digest": d, "disk_size": m.DiskSize, "ready": plan.Ready,
			"chunks": len(plan.Chunks), "bytes": plan.Requests, "kept": plan.Kept, "reused": plan.Reused, "zero_bytes": plan.Zero,
		})
	}
	if plan.Ready {
		_, err = fmt.Fprintf(p.cmd.OutOrStdout(), "%s (%s) is here already: nothing would be requested\n", p.ref, d.Short())
		return err
	}
	_, err = fmt.Fprintf(p.cmd.OutOrStdout(), `%s is %s, a disk of %s
would be requested: %s in %s
here already:       %s from an earlier pull, %s in other images
needs no request:   %s of zeros
`, p.ref, d, size(m.DiskSize), or(size(plan.Requests), "0 B"), count(len(plan.Chunks), "chunk"),
		or(size(plan.Kept), "0 B"), or(size(plan.Reused), "0 B"), or(size(plan.Zero), "0 B"))
	return err
}

// planIn plans for a store that may not be there yet.
func planIn(dir string, m *image.Manifest) (cache.Plan, error) {
	v, err := cache.LookAt(dir, nil)
	if errors.Is(err, cache.ErrNoStore) {
		return cache.PlanAfresh(m), nil
	}
	if err != nil {
		return cache.Plan{}, err
	}
	return v.Plan(m)
}
