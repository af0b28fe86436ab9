package githubtest

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// runnerKey names a runner: ids are unique within a scope only, as at GitHub.
type runnerKey struct {
	scope string // lower case
	id    int64
}

// runner is a registered just-in-time runner.
type runner struct {
	key    runnerKey
	id     int64
	name   string
	scope  fleet.Scope
	group  int64
	labels fleet.Labels
	client string   // OAuth client id of its credentials
	tokens []string // what it got for them
	since  time.Time

	online    bool
	session   string
	job       *job
	delivered bool // the job reference was fetched and acknowledged
	told      bool // the cancellation was fetched

	wake chan struct{} // holds one: there may be a message
}

// register makes a runner, which is offline until it opens a session.
func (g *GitHub) register(scope fleet.Scope, name string, group int64, labels fleet.Labels) *runner {
	in := strings.ToLower(string(scope))
	g.nextRunner[in]++
	r := &runner{
		key: runnerKey{in, g.nextRunner[in]}, id: g.nextRunner[in], name: name, scope: scope, group: group,
		labels: labels, client: newUUID(g.c.Now()), since: g.c.Now(), wake: make(chan struct{}, 1),
	}
	g.runners[r.key], g.byClient[r.client] = r, r
	g.touch()
	return r
}

// taken reports whether a runner of the scope has the name; case does not matter.
func (g *GitHub) taken(scope fleet.Scope, name string) bool {
	for _, r := range g.runners {
		if r.scope == scope && strings.EqualFold(r.name, name) {
			return true
		}
	}
	return false
}

// poke wakes the runner's parked request for a message.
func (r *runner) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// match gives queued jobs to idle runners, oldest job first. A runner is not bound to
// the job that it was made for: any job that it fits may come.
func (g *GitHub) match() {
	idle := g.idle()
	if len(idle) == 0 {
		return
	}
	rest := g.queue[:0:0]
	for i, j := range g.queue {
		if len(idle) == 0 {
			rest = append(rest, g.queue[i:]...)
			break
		}
		at := slices.IndexFunc(idle, func(r *runner) bool { return g.fits(r, j) })
		if at < 0 {
			rest = append(rest, j)
			continue
		}
		r := idle[at]
		idle = slices.Delete(idle, at, at+1)
		r.job, r.delivered, r.told = j, false, false
		j.runner, j.assignedAt, j.message = r, g.c.Now(), newUUID(g.c.Now())
		r.poke()
	}
	g.queue = rest
}

// idle are the runners that could take a job now, the longest waiting first.
func (g *GitHub) idle() []*runner {
	var idle []*runner
	for _, r := range g.runners {
		if r.online && r.job == nil {
			idle = append(idle, r)
		}
	}
	slices.SortFunc(idle, func(a, b *runner) int {
		return cmp.Or(a.since.Compare(b.since), cmp.Compare(a.name, b.name))
	})
	return idle
}

// fits is GitHub's rule: the runner has every label that the job asks for, its scope
// contains the repository, and its group may be used by it.
func (g *GitHub) fits(r *runner, j *job) bool {
	repository := j.run.repo.Name
	if !r.scope.Contains(repository) || !r.labels.ContainsAll(j.labels) {
		return false
	}
	if r.scope.IsRepository() || r.group == 1 {
		return true
	}
	group, ok := g.group(string(r.scope), r.group)
	return ok && (group.Repositories == nil || slices.ContainsFunc(group.Repositories, func(name string) bool {
		return strings.EqualFold(name, repository)
	}))
}

// group finds a runner group; 1 is in every organization.
func (g *GitHub) group(org string, id int64) (Group, bool) {
	if id == 1 {
		return Group{Org: org, ID: 1, Name: "Default"}, true
	}
	for _, group := range g.c.Groups {
		if group.ID == id && strings.EqualFold(group.Org, org) {
			return group, true
		}
	}
	return Group{}, false
}

// sortedRunners are all runners in the order of their scopes and ids.
func (g *GitHub) sortedRunners() []*runner {
	return slices.SortedFunc(maps.Values(g.runners), func(a, b *runner) int {
		return cmp.Or(cmp.Compare(a.key.scope, b.key.scope), cmp.Compare(a.id, b.id))
	})
}

// removeRunner forgets a runner and its credentials.
func (g *GitHub) removeRunner(r *runner) {
	delete(g.runners, r.key)
	delete(g.byClient, r.client)
	for _, value := range r.tokens { // a job's own token stays good: its last word may come twice
		delete(g.bearers, value)
	}
	r.session = ""
	r.poke()
}
