package placement

import (
	"math"
	"slices"

	"github.com/paddock-ci/paddock/fleet"
)

// selfHosted is the label by which a job says that it is not for GitHub's own runners.
const selfHosted = "self-hosted"

// PoolFor returns the first pool in file order that takes the job, and the scope in
// which its runner registers. A pool takes a job of a repository in its scope if it
// has all the job's labels, the job asks for self-hosted (or the pool matches hosted
// jobs too), and the repository is private (or the pool takes public ones). If there
// is none, the refusal names the nearest pool and what stood in the way.
func PoolFor(pools []fleet.Pool, job fleet.Job) (fleet.Pool, fleet.Scope, Refusal) {
	i, scope, refusal := poolFor(pools, &job)
	if refusal.Refused() {
		return fleet.Pool{}, "", refusal
	}
	return pools[i], scope, Refusal{}
}

// poolFor is PoolFor by index.
func poolFor(pools []fleet.Pool, job *fleet.Job) (int, fleet.Scope, Refusal) {
	nearest, distance := Refusal{Reason: ReasonNoPool}, math.MaxInt
	_, asks := slices.BinarySearch(job.Labels, selfHosted)
	for i := range pools {
		pool := &pools[i]
		scope, inScope := pool.ScopeOf(job.Repository)
		refusal, d := Refusal{Pool: pool.Name}, 0
		missing := pool.Labels.Missing(job.Labels)
		// The distances order refusals from nearest to farthest. Labels are what the
		// author of a workflow chose, so a pool with all of them is nearer than one that
		// is in scope; a job that never asked for us is the farthest.
		switch {
		case !asks && !pool.MatchHosted:
			refusal, d = Refusal{Reason: ReasonHosted}, math.MaxInt-1
		case len(missing) > 0:
			refusal.Reason, refusal.Missing, d = ReasonNoPool, missing, 2+2*len(missing)
			if !inScope {
				d++
			}
		case !inScope:
			refusal.Reason, d = ReasonNotAllowed, 1
		case job.Public && !pool.PublicRepositories:
			refusal.Reason = ReasonPublic
		default:
			return i, scope, Refusal{}
		}
		if d < distance {
			nearest, distance = refusal, d
		}
	}
	return -1, "", nearest
}
