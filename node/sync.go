package node

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// Durations of the exchange.
const (
	// answerTime is what an answer may take beyond the time the call is parked: a call
	// that hangs longer is a lost connection.
	answerTime = 15 * time.Second
	// firstPause and lastPause bound the wait after an error; a node counts as silent
	// after 45 s, so that there are several tries before.
	firstPause = 250 * time.Millisecond
	lastPause  = 5 * time.Second
	// idlePause keeps a controller that does not park from being asked without end.
	idlePause = 200 * time.Millisecond
	// farewellTime bounds the last exchange of a stopping agent.
	farewellTime = 5 * time.Second
)

// errNews ends a parked call: there is something to report.
var errNews = errors.New("there is news to report")

// sync keeps one exchange with the controller in flight until ctx ends. A call that
// carries news is not parked and not cut short, so that steady news cannot starve the
// orders; the call after it is parked until the orders change or there is news again.
func (a *Agent) sync(ctx, lives context.Context) {
	have, failures, parked := "", 0, false
	for ctx.Err() == nil {
		select {
		case <-a.news:
			parked = false
		default:
		}
		request := a.request(have, parked)
		sent := a.c.Now()
		reply, err := a.exchange(ctx, request)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errNews):
			parked = false
			continue
		case err != nil:
			failures++
			a.complain(failures, err)
			a.fendAlone(ctx)
			pause(ctx, backoff(failures, firstPause, lastPause))
			parked = false
			continue
		}
		if failures > 0 {
			a.log.Info("the controller answers again", "failures", failures)
		}
		failures = 0
		a.apply(ctx, lives, reply)
		if parked && reply.Revision == have && a.c.Now().Sub(sent) < idlePause {
			pause(ctx, idlePause)
		}
		have, parked = reply.Revision, true
	}
}

// exchange makes one call; a parked one ends with errNews as soon as there is news.
func (a *Agent) exchange(ctx context.Context, r api.SyncRequest) (api.SyncReply, error) {
	ctx, cancel := context.WithTimeout(ctx, r.Wait+answerTime)
	defer cancel()
	if r.Wait == 0 {
		return a.c.Sync(ctx, r)
	}
	call, cut := context.WithCancelCause(ctx)
	answered, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-a.news:
			a.tell() // it is still to be reported, also if the answer came first
			cut(errNews)
		case <-answered:
		}
	}()
	reply, err := a.c.Sync(call, r)
	close(answered)
	<-watched
	if err != nil && errors.Is(context.Cause(call), errNews) {
		err = errNews
	}
	cut(nil)
	return reply, err
}

// request is the whole inventory as it is now.
func (a *Agent) request(have string, parked bool) api.SyncRequest {
	node := fleet.Node{
		ID: a.c.ID, Tags: a.c.Tags, Arch: runtime.GOARCH, OS: runtime.GOOS,
		Driver: a.c.Driver, Version: a.c.Version,
		Slots: a.c.Slots, CPU: a.c.CPU, Memory: a.c.Memory,
		DiskFree: a.diskFree(), Session: a.session,
		Images: a.pulls.report(), Site: a.c.Site,
	}
	if a.c.Peer != nil {
		node.Peer = a.c.Peer.Where()
	}
	a.limit()
	a.starts.report(node.Images, a.states.free())
	a.reportEvicting(node.Images)
	if a.c.Rate != nil {
		node.PullRate = a.c.Rate()
	}
	r := api.SyncRequest{Protocol: api.Protocol, Session: a.session, Have: have}
	if parked {
		r.Wait = a.c.Wait
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sequence++
	r.Sequence, node.Sequence = a.sequence, a.sequence
	r.Node = node
	r.VMs = make([]api.VMReport, 0, len(a.vms))
	for _, id := range slices.Sorted(maps.Keys(a.vms)) {
		l := a.vms[id]
		if !l.begun {
			continue // not in the journal yet: nothing to say
		}
		if l.record.Report.State == fleet.VMDone && l.told == 0 {
			l.told = r.Sequence
		}
		r.VMs = append(r.VMs, l.record.Report)
	}
	return r
}

// diskFree asks for the space left, and repeats its last answer if it cannot be had: a
// zero would read as a full disk.
func (a *Agent) diskFree() int64 {
	if a.c.Free == nil {
		return 0
	}
	free, err := a.c.Free()
	if err == nil {
		a.relieve(free)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.log.Warn("free disk space is unknown", "error", err)
		return a.free
	}
	a.free = free
	return free
}

// farewell tells the controller how a stopped agent's VMs ended, with no slots left,
// so that it places nothing here. A failure costs nothing: the journal has it.
func (a *Agent) farewell(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewellTime)
	defer cancel()
	r := a.request("", false)
	r.Node.Slots = 0
	reply, err := a.c.Sync(ctx, r)
	if err != nil {
		a.log.Warn("the controller was not told that this node stops", "error", err)
		return
	}
	a.forget(reply.Applied)
}

// complain logs the first error in a row and then every 20th, so that an hour without
// a controller is not a thousand lines.
func (a *Agent) complain(failures int, err error) {
	if failures%20 == 1 {
		a.log.Warn("sync with the controller failed; VMs go on, and it is tried again", "failures", failures, "error", err)
	}
}

// progressPause is the least time between two reports of bytes moved: changes of state
// are told at once.
const progressPause = time.Second

// watchImages turns changes in the image store into news.
func (a *Agent) watchImages(ctx context.Context) {
	changer, ok := a.c.Images.(Changer)
	if !ok {
		return // then each sync, at the latest after Wait, says what is new
	}
	told, last := imageStates(a.c.Images.List()), a.c.Now()
	for {
		changed := changer.Changed()
		now := imageStates(a.c.Images.List())
		moved := !maps.Equal(told, now)
		if moved || a.c.Now().Sub(last) >= progressPause {
			told, last = now, a.c.Now()
			a.tell()
		}
		if moved {
			a.pulls.kick()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func imageStates(images []fleet.NodeImage) map[fleet.Digest]fleet.ImageState {
	states := make(map[fleet.Digest]fleet.ImageState, len(images))
	for _, i := range images {
		states[i.Digest] = i.State
	}
	return states
}

// backoff is the pause after failure number n, from 1: doubled from first up to most,
// then between half of that and all of it, so that a fleet does not knock in step.
func backoff(n int, first, most time.Duration) time.Duration {
	d := most
	if n < 20 { // beyond, the shift would overflow
		d = min(first<<(n-1), most)
	}
	return d/2 + rand.N(d/2+1)
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
