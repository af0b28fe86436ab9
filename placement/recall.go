package placement

import (
	"slices"

	"github.com/paddock-ci/paddock/fleet"
)

// Recall is what a node's next orders say was recalled, if they ask for evict: what the
// orders before asked for besides, and what was recalled then and is in doubt yet. What
// the node does not list any more is gone, and no doubt is left. The leader writes it with
// the orders, so that it outlives the leader.
func Recall(before *fleet.Orders, node *fleet.Node, evict []fleet.Digest) (recalled []fleet.Digest) {
	for _, d := range slices.Concat(before.Evict, InDoubt(before, node)) {
		if _, here := node.Image(d); here && !slices.Contains(evict, d) && !slices.Contains(recalled, d) {
			recalled = append(recalled, d)
		}
	}
	return recalled
}

// InDoubt is what was recalled from a node that has not reported since. A node carries an
// answer out before it reports again, and what it has begun to let go it reports as such:
// so after one report it is known whether it had read the order that was recalled.
// Revisions are those of the store, which counts all its writes in one line.
func InDoubt(o *fleet.Orders, node *fleet.Node) []fleet.Digest {
	if node.Rev > o.Rev {
		return nil
	}
	return o.Recalled
}
