package cache

import (
	"bufio"
	"context"
	"os"
	"sync"
	"time"
)

// How much of what came may be lost when a process dies: 16 MiB for each connection, of
// which some is in sockets and readers and never gets to a stream. Between the two a
// stream reads on while the disk works.
const (
	// markEvery is how many bytes on the wire there are at most between two marks of a piece,
	// if it does not come so slowly that commitEvery is sooner.
	markEvery = 1 << 20
	// commitAt is how many bytes of one stream that are not in the journal make a commit
	// begin.
	commitAt = 4 << 20
	// holdAt is how many of them keep the stream from reading on until a commit has ended.
	holdAt = 14 << 20
	// commitEvery is when a commit begins for any bytes at all: what a slow network brought
	// is not much, and took as long.
	commitEvery = 2 * time.Second
)

// stream is one of the transfers that go on at once, of one piece after the other.
type stream struct {
	buffer *bufio.Reader // of the piece

	// The committer's:
	taken   int64 // bytes on the wire, of all its pieces
	durable int64 // of those, the ones before a mark (or end of a piece) in the journal
}

// committer writes what the streams of one pull have brought to disk and into the journal:
// one fdatasync and one line each for all of them, so that its cost does not grow with
// their number. No line is written before what it promises is on disk.
type committer struct {
	journal *journal
	done    func(item)  // told of each item that is finished and in the journal
	failed  func(error) // told of the error that ended it

	wake  chan struct{} // holds one: commit now
	stop  chan struct{} // closed by close
	ended chan struct{} // closed when run has returned

	mu      sync.Mutex
	pending map[item]offer
	round   chan struct{} // closed at the end of the commit that begins next, or goes on
	err     error         // no more commits
}

// offer is what a stream has to say of a piece; the latest one counts.
type offer struct {
	note
	file   *os.File // where its bytes are
	stream *stream  // nil: its bytes came from this disk
	taken  int64    // of the stream, when it was made
}

// queue makes an offer pending; c.mu is held.
func (c *committer) queue(s *stream, file *os.File, n note) {
	o := offer{note: n, file: file, stream: s}
	if s != nil {
		o.taken = s.taken
	}
	c.pending[n.item] = o
}

// newCommitter begins to commit; close ends it.
func newCommitter(j *journal, done func(item), failed func(error)) *committer {
	c := &committer{
		journal: j, done: done, failed: failed,
		wake: make(chan struct{}, 1), stop: make(chan struct{}), ended: make(chan struct{}),
		pending: make(map[item]offer), round: make(chan struct{}),
	}
	go c.run()
	return c
}

// run commits when it is woken, when there was time, and at the end.
func (c *committer) run() {
	defer close(c.ended)
	tick := time.NewTicker(commitEvery)
	defer tick.Stop()
	for {
		select {
		case <-c.wake:
		case <-tick.C:
		case <-c.stop:
			c.commit()
			return
		}
		c.commit()
	}
}

// close commits what is left and returns the error of any commit.
func (c *committer) close() error {
	close(c.stop)
	<-c.ended
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// took counts bytes of a stream and returns a channel to wait for before it reads on, or
// nil. A stream that waits has offered a mark of all that it took.
func (c *committer) took(s *stream, n int64) (hold <-chan struct{}, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.taken += n
	if s.taken-s.durable >= commitAt {
		c.rouse()
	}
	if s.taken-s.durable >= holdAt {
		return c.round, c.err
	}
	return nil, c.err
}

// offer hands a note in for the next commit.
func (c *committer) offer(s *stream, file *os.File, n note) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue(s, file, n)
	if n.finished() {
		c.rouse() // for peers, who wait for whole pieces
	}
}

// commitNow hands a note in and waits until it is on disk.
func (c *committer) commitNow(ctx context.Context, s *stream, file *os.File, n note) error {
	c.mu.Lock()
	c.queue(s, file, n)
	c.rouse()
	round := c.round
	c.mu.Unlock()
	select {
	case <-round:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// rouse makes a commit begin; c.mu is held.
func (c *committer) rouse() {
	select {
	case c.wake <- struct{}{}:
	default: // it is awake
	}
}

// commit writes what is pending.
func (c *committer) commit() {
	c.mu.Lock()
	offers, round := c.pending, c.round
	c.pending, c.round = make(map[item]offer), make(chan struct{})
	failed := c.err
	c.mu.Unlock()
	defer close(round)
	if len(offers) == 0 || failed != nil {
		return
	}
	if err := c.write(offers); err != nil {
		c.mu.Lock()
		c.err = diskError(err)
		c.mu.Unlock()
		c.failed(diskError(err))
		return
	}
	c.mu.Lock()
	for _, o := range offers {
		if o.stream != nil {
			o.stream.durable = max(o.stream.durable, o.taken)
		}
	}
	c.mu.Unlock()
	for _, o := range offers {
		if o.finished() {
			c.done(o.item)
		}
	}
}

// write puts the bytes on disk, and then the notes.
func (c *committer) write(offers map[item]offer) error {
	files := make(map[*os.File]bool, 1)
	notes := make([]note, 0, len(offers))
	for _, o := range offers {
		files[o.file] = true
		notes = append(notes, o.note)
	}
	for file := range files {
		if err := datasync(file); err != nil {
			return err
		}
	}
	return c.journal.add(notes)
}
