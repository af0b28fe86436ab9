package controller

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/paddock-ci/paddock/fleet"
)

// metrics are the controller's own; those of a VM's phases are the server's, which sees
// each move, and those of webhooks the webhook's.
type metrics struct {
	leader        prometheus.Gauge
	step          prometheus.Histogram
	mint          prometheus.Histogram
	errandsFailed prometheus.Counter
	placed        *prometheus.CounterVec
	jobs          *prometheus.GaugeVec
	vms           *prometheus.GaugeVec
	nodes         *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) metrics {
	m := metrics{
		leader:        prometheus.NewGauge(prometheus.GaugeOpts{Name: "paddock_leader", Help: "1 if this replica leads."}),
		step:          prometheus.NewHistogram(prometheus.HistogramOpts{Name: "paddock_step_seconds", Help: "Duration of one pass of the controller.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14)}),
		mint:          prometheus.NewHistogram(prometheus.HistogramOpts{Name: "paddock_github_register_seconds", Help: "GitHub's answer to a runner's registration.", Buckets: prometheus.ExponentialBuckets(0.01, 2, 12)}),
		errandsFailed: prometheus.NewCounter(prometheus.CounterOpts{Name: "paddock_github_errands_failed_total", Help: "Calls of GitHub that failed and are repeated."}),
		placed:        prometheus.NewCounterVec(prometheus.CounterOpts{Name: "paddock_vms_placed_total", Help: "VMs placed, by pool and whether a job had to wait for the image."}, []string{"pool", "start"}),
		jobs:          prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "paddock_jobs", Help: "Open jobs by status."}, []string{"status"}),
		vms:           prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "paddock_vms", Help: "VMs by state."}, []string{"state"}),
		nodes:         prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "paddock_nodes", Help: "Nodes by whether they reported lately."}, []string{"status"}),
	}
	if r != nil {
		r.MustRegister(m.leader, m.step, m.mint, m.errandsFailed, m.placed, m.jobs, m.vms, m.nodes)
	}
	return m
}

// observeMetrics counts what the pass sees.
func (c *Controller) observeMetrics(p *pass) {
	jobs := map[fleet.JobStatus]int{fleet.JobWaiting: 0, fleet.JobQueued: 0, fleet.JobInProgress: 0}
	for _, j := range p.jobs {
		jobs[j.Status]++
	}
	for status, n := range jobs {
		c.metrics.jobs.WithLabelValues(string(status)).Set(float64(n))
	}
	vms := map[fleet.VMState]int{}
	for _, s := range []fleet.VMState{fleet.VMPlaced, fleet.VMBooting, fleet.VMWarm, fleet.VMRegistered, fleet.VMBusy} {
		vms[s] = 0
	}
	for _, vm := range p.vms {
		if !vm.State.Final() {
			vms[vm.State]++
		}
	}
	for state, n := range vms {
		c.metrics.vms.WithLabelValues(string(state)).Set(float64(n))
	}
	nodes := map[bool]int{}
	for id := range p.view.Nodes {
		nodes[p.reachable(id)]++
	}
	c.metrics.nodes.WithLabelValues("reachable").Set(float64(nodes[true]))
	c.metrics.nodes.WithLabelValues("unreachable").Set(float64(nodes[false]))
}
