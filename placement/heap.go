package placement

import "time"

// arity of the heap: four children of 16 bytes share a cache line, and it is half as deep
// as a binary one.
const arity = 4

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
	for i := len(h.items) / arity; i >= 0; i-- {
		h.sink(i)
	}
}

// second is the place of the second best, -1 if there is none: a child of the best.
func (h *candidates) second() int {
	if len(h.items) < 2 {
		return -1
	}
	return h.leastChild(0)
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
	h.place[h.items[at].node] = -1
	moved := h.items[last]
	h.items = h.items[:last]
	if at < last {
		h.put(at, moved)
		h.rise(at)
		h.sink(at)
	}
}

func (a costed) less(b costed) bool {
	return a.cost < b.cost || a.cost == b.cost && a.node < b.node
}

// put writes an item to a place.
func (h *candidates) put(at int, x costed) {
	h.items[at] = x
	h.place[x.node] = int32(at)
}

// leastChild is the best of an item's children; there must be one.
func (h *candidates) leastChild(at int) int {
	least := arity*at + 1
	for child := least + 1; child <= arity*at+arity && child < len(h.items); child++ {
		if h.items[child].less(h.items[least]) {
			least = child
		}
	}
	return least
}

func (h *candidates) rise(at int) {
	x := h.items[at]
	for at > 0 && x.less(h.items[(at-1)/arity]) {
		h.put(at, h.items[(at-1)/arity])
		at = (at - 1) / arity
	}
	h.put(at, x)
}

func (h *candidates) sink(at int) {
	if at >= len(h.items) {
		return // an empty heap
	}
	x := h.items[at]
	for arity*at+1 < len(h.items) {
		child := h.leastChild(at)
		if !h.items[child].less(x) {
			break
		}
		h.put(at, h.items[child])
		at = child
	}
	h.put(at, x)
}
