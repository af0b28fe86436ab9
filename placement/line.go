package placement

import (
	"cmp"
	"container/heap"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// entry is a job in the line.
type entry struct {
	job      *fleet.Job
	pool     int // index; -1: refused
	repo     int // index into pass.repos
	priority int
	duration time.Duration // predicted; 0: not known
	age      time.Duration
	capped   bool // older than the wait cap: head of the line
	scope    fleet.Scope
	refusal  Refusal
}

// entries looks up pool, repository and duration of every job. Jobs repeat labels and
// repositories, so PoolFor is asked once for each combination.
func (p *pass) entries() []*entry {
	type answer struct {
		pool    int
		scope   fleet.Scope
		refusal Refusal
	}
	answers := map[string]answer{}
	repos := map[string]int{}
	var key []byte
	entries := make([]entry, len(p.s.Jobs))
	line := make([]*entry, len(p.s.Jobs))
	for i := range p.s.Jobs {
		job := &p.s.Jobs[i]
		key = poolKey(key[:0], job)
		a, known := answers[string(key)]
		if !known {
			a.pool, a.scope, a.refusal = poolFor(p.s.Pools, job)
			answers[string(key)] = a
		}
		repo, known := repos[job.Repository]
		if !known {
			repo = len(p.repos)
			repos[job.Repository] = repo
			running := p.s.Running[job.Repository]
			p.repos = append(p.repos, repository{bound: running, planned: running})
		}
		line[i] = &entries[i]
		entries[i] = entry{job: job, pool: a.pool, scope: a.scope, refusal: a.refusal, repo: repo, age: age(job, p.s.Now)}
		p.look(line[i])
	}
	return line
}

// look completes an entry whose pool is found.
func (p *pass) look(e *entry) {
	if e.pool < 0 {
		return
	}
	pool := &p.pools[e.pool]
	e.priority, e.capped = pool.Priority, e.age >= p.waitCap
	if p.s.Durations != nil {
		if d, ok := p.s.Durations(e.job.Repository, e.job.Name); ok {
			e.duration = max(0, d)
		}
	}
	if pool.image < 0 {
		e.pool, e.refusal = -1, Refusal{Reason: ReasonUnresolved, Pool: pool.Name}
		return
	}
	image := &p.images[pool.image]
	image.waiting, image.waited = image.waiting+1, max(image.waited, e.age)
}

// poolKey is equal for jobs that PoolFor cannot tell apart.
func poolKey(key []byte, job *fleet.Job) []byte {
	if job.Public {
		key = append(key, '!')
	}
	key = append(key, job.Repository...)
	for _, l := range job.Labels {
		key = append(append(key, 0), l...)
	}
	return key
}

// age is how long a job has been waiting: since GitHub created it, or else since we saw it.
func age(job *fleet.Job, now time.Time) time.Duration {
	since := job.CreatedAt
	if since.IsZero() {
		since = job.SeenAt
	}
	if since.IsZero() {
		return 0
	}
	return now.Sub(since)
}

// older orders jobs by age, then by id.
func older(a, b *entry) int {
	return cmp.Or(cmp.Compare(b.age, a.age), cmp.Compare(a.job.ID, b.job.ID))
}

// walk hands every job to take, in the order of the line: those over the wait cap by
// age; then by priority, within it a job of the repository with the fewest slots at
// that moment, within that by age; at last those without a pool.
func (p *pass) walk(line []*entry, take func(*entry)) {
	slices.SortFunc(line, func(a, b *entry) int {
		switch {
		case a.pool < 0 != (b.pool < 0):
			return cmp.Compare(b.pool, a.pool) // -1 last
		case a.pool < 0:
			return older(a, b)
		case a.capped != b.capped:
			if a.capped {
				return -1
			}
			return 1
		case a.capped:
			return older(a, b)
		}
		return cmp.Or(cmp.Compare(b.priority, a.priority), strings.Compare(a.job.Repository, b.job.Repository), older(a, b))
	})
	for len(line) > 0 {
		head, end := line[0], 1
		if head.capped || head.pool < 0 {
			take(head)
			line = line[1:]
			continue
		}
		for end < len(line) && line[end].pool >= 0 && line[end].priority == head.priority {
			end++
		}
		p.walkFairly(line[:end], take)
		line = line[end:]
	}
}

// walkFairly takes jobs of one priority, sorted by repository and age.
func (p *pass) walkFairly(line []*entry, take func(*entry)) {
	q := turns{p: p}
	for start := 0; start < len(line); {
		end := start + 1
		for end < len(line) && line[end].repo == line[start].repo {
			end++
		}
		q.of = append(q.of, line[start:end])
		start = end
	}
	heap.Init(&q)
	for len(q.of) > 0 {
		take(q.of[0][0])
		if q.of[0] = q.of[0][1:]; len(q.of[0]) == 0 {
			heap.Pop(&q)
		} else {
			heap.Fix(&q, 0)
		}
	}
}

// turns is a heap of repositories with jobs left: whose turn it is comes first. Only
// the first one's count changes between two turns.
type turns struct {
	p  *pass
	of [][]*entry
}

func (q *turns) Len() int      { return len(q.of) }
func (q *turns) Swap(i, j int) { q.of[i], q.of[j] = q.of[j], q.of[i] }
func (q *turns) Push(x any)    { q.of = append(q.of, x.([]*entry)) }
func (q *turns) Less(i, j int) bool {
	a, b := q.of[i][0], q.of[j][0]
	return cmp.Or(cmp.Compare(q.p.repos[a.repo].planned, q.p.repos[b.repo].planned), older(a, b)) < 0
}
func (q *turns) Pop() any {
	last := q.of[len(q.of)-1]
	q.of = q.of[:len(q.of)-1]
	return last
}
