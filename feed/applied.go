package feed

// applied remembers which deliveries are done with, the latest ones, by their GUID: the
// same news under the same GUID is redelivered at times.
type applied struct {
	ring []string
	next int
	set  map[string]struct{}
}

func newApplied(size int) *applied {
	return &applied{ring: make([]string, size), set: map[string]struct{}{}}
}

func (a *applied) has(guid string) bool {
	_, found := a.set[guid]
	return found
}

// add remembers one more, and forgets the oldest if there is no room.
func (a *applied) add(guid string) {
	if a.has(guid) {
		return
	}
	delete(a.set, a.ring[a.next])
	a.ring[a.next] = guid
	a.set[guid] = struct{}{}
	a.next = (a.next + 1) % len(a.ring)
}

func (a *applied) clear() {
	clear(a.ring)
	clear(a.set)
	a.next = 0
}
