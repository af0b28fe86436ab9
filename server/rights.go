package server

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// orderedKept is how long after its end an order still lets a node pull: it hears of the
// end with its next report, and a pull may be finishing.
const orderedKept = 10 * time.Minute

// ordered is what nodes were told to hold or to run, now or lately: what they may pull,
// besides the images of pools that they may run. A node's own word that it pulls an image
// is no right to it: it would open every image of every site to every node.
type ordered struct {
	mu   sync.Mutex
	last map[fleet.NodeID]map[orderedImage]time.Time // when it was seen in the node's orders
	// resolved is what the tags of the pools mean, which an emptied store does not know until
	// they are resolved again.
	resolved map[string]fleet.Digest
}

type orderedImage struct {
	digest fleet.Digest
	ref    string
}

// note takes what a view orders. An order that has ended is kept while the node reports
// that it still pulls the image, and for a while after.
func (o *ordered) note(view *store.View, pools []fleet.Pool, now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.last == nil {
		o.last = map[fleet.NodeID]map[orderedImage]time.Time{}
	}
	see := func(node fleet.NodeID, image orderedImage) {
		if o.last[node] == nil {
			o.last[node] = map[orderedImage]time.Time{}
		}
		o.last[node][image] = now
	}
	for node, orders := range view.Orders {
		for _, h := range orders.Hold {
			see(node, orderedImage{h.Digest, h.Ref})
		}
	}
	for _, vm := range view.VMs {
		if vm.State.Final() {
			continue
		}
		ref := ""
		if i := slices.IndexFunc(pools, func(p fleet.Pool) bool { return p.Name == vm.Pool }); i >= 0 {
			ref = pools[i].Image
		}
		see(vm.Node, orderedImage{vm.Image, ref})
	}
	o.resolve(view, pools)
	for node, images := range o.last {
		for image, seen := range images {
			if n := view.Nodes[node]; n != nil && !seen.Equal(now) {
				if i, ok := n.Image(image.digest); ok && i.State != fleet.ImageReady && holds(i.State) {
					images[image] = now
					continue
				}
			}
			if now.Sub(seen) > orderedKept {
				delete(images, image)
			}
		}
		if len(images) == 0 {
			delete(o.last, node)
		}
	}
}

// resolve notes what the pools' images are; o.mu is held.
func (o *ordered) resolve(view *store.View, pools []fleet.Pool) {
	was := o.resolved
	o.resolved = make(map[string]fleet.Digest, len(pools))
	for i := range pools {
		ref := pools[i].Image
		o.resolved[ref] = was[ref]
		if _, digest, ok := strings.Cut(ref, "@"); ok {
			o.resolved[ref] = fleet.Digest(digest)
		} else if image := view.Images[ref]; image != nil {
			o.resolved[ref] = image.Digest
		}
	}
}

// digest is what a pool's image is, "" if that is not known.
func (o *ordered) digest(ref string) fleet.Digest {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.resolved[ref]
}

// any reports whether a node was told of such an image.
func (o *ordered) any(node fleet.NodeID, such func(orderedImage) bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for image := range o.last[node] {
		if such(image) {
			return true
		}
	}
	return false
}

// mayRun reports whether the node is one that such a pool's VMs are placed on.
func (s *Server) mayRun(view *store.View, node fleet.NodeID, such func(fleet.Pool) bool) bool {
	n := view.Nodes[node]
	return n != nil && slices.ContainsFunc(s.c.Pools(), func(p fleet.Pool) bool { return p.Nodes.Matches(n) && such(p) })
}

// mayPull refuses an image that the node was not ordered to hold and that no pool runs on
// it.
func (s *Server) mayPull(view *store.View, node fleet.NodeID, d fleet.Digest) error {
	if s.ordered.any(node, func(i orderedImage) bool { return i.digest == d }) {
		return nil
	}
	if s.mayRun(view, node, func(p fleet.Pool) bool { return s.ordered.digest(p.Image) == d }) {
		return nil
	}
	return refusal(http.StatusForbidden, fmt.Sprintf("node %s shall not hold image %s, and no pool runs it there", node, d.Short()),
		"a node asks only for what it was ordered to pull; by hand: paddock image pull")
}

// mayPullFrom refuses repositories of no image that the node may pull.
func (s *Server) mayPullFrom(view *store.View, node fleet.NodeID, repository string) error {
	if s.ordered.any(node, func(i orderedImage) bool { return repositoryOf(i.ref) == repository }) {
		return nil
	}
	if s.mayRun(view, node, func(p fleet.Pool) bool { return repositoryOf(p.Image) == repository }) {
		return nil
	}
	return refusal(http.StatusForbidden, cut(fmt.Sprintf("node %s has no order to pull from %s", node, repository)),
		"a node gets tokens only for images that it was ordered to hold, and for those of pools that run on it")
}

// repositoryOf is the full name of an image's repository, "" if it has none.
func repositoryOf(ref string) string {
	r, err := name.ParseReference(ref)
	if err != nil {
		return ""
	}
	return r.Context().Name()
}

// holds: the node has the image, or parts of it and means to get the rest.
func holds(state fleet.ImageState) bool {
	switch state {
	case fleet.ImageQueued, fleet.ImageCaching, fleet.ImagePaused, fleet.ImageVerifying, fleet.ImageReady:
		return true
	case fleet.ImageEvicting, fleet.ImageFailed:
	}
	return false
}

const (
	// wordGap is the least time between two words of a node on an image; our nodes leave
	// 250 ms.
	wordGap = 100 * time.Millisecond
	// wordsKept is how long the time of a word is remembered at least, and maxWordsKept how
	// many are: one more only lets a node speak sooner.
	wordsKept    = time.Second
	maxWordsKept = 50_000
)

// lastWords is when nodes spoke last, so that one that floods is refused before it costs
// anything.
type lastWords struct {
	mu         sync.Mutex
	young, old map[wordOn]time.Time // old: of the period before
	turned     time.Time            // when young was begun
}

// wordOn is a node's word on an image. Its first one and its last one, for which it does not
// wait, are words of their own.
type wordOn struct {
	node        fleet.NodeID
	image       fleet.Digest
	first, last bool
}

// early returns how long the node shall wait before it says this, 0 if it may now.
func (l *lastWords) early(w wordOn, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if age := now.Sub(l.turned); age < 0 || age >= wordsKept || len(l.young) >= maxWordsKept {
		l.old, l.young, l.turned = l.young, map[wordOn]time.Time{}, now
	}
	said := cmp.Or(l.young[w], l.old[w])
	if age := now.Sub(said); age >= 0 && age < wordGap {
		return wordGap - age
	}
	l.young[w] = now
	return 0
}
