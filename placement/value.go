package placement

import (
	"fmt"
	"math"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// The share of slots in use is taken to be at least leastBusy and at most mostBusy where
// it stands for the chance that a slot elsewhere is taken: nothing is ever certain.
const (
	leastBusy = 0.05
	mostBusy  = 0.95
)

// value is what the node's copy of an image is worth, for each GB that it fills: the
// seconds of waiting per hour that it saves. That is the jobs per hour, by the seconds that
// one waits for a new pull, by the chance that no other node with a copy has a slot for
// it. 0 where demand is not known: then what was used least recently goes first.
func (p *pass) value(n *node, k int, on *fleet.NodeImage) float64 {
	if p.images[k].lambda == 0 {
		return 0
	}
	return p.images[k].lambda * p.refetch(n, k, on).Seconds() * p.nowhereElse(n, k) / (float64(max(1, on.DiskBytes)) / 1e9)
}

// refetch is how long it would take to have the image again: what the node's other images
// share with it is still there.
func (p *pass) refetch(n *node, k int, on *fleet.NodeImage) time.Duration {
	bytes, shared := n.in.Missing[on.Digest]
	if !shared {
		bytes = p.images[k].Bytes
	}
	return transfer(bytes, n.rate)
}

// nowhereElse is the chance that no other node with a copy of the image has a free slot,
// if slots were taken independently of each other.
func (p *pass) nowhereElse(n *node, k int) float64 {
	elsewhere := p.images[k].slots - len(n.slots)
	if elsewhere <= 0 {
		return 1
	}
	return math.Pow(min(mostBusy, max(leastBusy, p.busy)), float64(elsewhere))
}

// whyGoes says in words why an image is the next to go.
func (p *pass) whyGoes(n *node, v *victim) string {
	switch v.class {
	case classSuperseded:
		return fmt.Sprintf("%s is ready there and newer", p.s.Images[v.on.Ref].Digest.Short())
	case classPartial:
		return fmt.Sprintf("nobody waits for this pull, which ended at %s of %s", size(v.on.Done), size(v.on.Total))
	case classSpare:
		return "no pool uses it, " + p.lastUsed(v.on)
	case classPool, classLast, classWanted:
	}
	k := p.index[v.on.Digest]
	copies := fmt.Sprintf("%d other copies", p.others(n, k))
	switch p.others(n, k) {
	case 0:
		copies = "no other copy"
	case 1:
		copies = "one other copy"
	}
	if p.images[k].lambda == 0 {
		return p.lastUsed(v.on) + ", " + copies
	}
	return fmt.Sprintf("least missed there, at %.2g jobs an hour that would wait %s for a pull, %s", p.images[k].lambda,
		about(p.refetch(n, k, v.on)), copies)
}

// others counts the copies of an image that other nodes in reach have.
func (p *pass) others(n *node, k int) int {
	if n.in.Reachable && n.have[k].presence == ready {
		return p.images[k].copies - 1
	}
	return p.images[k].copies
}

// lastUsed says how long ago an image was leased.
func (p *pass) lastUsed(on *fleet.NodeImage) string {
	if on.UsedAt.IsZero() {
		return "never used"
	}
	switch d := p.s.Now.Sub(on.UsedAt); {
	case d < time.Hour:
		return fmt.Sprintf("last used %dm ago", max(0, d)/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("last used %dh ago", d/time.Hour)
	default:
		return fmt.Sprintf("last used %dd ago", d/(24*time.Hour))
	}
}

// whyStays says in words why an image may not go.
func (p *pass) whyStays(n *node, on *fleet.NodeImage, why Stay) string {
	switch why {
	case StayMoving:
		return fmt.Sprintf("it is being pulled, %s of %s", size(on.Done), size(on.Total))
	case StayVerifying:
		return "it is being verified"
	case StayLeased:
		return fmt.Sprintf("%d VMs run from it or nodes fetch it", on.Leases)
	case StayPlaced:
		return "a VM is placed there that starts from it"
	case StayHeld:
		return "the node is ordered to have it"
	case StayPinned:
		if who, _ := p.pinned(n, on.Digest); who != "" {
			return "it is pinned: " + who
		}
		return "it is pinned"
	case StayEmpty:
		return "nothing of it fills the disk"
	case StayNeeded:
		return "a job is to start from it there"
	case StayLast:
		if k := p.index[on.Digest]; p.images[k].waiting == 0 {
			return fmt.Sprintf("it is the last copy of an image in demand, %.2g jobs an hour", p.images[k].lambda)
		}
		return "it is the last copy of an image in demand: jobs wait for it"
	case StayFresh:
		v := p.weighImage(n, on)
		return fmt.Sprintf("it came %s ago; a job has its room that has waited for %s", about(p.s.Now.Sub(on.ReadyAt).Abs()), about(v.after))
	case StaySilent, StayRecalled: // said where they are found
	}
	return string(why)
}
