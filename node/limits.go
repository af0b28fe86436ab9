package node

import (
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

// defaultStreams is what a store takes for 0; see cache.Config.Streams.
const defaultStreams = 8

// limit tells the image store what its pulls may move: the fleet's share from outside as
// the last reply says, and on the whole what this node's configuration says, which is less
// while a VM runs a job. Only the goroutine that syncs calls it.
func (a *Agent) limit() {
	if a.c.Limit == nil {
		return
	}
	a.mu.Lock()
	outside, busy := a.will.Bandwidth, false
	for _, l := range a.vms {
		busy = busy || l.record.Report.State == fleet.VMBusy
	}
	a.mu.Unlock()
	l := cache.Limits{Outside: outside, Total: a.c.Bandwidth}
	if busy {
		if a.c.BandwidthBusy > 0 {
			l.Total = a.c.BandwidthBusy
		}
		// Half the streams, also without a limit in bytes: what they cost a build is mostly
		// the cores that decode and hash.
		l.Streams = a.c.Streams
		if l.Streams == 0 {
			l.Streams = defaultStreams
		}
		l.Streams = max(1, l.Streams/2)
	}
	if l != a.limits {
		a.limits = l
		a.c.Limit(l)
	}
}

// trust hands the peer port the key that checks the tokens of other nodes.
func (a *Agent) trust(key string) {
	if a.c.Peer == nil || key == "" || key == a.peerKey {
		return
	}
	if err := a.c.Peer.Trust(key); err != nil {
		a.log.Error("other nodes cannot be served: the controller's key for their tokens is none", "error", err)
		return
	}
	a.peerKey = key
}
