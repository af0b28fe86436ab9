// Package progress tells how far a download is. It does not download. Called by the
// stand-in.
package progress

import (
	"sync"
	"sync/atomic"
)

// Reader is a download that goes on.
type Reader struct {
	total, current atomic.Int64
	once           sync.Once
	finish         chan struct{}
	err            error
}

// NewReader makes one of total bytes; -1: nobody said how many.
func NewReader(total int64) *Reader {
	r := &Reader{finish: make(chan struct{})}
	r.total.Store(total)
	return r
}

// Add counts bytes that have come.
func (r *Reader) Add(n int) { r.current.Add(int64(n)) }

// Finish ends it.
func (r *Reader) Finish(err error) {
	r.once.Do(func() {
		r.err = err
		close(r.finish)
	})
}

// Err is how it ended.
func (r *Reader) Err() error { return r.err }

// Finished is closed at its end.
func (r *Reader) Finished() <-chan struct{} { return r.finish }

// FractionCompleted is nonsense for an unknown total, as in the real package.
func (r *Reader) FractionCompleted() float64 {
	return float64(r.current.Load()) / float64(r.total.Load())
}
