package cache

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// startCommitter makes a committer on a journal and a file of its own.
func startCommitter(t *testing.T, done func(item), failed func(error)) (*committer, *os.File) {
	t.Helper()
	j, err := openJournal(filepath.Join(t.TempDir(), journalFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.close)
	disk, err := os.Create(filepath.Join(t.TempDir(), diskFile))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = disk.Close() })
	return newCommitter(j, done, failed), disk
}

// numbered is a note of a finished chunk.
func numbered(n int) note {
	return note{item: item{aChunk, digestOf(fmt.Sprintf("%x", n)[0])}}
}

// While one commit waits for the disk (which a lock stands for), sixteen streams read on,
// each as far as it may; the next commit is for all of them, and then they go on.
func TestCommitterHoldsBack(t *testing.T) {
	var mu sync.Mutex
	told := map[item]bool{}
	c, disk := startCommitter(t, func(i item) {
		mu.Lock()
		defer mu.Unlock()
		told[i] = true
	}, func(err error) { t.Error(err) })
	c.journal.mu.Lock()
	c.offer(nil, disk, numbered(0)) // is on its way to the journal
	streams := make([]*stream, 16)
	holds := make([]<-chan struct{}, len(streams))
	for i := range streams {
		streams[i] = &stream{}
		for streams[i].taken < holdAt {
			if holds[i] != nil {
				t.Fatalf("a stream was held back after %d bytes; want %d", streams[i].taken, holdAt)
			}
			hold, err := c.took(streams[i], 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			holds[i] = hold
		}
		if holds[i] == nil {
			t.Fatalf("a stream was not held back after %d bytes", streams[i].taken)
		}
		c.offer(streams[i], disk, numbered(i))
	}
	c.journal.mu.Unlock()
	for i, hold := range holds {
		for err := error(nil); hold != nil; {
			<-hold
			if hold, err = c.took(streams[i], 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	for i := range streams {
		if n := numbered(i).item; !c.journal.has(n) || !told[n] {
			t.Errorf("chunk %d: in the journal %t, told %t", i, c.journal.has(n), told[n])
		}
	}
}

// A commit that fails ends the pull: nothing more is noted, and all who wait are told.
func TestCommitterFails(t *testing.T) {
	failed := make(chan error, 1)
	c, disk := startCommitter(t, func(i item) { t.Errorf("%v was said to be done", i) }, func(err error) { failed <- err })
	if err := disk.Close(); err != nil { // so that it cannot be synced
		t.Fatal(err)
	}
	if err := c.commitNow(t.Context(), nil, disk, numbered(1)); err == nil || ClassOf(err) != ClassDisk {
		t.Errorf("got %v; want class disk", err)
	}
	if err := <-failed; ClassOf(err) != ClassDisk {
		t.Errorf("told of %v; want class disk", err)
	}
	if _, err := c.took(&stream{}, 1); ClassOf(err) != ClassDisk {
		t.Errorf("a stream got %v; want class disk", err)
	}
	if err := c.close(); ClassOf(err) != ClassDisk || c.journal.has(numbered(1).item) {
		t.Errorf("closed with %v; in the journal: %t", err, c.journal.has(numbered(1).item))
	}
}
