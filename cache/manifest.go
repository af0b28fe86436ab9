package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/image"
)

const (
	// siteTime is how long the site may think about who has a manifest; with patience it is
	// what a site that is silent costs a pull.
	siteTime = 500 * time.Millisecond
	// peersTime is how long peers may take for a manifest, all those asked together: it has
	// 33 KB in common, and the registry has it, too.
	peersTime = 3 * time.Second
	// peersAsked bounds how many of them are asked.
	peersAsked = 3
)

// fetchManifest asks for the manifest: other nodes of the site first, which spares the
// registry, and does without it when it is down; then the sources, one after the other,
// those that rest at last.
func (f *fetch) fetchManifest(ctx context.Context) ([]byte, error) {
	if raw := f.manifestNearby(ctx); raw != nil {
		return raw, nil
	}
	awake, resting := []Source(nil), []Source(nil)
	for _, src := range f.store.sources {
		if _, ok := f.store.tracks.look(src); ok {
			awake = append(awake, src)
		} else {
			resting = append(resting, src)
		}
	}
	var all refusals
	for _, src := range append(awake, resting...) {
		raw, err := f.manifestFrom(ctx, src)
		if err == nil || ctx.Err() != nil {
			return raw, errors.Join(err, ctx.Err())
		}
		all.add(src, err)
	}
	return nil, all.join()
}

// manifestNearby asks the nodes that the site names; nil: none gave it, for whatever reason.
func (f *fetch) manifestNearby(ctx context.Context) []byte {
	if f.store.site == nil {
		return nil
	}
	asked, cancel := context.WithTimeout(ctx, siteTime)
	defer cancel()
	answer, err := f.store.site.Ask(asked, Ask{Ref: f.ref, Image: f.entry.Digest})
	if err != nil {
		f.store.log.Debug("the site was asked in vain who has a manifest", "image", f.entry.Digest, "error", err)
		return nil
	}
	ctx, cancel = context.WithTimeout(ctx, peersTime)
	defer cancel()
	tried := 0
	for _, src := range answer.Peers {
		if _, awake := f.store.tracks.look(src); !awake {
			continue
		}
		raw, err := f.manifestFrom(ctx, src)
		if err == nil {
			return raw
		}
		f.store.log.Info("a peer did not give a manifest", "image", f.entry.Digest, "source", src.Name(), "error", err)
		if tried++; tried == peersAsked || ctx.Err() != nil {
			return nil
		}
	}
	return nil
}

// manifestFrom asks one source; one that sends something else has not got it.
func (f *fetch) manifestFrom(ctx context.Context, src Source) ([]byte, error) {
	raw, err := src.Manifest(ctx, f.ref, f.entry.Digest)
	if got := image.DigestOf(raw); err == nil && got != f.entry.Digest {
		err = &Error{Class: ClassDigest, Err: fmt.Errorf("%s answered with another manifest: its digest is %s", src.Name(), got)}
	}
	if class := ClassOf(err); err != nil && (class == ClassNetwork || class == ClassDigest && src.Kind() == KindPeer) && !errors.Is(err, context.Canceled) {
		f.store.tracks.with(src, func(t *track, now time.Time) { t.failed(now, err) })
	}
	if err != nil {
		return nil, err
	}
	return raw, nil
}
