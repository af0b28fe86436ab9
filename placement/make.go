package placement

import "github.com/paddock-ci/paddock/fleet"

// Make plans one pass.
func Make(s Snapshot) Plan {
	var plan Plan
	for i := range s.Jobs {
		if _, _, refusal := poolFor(s.Pools, &s.Jobs[i]); refusal.Refused() {
			plan.Decisions = append(plan.Decisions, Decision{Class: refusal.String(), Jobs: []fleet.JobID{s.Jobs[i].ID},
				Refusals: map[Reason]int{refusal.Reason: 1}, Wait: refusal.String()})
		}
	}
	return plan
}

// Explain runs the same pass and returns the whole table of one of the snapshot's jobs;
// false if the job is not among them.
func Explain(s Snapshot, job fleet.JobID) (Explanation, bool) {
	for i := range s.Jobs {
		if s.Jobs[i].ID == job {
			pool, scope, refusal := PoolFor(s.Pools, s.Jobs[i])
			return Explanation{Job: job, Pool: pool.Name, Scope: scope, Refusal: refusal}, true
		}
	}
	return Explanation{}, false
}
