package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
)

// metrics of requests, and of VMs' phases: every move of a VM passes through here.
type metrics struct {
	requests *prometheus.HistogramVec // without the time a sync is parked
	parked   prometheus.Gauge
	sessions prometheus.Gauge
	start    *prometheus.HistogramVec
	starts   *prometheus.CounterVec
	boots    *prometheus.HistogramVec
	ended    *prometheus.CounterVec
	grants   prometheus.Counter
	outside  prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) metrics {
	m := metrics{
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "paddock_http_request_seconds", Help: "Time to answer, without the time a sync is parked.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"route", "status"}),
		parked:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "paddock_syncs_parked", Help: "Syncs that wait for news."}),
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{Name: "paddock_sessions_open", Help: "People's sessions with VMs that pass through this replica."}),
		start: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "paddock_start_delay_seconds", Help: "From a job's being queued to its runner being busy, split into queue, pull, boot and register.",
			Buckets: prometheus.ExponentialBuckets(0.05, 2, 16), // 50 ms to 27 min
		}, []string{"phase"}),
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "paddock_starts_total", Help: "Jobs started, by pool and whether the image was there (warm) or waited for (cold): the warm ratio is warm / all.",
		}, []string{"pool", "start"}),
		boots: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "paddock_vm_boot_seconds", Help: "From a VM's placing to its guest's answer.",
			Buckets: prometheus.ExponentialBuckets(0.05, 2, 14),
		}, []string{"pool"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "paddock_vms_ended_total", Help: "VMs torn down by their nodes, by pool and whether the node failed to serve them.",
		}, []string{"pool", "failed"}),
		grants: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "paddock_chunk_grants_total", Help: "Pieces of images that nodes were sent outside their site for.",
		}),
		outside: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "paddock_nodes_fetching_outside", Help: "Nodes that fetch images from outside their site now, among which the bandwidth is shared.",
		}),
	}
	// Before the first start a dashboard shows zeros, not gaps.
	for _, phase := range []string{"queue", "pull", "boot", "register"} {
		m.start.WithLabelValues(phase)
	}
	r.MustRegister(m.requests, m.parked, m.sessions, m.start, m.starts, m.boots, m.ended, m.grants, m.outside)
	return m
}

// moved counts one step of a VM; job is what it is matched with, or nil.
func (m *metrics) moved(vm *fleet.VM, on runner.Event, job *fleet.Job) {
	pool := string(vm.Pool)
	switch on {
	case runner.Answered:
		m.boots.WithLabelValues(pool).Observe(vm.WarmAt.Sub(vm.PlacedAt).Seconds())
	case runner.TookJob:
		m.starts.WithLabelValues(pool, warmth(vm)).Inc()
		if job != nil {
			p := phases(vm, job)
			for phase, d := range map[string]time.Duration{"queue": p.Queue, "pull": p.Pull, "boot": p.Boot, "register": p.Register} {
				m.start.WithLabelValues(phase).Observe(d.Seconds())
			}
		}
	case runner.Ended:
		m.ended.WithLabelValues(pool, map[bool]string{true: "true", false: "false"}[vm.Failed]).Inc()
	case runner.Accepted, runner.Started, runner.GivenUp:
	}
}

func warmth(vm *fleet.VM) string {
	if vm.Cold {
		return "cold"
	}
	return "warm"
}

// phases splits the start delay of a job on a VM that is busy with it; see api.Phases.
// The delay begins when the job was last queued: GitHub's created_at has whole seconds
// only, and is no delay of ours while an approval was waited for.
func phases(vm *fleet.VM, job *fleet.Job) api.Phases {
	queued := job.CreatedAt
	if gate := time.UnixMilli(job.Gate); gate.After(queued) && gate.Before(vm.BusyAt) {
		queued = gate
	}
	placed := later(queued, vm.PlacedAt)
	warm := later(placed, vm.WarmAt)
	busy := later(warm, vm.BusyAt)
	p := api.Phases{Queue: placed.Sub(queued), Boot: warm.Sub(placed), Register: busy.Sub(warm)}
	if vm.Cold {
		p.Queue, p.Pull = 0, p.Queue
	}
	return p
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
