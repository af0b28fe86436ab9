package cache

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// The registry is down and a node of the site has the manifest: it is asked, and the pull
// begins. One that gives another manifest, or fails, costs nothing but the question.
func TestManifestComesFromPeers(t *testing.T) {
	for name, test := range map[string]struct {
		spoil   func(*village)
		outside int // times that the registry was asked for it
	}{
		"peer":         {func(*village) {}, 0},
		"broken peer":  {func(v *village) { v.broken = true }, 1},
		"forged":       {func(v *village) { v.forged = true }, 1},
		"no such peer": {func(v *village) { v.stores = map[string]*Store{} }, 1},
		"silent site":  {func(v *village) { v.silent = true }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shelf := newShelf()
				h, m := shelf.put(t, "ABCD")
				v := newVillage(2)
				first := v.settle(t, "first", Config{}, newWell("registry", KindRegistry, shelf, 1e6))
				pullTook(t, first, h)
				there := newShelf() // has all but the manifest
				for d, b := range shelf.blobs {
					if d != h.Digest || test.outside > 0 {
						there.blobs[d] = b
					}
				}
				registry := &counted{well: newWell("registry", KindRegistry, there, 1e6)}
				s := v.settle(t, "second", Config{Sources: []Source{registry}})
				v.set(func() { test.spoil(v) })
				if took := pullTook(t, s, h); took > 4*time.Second {
					t.Errorf("the pull took %s", took)
				}
				if registry.manifests != test.outside || test.outside == 0 && registry.count() > 1 {
					t.Errorf("the registry was asked for %d manifests and %d of %d pieces; want %d manifests", registry.manifests, registry.count(), len(m.Pieces()), test.outside)
				}
			})
		})
	}
}

// counted is a well that counts who asks for manifests.
type counted struct {
	*well
	manifests int
}

func (c *counted) Manifest(ctx context.Context, ref string, d fleet.Digest) ([]byte, error) {
	c.set(func() { c.manifests++ })
	return c.well.Manifest(ctx, ref, d)
}
