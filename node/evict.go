package node

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// Images leave in two ways. The leader marks them in its replies, since it alone knows
// where other copies are. And a node that nobody has answered for long lets go by itself
// what a newer image of the same name has superseded here, if its disk would fill up.

const (
	// aloneAfter is how long a node hears nothing before it acts by itself: by then the
	// controller counts it as silent, too.
	aloneAfter = 45 * time.Second
	// keptFor is the pause after an eviction that failed: the order for it stands in each
	// reply, and the next reply comes at once, since the failure is news.
	keptFor = 10 * time.Second
	// maxNames bounds the references of which the leader's last word is remembered.
	maxNames = 1000
)

// evict removes images that may go, unless the same reply asks to hold them. Removing
// takes as long as the file system likes, so it does not hold up the next sync.
func (a *Agent) evict(ctx context.Context, r api.SyncReply) {
	if len(r.Evict) == 0 {
		return
	}
	here := map[fleet.Digest]bool{}
	for _, i := range a.c.Images.List() {
		here[i.Digest] = i.Leases == 0 // leased ones stay, which the leader sees by the report
	}
	for _, d := range r.Evict {
		held := slices.ContainsFunc(r.Hold, func(h fleet.Hold) bool { return h.Digest == d })
		if here[d] && !held {
			a.letGo(ctx, d, "the controller marked it")
		}
	}
}

// letGo removes an image. From here on it is reported as evicting: the leader must not
// count on a copy that is about to go.
func (a *Agent) letGo(ctx context.Context, d fleet.Digest, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.evicting[d] || a.c.Now().Sub(a.kept[d]) < keptFor || ctx.Err() != nil {
		return
	}
	a.evicting[d] = true
	a.short.Go(func() {
		a.pulls.end(d) // one that nobody asks for any more may rest half done
		err := a.c.Images.Evict(d)
		if err != nil {
			a.log.Warn("image not evicted", "image", d.Short(), "why", why, "error", err)
		}
		a.mu.Lock()
		delete(a.evicting, d)
		if delete(a.kept, d); err != nil {
			a.kept[d] = a.c.Now()
		}
		a.mu.Unlock()
		if err == nil {
			a.states.prune(a.c.Images.List())
		}
		a.tell()
	})
}

// reportEvicting shows images as evicting that this agent has begun to let go, also where
// the store has not got so far yet.
func (a *Agent) reportEvicting(images []fleet.NodeImage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range images {
		if a.evicting[images[i].Digest] {
			images[i].State = fleet.ImageEvicting
		}
	}
}

// noteNames remembers which digest the leader last meant by each reference, and that it
// was heard.
func (a *Agent) noteNames(r api.SyncReply) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.heard = a.c.Now()
	if len(a.names) > maxNames {
		clear(a.names) // those in use are named again
	}
	for _, o := range r.Run {
		a.names[o.Ref] = o.Image
	}
	for _, h := range r.Hold {
		a.names[h.Ref] = h.Digest // named now; a VM's order may be from before the tag moved
	}
}

// fendAlone makes room for clones while the controller is out of reach. It is called
// after each call that failed.
func (a *Agent) fendAlone(ctx context.Context) {
	if a.c.Free == nil {
		return
	}
	a.mu.Lock()
	alone, names := a.c.Now().Sub(a.heard) >= aloneAfter, maps.Clone(a.names)
	used := map[fleet.Digest]bool{}
	for _, l := range a.vms {
		used[l.order.Image] = used[l.order.Image] || l.record.Report.State != fleet.VMDone
	}
	for _, h := range a.will.Hold {
		used[h.Digest] = true
	}
	leaving := len(a.evicting) > 0
	a.mu.Unlock()
	if !alone || leaving {
		return // one at a time: the disk is measured again when they are gone
	}
	free, err := a.c.Free()
	if err != nil {
		return // and repeated at the next failure
	}
	for _, d := range superseded(a.c.Images.List(), names, used, a.growthRoom()-free) {
		a.log.Info("evicting a superseded image: the disk fills up, and the controller is out of reach", "image", d.Short(), "free", free)
		a.letGo(ctx, d, "superseded, out of contact")
	}
}

// superseded picks the images that a node may let go without being told: ready, not
// leased or in use, and by whose name the leader last meant another digest, which is
// ready here too. Those used least recently come first, and no more than free the bytes
// that are short. names are the leader's last words.
func superseded(images []fleet.NodeImage, names map[string]fleet.Digest, used map[fleet.Digest]bool, short int64) []fleet.Digest {
	ready, current := map[fleet.Digest]bool{}, map[fleet.Digest]bool{}
	for i := range images {
		ready[images[i].Digest] = images[i].State == fleet.ImageReady
	}
	for _, d := range names {
		current[d] = true
	}
	var may []fleet.NodeImage
	for _, i := range images {
		newer, named := names[i.Ref]
		if i.State == fleet.ImageReady && i.Leases == 0 && !used[i.Digest] && !current[i.Digest] && named && ready[newer] {
			may = append(may, i)
		}
	}
	slices.SortFunc(may, func(x, y fleet.NodeImage) int {
		if c := x.UsedAt.Compare(y.UsedAt); c != 0 {
			return c
		}
		return strings.Compare(string(x.Digest), string(y.Digest))
	})
	var gone []fleet.Digest
	for _, i := range may {
		if short <= 0 {
			break
		}
		gone, short = append(gone, i.Digest), short-i.DiskBytes
	}
	return gone
}
