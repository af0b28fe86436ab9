package store_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// statuses and gates are what histories are drawn from: unknown and equal gates, ones
// of other lengths, and ones that a double would round to the same number.
var (
	statuses = []fleet.JobStatus{fleet.JobWaiting, fleet.JobQueued, fleet.JobInProgress, fleet.JobCompleted}
	gates    = []int64{0, 1, 2, 10, 1_770_000_000_000, 1<<53 + 1, 1<<53 + 2, math.MaxInt64 - 1, math.MaxInt64, -5}
	runners  = []string{"", "", "paddock-f-aaaaaaaa-1", "other | runner\n", "%7C"}
)

// history makes news out of bytes: each byte pair is one delivery.
func history(id fleet.JobID, seed []byte) []store.Delivery {
	var list []store.Delivery
	for i := 0; i+1 < len(seed) && i < 20; i += 2 {
		d := job(id, statuses[seed[i]%4], gates[int(seed[i]/4)%len(gates)])
		d.At = time.UnixMilli(int64(i))
		d.Job.RunnerName = runners[int(seed[i+1])%len(runners)]
		d.Job.Name = fmt.Sprint("news ", i)
		if seed[i+1]&0x80 != 0 {
			d.Job.Feed = fleet.FeedPoll
		}
		list = append(list, d)
	}
	return list
}

// agree merges a history into a store and by fleet.MergeJob, and compares after each step.
func agree(t *testing.T, s *store.Store, list []store.Delivery) {
	t.Helper()
	var model fleet.Job
	for i, d := range list {
		m := merge(t, s, d)
		news := d.Job
		news.SeenAt = d.At
		want := store.Merged{Was: model.Status, Changed: true}
		next := fleet.MergeJob(news, news)
		if i > 0 {
			next = fleet.MergeJob(model, news)
			want.Changed = !reflect.DeepEqual(next, model)
		}
		want.Now = next.Status
		if m != want {
			t.Fatalf("news %d, %s gate %d: the script says %+v, Go says %+v", i, news.Status, news.Gate, m, want)
		}
		model = next
	}
	if len(list) == 0 {
		return
	}
	got := view(t, s).Jobs[model.ID]
	if got == nil || !got.SeenAt.Equal(model.SeenAt) || !got.CreatedAt.Equal(model.CreatedAt) {
		t.Fatalf("the script made %+v, Go %+v", got, model)
	}
	same := *got
	same.SeenAt, same.CreatedAt = model.SeenAt, model.CreatedAt // zones apart
	if !reflect.DeepEqual(same, model) {
		t.Fatalf("the script made %+v, Go %+v", same, model)
	}
}

// FuzzMergeMatchesScript holds fleet.MergeJob and merge.lua to the same answers.
func FuzzMergeMatchesScript(f *testing.F) {
	f.Add([]byte{1, 0, 2, 2, 3, 0})             // queued, in progress, completed
	f.Add([]byte{4, 0, 1, 0, 40, 0, 8, 0})      // gates known and unknown
	f.Add([]byte{21, 0, 24, 0, 29, 0, 32, 0})   // gates beyond a double
	f.Add([]byte{3, 0, 2, 2, 2, 3, 1, 0, 3, 4}) // completed first, runners later
	s := openEmbedded(f, store.EmbeddedConfig{})
	var last atomic.Int64
	f.Fuzz(func(t *testing.T, seed []byte) {
		id := fleet.JobID(last.Add(1))
		agree(t, s, history(id, seed))
		// The store must not grow with the fuzzing.
		if err := s.Commit(t.Context(), store.Txn{DropJobs: []fleet.JobID{id}}); err != nil {
			t.Fatal(err)
		}
	})
}

// TestRandomHistories does the same on a real Redis, several jobs at once.
func TestRandomHistories(t *testing.T) {
	s, _ := openRedis(t, store.Config{})
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(7, uint64(w)))
			for i := range 150 {
				seed := make([]byte, random.IntN(20))
				for k := range seed {
					seed[k] = byte(random.Uint32())
				}
				agree(t, s, history(fleet.JobID(1+1000*w+i), seed))
			}
		})
	}
	group.Wait()
}

// TestScriptOrder: the outcome in the store does not depend on the order of news.
func TestScriptOrder(t *testing.T) {
	s, _ := openRedis(t, store.Config{})
	random := rand.New(rand.NewPCG(3, 4))
	id := fleet.JobID(0)
	for range 40 {
		seed := make([]byte, 12)
		for k := range seed {
			seed[k] = byte(random.Uint32())
		}
		var first fleet.JobID
		for order := range 6 {
			id++
			list := history(id, seed)
			random.Shuffle(len(list), func(a, b int) { list[a], list[b] = list[b], list[a] })
			for _, d := range list {
				merge(t, s, d)
			}
			if order == 0 {
				first = id
			}
		}
		jobs := view(t, s).Jobs
		for other := first + 1; other <= id; other++ {
			a, b := jobs[first], jobs[other]
			if a.Status != b.Status || fleet.StatusRanks[a.Status].Gated && a.Gate != b.Gate {
				t.Fatalf("the same news in two orders: %s gate %d and %s gate %d", a.Status, a.Gate, b.Status, b.Gate)
			}
		}
	}
}

// TestRankTable shows the table as the script gets it.
func TestRankTable(t *testing.T) {
	const want = " completed=4f in_progress=3 queued=2gl waiting=1g"
	for range 20 { // maps have no order
		got := store.EncodeRanks(fleet.StatusRanks)
		if strings.Map(keepButFlags, got) != strings.Map(keepButFlags, want) || len(got) != len(want) {
			t.Fatalf("%q, want %q up to the order of flags", got, want)
		}
	}
}

func keepButFlags(r rune) rune {
	if r == 'g' || r == 'l' {
		return -1
	}
	return r
}

func FuzzJoinJob(f *testing.F) {
	head, body, err := store.SplitJob(job(7, fleet.JobQueued, 3).Job)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(strings.Join(head[:], "|") + "\n" + string(body))
	f.Add("queued|0||2026-03-01T12:00:00Z|webhook\n{\"id\":1}")
	f.Add("a|b|c|d|e\n{}")
	f.Add("\n")
	f.Fuzz(func(t *testing.T, record string) {
		j, err := store.JoinJob(record)
		if err != nil {
			return
		}
		// What can be read can be written and read again.
		head, body, err := store.SplitJob(*j)
		if err != nil {
			return // a year beyond 9999, which JSON refuses
		}
		again, err := store.JoinJob(strings.Join(head[:], "|") + "\n" + string(body))
		if err != nil || again.ID != j.ID || again.RunnerName != j.RunnerName || again.Gate != j.Gate || again.Status != j.Status {
			t.Fatalf("%+v came back as %+v, %v", j, again, err)
		}
	})
}
