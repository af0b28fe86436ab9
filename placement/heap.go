package placement

import "time"

// candidates is a heap of a pool's nodes by cost, lowest first, ties by node index. It
// knows each node's place, so that a cost can be corrected. container/heap would
// box every item and cannot look at the second best.
type candidates struct {
	items []costed
	place []int32 // by node: index into items, -1: not in the heap
}

type costed struct {
	cost time.Duration
	node int32
}

func newCandidates(nodes int) candidates {
	h := candidates{items: make([]costed, 0, nodes), place: make([]int32, nodes)}
	for i := range h.place {
		h.place[i] = -1
	}
	return h
}

func (h *candidates) len() int                  { return len(h.items) }
func (h *candidates) node(at int) int           { return int(h.items[at].node) }
func (h *candidates) cost(at int) time.Duration { return h.items[at].cost }

// add appends a node; build has to follow.
func (h *candidates) add(node int, cost time.Duration) {
	h.place[node] = int32(len(h.items))
	h.items = append(h.items, costed{cost, int32(node)})
}

// build makes a heap of what was added, in linear time.
func (h *candidates) build() {
	for i := len(h.items)/2 - 1; i >= 0; i-- {
		h.sink(i)
	}
}

// second is the place of the second best, -1 if there is none: a child of the best.
func (h *candidates) second() int {
	switch {
	case len(h.items) < 2:
		return -1
	case len(h.items) > 2 && h.less(2, 1):
		return 2
	default:
		return 1
	}
}

// update corrects the cost at a place.
func (h *candidates) update(at int, cost time.Duration) {
	h.items[at].cost = cost
	h.rise(at)
	h.sink(at)
}

// remove takes a node out.
func (h *candidates) remove(at int) {
	last := len(h.items) - 1
	h.swap(at, last)
	h.place[h.items[last].node] = -1
	h.items = h.items[:last]
	if at < last {
		h.rise(at)
		h.sink(at)
	}
}

func (h *candidates) less(a, b int) bool {
	x, y := h.items[a], h.items[b]
	return x.cost < y.cost || x.cost == y.cost && x.node < y.node
}

func (h *candidates) swap(a, b int) {
	h.items[a], h.items[b] = h.items[b], h.items[a]
	h.place[h.items[a].node], h.place[h.items[b].node] = int32(a), int32(b)
}

func (h *candidates) rise(at int) {
	for at > 0 && h.less(at, (at-1)/2) {
		h.swap(at, (at-1)/2)
		at = (at - 1) / 2
	}
}

func (h *candidates) sink(at int) {
	for {
		least := at
		for child := 2*at + 1; child <= 2*at+2 && child < len(h.items); child++ {
			if h.less(child, least) {
				least = child
			}
		}
		if least == at {
			return
		}
		h.swap(at, least)
		at = least
	}
}
