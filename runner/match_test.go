package runner

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/paddock-ci/paddock/fleet"
)

// The cast: the fleet "f" serves the organization acme with the pools big (self-hosted,
// macos, xcode) and small (self-hosted, macos). Jobs are numbered in the order of their
// age. VM names say what they are: vmplaced has begun nothing, vmwarmed answers,
// vmclaim1 has a claim, vmready1 is registered, vmbusy11 is busy.

var (
	bigLabels   = fleet.NewLabels("self-hosted", "macos", "xcode")
	smallLabels = fleet.NewLabels("self-hosted", "macos")
)

func pools(j *fleet.Job) (fleet.PoolName, fleet.Scope, bool) {
	switch {
	case !fleet.Scope("acme").Contains(j.Repository):
		return "", "", false
	case smallLabels.ContainsAll(j.Labels):
		return "small", "acme", true
	case bigLabels.ContainsAll(j.Labels):
		return "big", "acme", true
	}
	return "", "", false
}

func aJob(id int, status fleet.JobStatus, labels fleet.Labels) *fleet.Job {
	return &fleet.Job{
		ID: fleet.JobID(id), Repository: "acme/app", Status: status, Labels: labels, CreatedAt: after(id),
	}
}

func queued(id int) *fleet.Job { return aJob(id, fleet.JobQueued, smallLabels) }

func on(j *fleet.Job, status fleet.JobStatus, vm fleet.VMID) *fleet.Job {
	j.Status, j.RunnerName = status, fleet.RunnerName("f", vm, 1)
	return j
}

func aVM(id string, state fleet.VMState, job int) *fleet.VM {
	return &fleet.VM{ID: fleet.VMID(id), Node: "mac1", Pool: "small", State: state, Job: fleet.JobID(job), PlacedAt: t0}
}

func claimed(v *fleet.VM, labels fleet.Labels) *fleet.VM {
	v.Attempt = 1
	v.Claim = &fleet.Claim{Scope: "acme", Group: 1, Labels: labels, Runner: fleet.RunnerName("f", v.ID, 1)}
	return v
}

func TestMatch(t *testing.T) {
	type set = map[fleet.VMID]fleet.JobID
	ready := func(id string, job int) *fleet.VM { return claimed(aVM(id, fleet.VMRegistered, job), smallLabels) }
	busy := func(id string, job int) *fleet.VM { return claimed(aVM(id, fleet.VMBusy, job), smallLabels) }
	retiring := func(v *fleet.VM) *fleet.VM { v.Retire = fleet.RetireDestroy; return v }
	destroyed := func(v *fleet.VM) *fleet.VM { v.Destroy = true; return v }

	for name, c := range map[string]struct {
		jobs    []*fleet.Job
		vms     []*fleet.VM
		set     set
		unmet   []fleet.JobID
		surplus []fleet.VMID
	}{
		"nothing there yet": {
			jobs: []*fleet.Job{queued(2), queued(1)}, unmet: []fleet.JobID{1, 2},
		},
		"the oldest job takes the most advanced VM": {
			jobs: []*fleet.Job{queued(2), queued(1), queued(3)},
			vms:  []*fleet.VM{aVM("vmplaced", fleet.VMPlaced, 0), aVM("vmwarmed", fleet.VMWarm, 0)},
			set:  set{"vmwarmed": 1, "vmplaced": 2}, unmet: []fleet.JobID{3},
		},
		"a possible match is kept": {
			jobs: []*fleet.Job{queued(1), queued(2)},
			vms:  []*fleet.VM{aVM("vmwarmed", fleet.VMWarm, 2), aVM("vmplaced", fleet.VMPlaced, 1)},
		},
		"an unclaimed VM serves its own pool only": {
			jobs: []*fleet.Job{aJob(1, fleet.JobQueued, bigLabels)},
			vms:  []*fleet.VM{aVM("vmwarmed", fleet.VMWarm, 0)}, unmet: []fleet.JobID{1},
		},
		"a runner takes jobs that ask for less than it has": {
			jobs: []*fleet.Job{queued(1)},
			vms:  []*fleet.VM{claimed(aVM("vmready1", fleet.VMRegistered, 0), bigLabels)},
			set:  set{"vmready1": 1},
		},
		"a runner of another scope does not": {
			jobs: []*fleet.Job{queued(1)},
			vms: func() []*fleet.VM {
				v := ready("vmready1", 0)
				v.Claim.Scope = "acme/other"
				return []*fleet.VM{v}
			}(),
			unmet: []fleet.JobID{1}, surplus: []fleet.VMID{"vmready1"},
		},
		"stolen: in_progress swaps the matches": {
			jobs: []*fleet.Job{on(queued(1), fleet.JobInProgress, "vmready2"), queued(2)},
			vms:  []*fleet.VM{ready("vmready1", 1), ready("vmready2", 2)},
			set:  set{"vmready2": 1, "vmready1": 2},
		},
		"stolen by a stranger: its VM serves the next job": {
			jobs: []*fleet.Job{
				func() *fleet.Job { j := aJob(1, fleet.JobInProgress, smallLabels); j.RunnerName = "kiosk-7"; return j }(),
				queued(2),
			},
			vms: []*fleet.VM{ready("vmready1", 1)}, set: set{"vmready1": 2},
		},
		"an earlier attempt's runner is not this one": {
			jobs: []*fleet.Job{func() *fleet.Job {
				j := aJob(1, fleet.JobInProgress, smallLabels)
				j.RunnerName = fleet.RunnerName("f", "vmready1", 2)
				return j
			}()},
			vms: []*fleet.VM{ready("vmready1", 0)}, surplus: []fleet.VMID{"vmready1"},
		},
		"cancelled while queued: a registered VM is left over": {
			jobs: []*fleet.Job{aJob(1, fleet.JobCompleted, smallLabels)},
			vms:  []*fleet.VM{ready("vmready1", 1)},
			set:  set{"vmready1": 0}, surplus: []fleet.VMID{"vmready1"},
		},
		"cancelled while booting: the VM is free for the next": {
			jobs: []*fleet.Job{aJob(1, fleet.JobCompleted, smallLabels), queued(2)},
			vms:  []*fleet.VM{aVM("vmbootin", fleet.VMBooting, 1)}, set: set{"vmbootin": 2},
		},
		"cancelled while running: its runner is spent": {
			jobs: []*fleet.Job{on(queued(1), fleet.JobCompleted, "vmbusy11"), queued(2)},
			vms:  []*fleet.VM{busy("vmbusy11", 1)}, unmet: []fleet.JobID{2},
		},
		"a closed gate releases": {
			jobs: []*fleet.Job{aJob(1, fleet.JobWaiting, smallLabels)},
			vms:  []*fleet.VM{aVM("vmwarmed", fleet.VMWarm, 1)}, set: set{"vmwarmed": 0},
		},
		"busy before in_progress arrives: it keeps its guess": {
			jobs: []*fleet.Job{queued(1)}, vms: []*fleet.VM{busy("vmbusy11", 1)},
		},
		"busy with a job whose record is gone: it takes no other": {
			jobs: []*fleet.Job{queued(2)}, vms: []*fleet.VM{busy("vmbusy11", 1)}, unmet: []fleet.JobID{2},
		},
		"an idle runner takes the job from a VM that boots for it": {
			jobs: []*fleet.Job{queued(1), aJob(2, fleet.JobQueued, fleet.NewLabels("macos"))},
			vms:  []*fleet.VM{aVM("vmbootin", fleet.VMBooting, 2), ready("vmready1", 0)},
			set:  set{"vmready1": 1},
		},
		"and that VM takes the next of its pool": {
			jobs: []*fleet.Job{queued(1), func() *fleet.Job {
				j := queued(2)
				j.Labels = fleet.NewLabels("self-hosted")
				return j
			}()},
			vms: []*fleet.VM{
				aVM("vmbootin", fleet.VMBooting, 1),
				claimed(aVM("vmready1", fleet.VMRegistered, 0), smallLabels),
				claimed(aVM("vmready2", fleet.VMRegistered, 0), smallLabels),
			},
			set: set{"vmready1": 2, "vmready2": 1, "vmbootin": 0},
		},
		"retiring and doomed VMs take nothing and lose their guess": {
			jobs: []*fleet.Job{queued(1), queued(2)},
			vms:  []*fleet.VM{retiring(ready("vmready1", 1)), destroyed(aVM("vmwarmed", fleet.VMWarm, 0))},
			set:  set{"vmready1": 0}, unmet: []fleet.JobID{1, 2},
		},
		"but what GitHub says stays true of them": {
			jobs: []*fleet.Job{on(queued(1), fleet.JobInProgress, "vmready1")},
			vms:  []*fleet.VM{retiring(ready("vmready1", 0))}, set: set{"vmready1": 1},
		},
		"finished VMs keep their history": {
			jobs: []*fleet.Job{queued(1)},
			vms:  []*fleet.VM{aVM("vmdone11", fleet.VMDone, 1), aVM("vmlost11", fleet.VMLost, 1)}, unmet: []fleet.JobID{1},
		},
		"a job is matched once": {
			jobs: []*fleet.Job{queued(1)},
			vms:  []*fleet.VM{aVM("vmplaced", fleet.VMPlaced, 1), aVM("vmwarmed", fleet.VMWarm, 1)},
			set:  set{"vmplaced": 0},
		},
		"a job of nobody's pool is not ours to meet": {
			jobs: []*fleet.Job{aJob(1, fleet.JobQueued, fleet.NewLabels("self-hosted", "windows"))},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := Match(c.jobs, c.vms, pools, "f")
			want := Matching{Set: c.set, Unmet: c.unmet, Surplus: c.surplus}
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A matrix of 256 jobs over 100 registered and 100 booting VMs: all VMs have work, the
// registered ones the oldest of it.
func TestMatchMatrix(t *testing.T) {
	var jobs []*fleet.Job
	for i := range 256 {
		jobs = append(jobs, queued(i+1))
	}
	var vms []*fleet.VM
	for i := range 100 {
		vms = append(vms, aVM(fmt.Sprintf("vmboo%03d", i), fleet.VMBooting, 0),
			claimed(aVM(fmt.Sprintf("vmreg%03d", i), fleet.VMRegistered, 0), smallLabels))
	}
	got := Match(jobs, vms, pools, "f")
	if len(got.Set) != 200 || len(got.Unmet) != 56 || len(got.Surplus) != 0 {
		t.Fatalf("%d matched, %d unmet, %d surplus", len(got.Set), len(got.Unmet), len(got.Surplus))
	}
	for _, v := range vms {
		if job := got.Set[v.ID]; (v.Claim != nil) != (job <= 100) {
			t.Errorf("VM %s in %s got job %d", v.ID, v.State, job)
		}
	}
}

// randomFleet draws jobs and VMs in every state, many of them matched wrongly.
func randomFleet(r *rand.Rand) ([]*fleet.Job, []*fleet.VM) {
	labels := []fleet.Labels{smallLabels, bigLabels, fleet.NewLabels("self-hosted"), nil, fleet.NewLabels("gpu")}
	statuses := []fleet.JobStatus{fleet.JobQueued, fleet.JobQueued, fleet.JobQueued, fleet.JobWaiting, fleet.JobInProgress, fleet.JobCompleted}
	var vms []*fleet.VM
	for i := range r.IntN(12) {
		v := aVM(fmt.Sprintf("vmrand%02d", i), States[r.IntN(len(States))], r.IntN(15))
		v.Pool = []fleet.PoolName{"small", "big"}[r.IntN(2)]
		v.PlacedAt = after(r.IntN(3))
		if v.State != fleet.VMPlaced && v.State != fleet.VMBooting && r.IntN(4) > 0 {
			claimed(v, labels[r.IntN(3)])
		}
		v.Destroy = r.IntN(10) == 0
		if r.IntN(10) == 0 {
			v.Retire = fleet.RetireDestroy
		}
		vms = append(vms, v)
	}
	var jobs []*fleet.Job
	for i := range r.IntN(15) {
		j := aJob(i+1, statuses[r.IntN(len(statuses))], labels[r.IntN(len(labels))])
		j.CreatedAt = after(r.IntN(4))
		if (j.Status == fleet.JobInProgress || j.Status == fleet.JobCompleted) && r.IntN(2) == 0 {
			j.RunnerName = fleet.RunnerName("f", fleet.VMID(fmt.Sprintf("vmrand%02d", r.IntN(12))), 1)
		}
		jobs = append(jobs, j)
	}
	return jobs, vms
}

// Properties of every matching: at most one VM for each job; nothing is given to a
// finished, retiring or doomed VM; every queued job of ours is matched or unmet, never
// both; no VM stands idle that an unmet job could have; a second pass changes nothing;
// and the order of the arguments does not matter.
func TestMatchProperties(t *testing.T) {
	for seed := range uint64(5000) {
		r := rand.New(rand.NewPCG(seed, 1))
		jobs, vms := randomFleet(r)
		got := Match(jobs, vms, pools, "f")

		after := make([]*fleet.VM, len(vms))
		holder := map[fleet.JobID]*fleet.VM{}
		for i, v := range vms {
			c := *v
			if job, changed := got.Set[v.ID]; changed {
				if v.State.Final() || (job != 0 && (v.Destroy || v.Retire != "") && !named(jobs, v, job)) {
					t.Fatalf("seed %d: %s VM %s was set to %d", seed, v.State, v.ID, job)
				}
				c.Job = job
			}
			after[i] = &c
			if c.Job == 0 || c.State.Final() {
				continue
			}
			if other := holder[c.Job]; other != nil {
				t.Fatalf("seed %d: job %d is on %s and %s", seed, c.Job, other.ID, c.ID)
			}
			holder[c.Job] = after[i]
		}
		for _, j := range jobs {
			pool, scope, ours := pools(j)
			unmet := slices.Contains(got.Unmet, j.ID)
			if open := j.Status == fleet.JobQueued && ours; unmet != (open && holder[j.ID] == nil) {
				t.Fatalf("seed %d: job %d %s: unmet %t, on %v", seed, j.ID, j.Status, unmet, holder[j.ID])
			}
			for _, v := range after {
				if unmet && idle(v) && couldRun(v, pool, scope, j) {
					t.Fatalf("seed %d: job %d is unmet beside VM %s", seed, j.ID, v.ID)
				}
			}
		}
		if again := Match(jobs, after, pools, "f"); len(again.Set) != 0 {
			t.Fatalf("seed %d: a second pass changes %v", seed, again.Set)
		}
		r.Shuffle(len(jobs), func(i, k int) { jobs[i], jobs[k] = jobs[k], jobs[i] })
		r.Shuffle(len(vms), func(i, k int) { vms[i], vms[k] = vms[k], vms[i] })
		if diff := cmp.Diff(got, Match(jobs, vms, pools, "f")); diff != "" {
			t.Fatalf("seed %d: another order, another matching: %s", seed, diff)
		}
	}
}

func named(jobs []*fleet.Job, v *fleet.VM, id fleet.JobID) bool {
	return slices.ContainsFunc(jobs, func(j *fleet.Job) bool {
		return j.ID == id && v.Claim != nil && j.RunnerName == v.Claim.Runner
	})
}

func idle(v *fleet.VM) bool {
	return !v.State.Final() && !v.Destroy && v.Retire == fleet.RetireNone && v.Job == 0
}

func couldRun(v *fleet.VM, pool fleet.PoolName, scope fleet.Scope, j *fleet.Job) bool {
	if v.Claim == nil {
		return v.Pool == pool
	}
	return v.Claim.Scope == scope && Takes(v.Claim.Labels, j.Labels)
}

// BenchmarkMatch: 10,000 queued jobs and 2,000 VMs. "classes": 20 label sets. "distinct":
// every job has a label of its own, as with strict binding by run id.
func BenchmarkMatch(b *testing.B) {
	for name, distinct := range map[string]int{"classes": 20, "distinct": 10000} {
		b.Run(name, func(b *testing.B) {
			labels := make([]fleet.Labels, distinct)
			for i := range labels {
				labels[i] = fleet.NewLabels("self-hosted", "macos", fmt.Sprintf("run-%d", i))
			}
			var jobs []*fleet.Job
			for i := range 10000 {
				jobs = append(jobs, aJob(i+1, fleet.JobQueued, labels[i%distinct]))
			}
			var vms []*fleet.VM
			for i := range 2000 {
				v := aVM(fmt.Sprintf("vm%06d", i), States[i%4], 0)
				if i%4 >= 2 {
					claimed(v, labels[i%distinct])
				}
				vms = append(vms, v)
			}
			poolOf := func(*fleet.Job) (fleet.PoolName, fleet.Scope, bool) { return "small", "acme", true }
			for b.Loop() {
				Match(jobs, vms, poolOf, "f")
			}
		})
	}
}
