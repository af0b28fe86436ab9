package conformance

import (
	"bytes"
	"encoding/json"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// What GitHub does to its deliveries. In these houses the sweep mends nothing, except
// where it is the subject.

// deliver posts a delivery of the log once more, by hand, with its payload changed.
func (h *house) deliver(d githubtest.Delivery, change func(map[string]any)) {
	h.t.Helper()
	payload := d.Payload
	if change != nil {
		var fields map[string]any
		decoder := json.NewDecoder(bytes.NewReader(payload))
		decoder.UseNumber()
		if err := decoder.Decode(&fields); err != nil {
			h.t.Fatal(err)
		}
		change(fields)
		var err error
		if payload, err = json.Marshal(fields); err != nil {
			h.t.Fatal(err)
		}
	}
	r, err := http.NewRequestWithContext(h.t.Context(), http.MethodPost, h.control.part.URL()+parts.WebhookPath, bytes.NewReader(payload))
	if err != nil {
		h.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-GitHub-Event", d.Event)
	r.Header.Set("X-GitHub-Delivery", d.GUID)
	r.Header.Set("X-Hub-Signature-256", githubtest.Sign([]byte(webhookSecret), payload))
	answer, err := parts.Trusting().RoundTrip(r)
	if err != nil {
		h.t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusAccepted {
		h.t.Errorf("a delivery of job %d (%s) was answered %d, want 202", d.Job, d.Action, answer.StatusCode)
	}
}

// deliveriesOf are the entries of the log about one job, oldest first.
func (h *house) deliveriesOf(id fleet.JobID) []githubtest.Delivery {
	var found []githubtest.Delivery
	for _, d := range h.github.Deliveries() {
		if d.Job == id {
			found = append(found, d)
		}
	}
	return found
}

// accepted asserts that every webhook was answered with 202.
func (h *house) accepted() {
	h.t.Helper()
	h.waitDelivered()
	for _, d := range h.github.Deliveries() {
		if d.StatusCode != http.StatusAccepted {
			h.t.Errorf("the %s of job %d was answered %d %s, want 202", d.Action, d.Job, d.StatusCode, d.Status)
		}
	}
}

// Fair weather, so that the house itself is known to be good: one runner a job.
func TestFairWeather(t *testing.T) {
	h := open(t, plan{})
	ids := h.queue(5)
	h.succeeded(ids...)
	h.accepted()
	h.empty()
	if n := h.requests(mints); n != len(ids) {
		t.Errorf("%d runners were registered for %d jobs", n, len(ids))
	}
}

// Every delivery comes 32 times, as many at once as the sender can.
func TestThirtyTwoDuplicatesAtOnce(t *testing.T) {
	h := open(t, plan{github: githubtest.Config{
		Senders: 32,
		Faults:  githubtest.Faults{Delivery: func(githubtest.Delivery) githubtest.Fate { return githubtest.Fate{Copies: 31} }},
	}})
	ids := h.queue(3)
	h.succeeded(ids...)
	h.accepted()
	h.empty()
	if n := h.requests(mints); n != len(ids) {
		t.Errorf("%d runners were registered for %d jobs", n, len(ids))
	}
}

// The end of a job that was cancelled arrives before its beginning.
func TestCompletedBeforeQueued(t *testing.T) {
	h := open(t, plan{github: githubtest.Config{Faults: githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Drop: d.Action == "queued"}
	}}}})
	late := h.queue(1)[0]
	h.cancel(late)
	h.waitDelivered()
	h.untilView("the job's end is not known", func(v *viewOf) bool {
		return v.Jobs[late] != nil && v.Jobs[late].Status == fleet.JobCompleted
	})
	for _, d := range h.deliveriesOf(late) {
		if d.Action == "queued" {
			h.deliver(d, nil)
		}
	}
	h.github.SetFaults(githubtest.Faults{})
	// When another job has gone the whole way, the late one had every chance to.
	h.succeeded(h.queue(1)...)
	h.empty()
	if placed := h.placedFor(late); len(placed) > 0 {
		t.Errorf("VMs %v were placed for a job that was over", placed)
	}
}

// A gate opens and closes: queued (but waiting), waiting, queued, waiting, in every order
// of arrival. Six jobs end up queued and run; twenty-four end up waiting and do not.
func TestQueuedAndWaitingInAllOrders(t *testing.T) {
	var ahead atomic.Int64 // GitHub's gates are dated to the second: it lives faster than we
	h := open(t, plan{none: true, github: githubtest.Config{Now: func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }}})
	h.github.SetFaults(githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Drop: d.Action == "queued" || d.Action == "waiting"}
	}})
	step := func(act func(fleet.JobID) error, ids []fleet.JobID) {
		t.Helper()
		ahead.Add(int64(2 * time.Second))
		for _, id := range ids {
			if err := act(id); err != nil {
				t.Fatal(err)
			}
		}
	}
	gated := githubtest.JobSpec{Name: "deploy", Labels: mac, Environment: "production", Matrix: 30}
	ids := h.run("acme/app", gated)
	open, shut := ids[:6], ids[6:]
	step(h.github.Approve, ids)
	step(h.github.Hold, shut)

	for i, order := range orders(3) {
		h.deliverInOrder(open[i], order)
	}
	for i, order := range orders(4) {
		h.deliverInOrder(shut[i], order)
	}
	// Not before: a job that has been queued so far may be given a VM.
	h.join("mac-1")
	h.startNode("mac-1")
	h.succeeded(open...)
	if placed := h.placedFor(shut...); len(placed) > 0 {
		t.Errorf("VMs %v were placed for jobs that wait", placed)
	}
	v := h.view()
	for i, id := range shut {
		if v.Jobs[id] == nil || v.Jobs[id].Status != fleet.JobWaiting {
			t.Errorf("order %v: the job is %+v, want it waiting", orders(4)[i], v.Jobs[id])
		}
	}
	for _, id := range shut {
		h.cancel(id)
	}
	h.empty()
}

// deliverInOrder delivers what is in the log about a job, in the order of the indices.
func (h *house) deliverInOrder(id fleet.JobID, order []int) {
	h.t.Helper()
	log := h.deliveriesOf(id)
	if len(log) != len(order) {
		h.t.Fatalf("%d deliveries of job %d, want %d", len(log), id, len(order))
	}
	for _, i := range order {
		h.deliver(log[i], nil)
	}
}

// orders are the permutations of 0 to n-1.
func orders(n int) [][]int {
	if n == 0 {
		return [][]int{{}}
	}
	var all [][]int
	for _, shorter := range orders(n - 1) {
		for at := range n {
			longer := append(append(append([]int{}, shorter[:at]...), n-1), shorter[at:]...)
			all = append(all, longer)
		}
	}
	return all
}

// A job at an approval gate is no demand; approved, it runs.
func TestApprovalGate(t *testing.T) {
	h := open(t, plan{})
	gated := h.run("acme/app", githubtest.JobSpec{Name: "deploy", Labels: mac, Environment: "production"})
	h.succeeded(h.queue(2)...)
	if placed := h.placedFor(gated...); len(placed) > 0 {
		t.Errorf("VMs %v were placed for a job at its gate", placed)
	}
	if n := h.requests(mints); n != 2 {
		t.Errorf("%d runners were registered while 2 jobs were queued", n)
	}
	if err := h.github.Approve(gated[0]); err != nil {
		t.Fatal(err)
	}
	h.succeeded(gated...)
	h.accepted()
	h.empty()
}

// A matrix of 256 comes at once: every job is recorded and planned, those that are not
// cancelled run, once each, and those that are do not.
func TestAMatrixOf256(t *testing.T) {
	h := open(t, plan{none: true, slots: 4, github: githubtest.Config{Senders: 32}})
	ids := h.queue(256)
	h.waitDelivered()
	v := h.view()
	for _, id := range ids {
		if v.Jobs[id] == nil {
			t.Errorf("job %d is not recorded", id)
		}
	}
	// Without a node every job waits, and can say for what.
	client := h.admin()
	for _, id := range []fleet.JobID{ids[0], ids[100], ids[255]} {
		explained, err := client.Explain(t.Context(), id)
		if err != nil || explained.Pool != "mac" || explained.Wait == "" {
			t.Errorf("job %d is explained as %+v, %v: want the pool and what it waits for", id, explained, err)
		}
	}
	run, rest := ids[:24], ids[24:]
	for _, id := range rest {
		h.cancel(id)
	}
	h.waitDelivered()
	h.join("mac-1")
	h.startNode("mac-1")
	h.succeeded(run...)
	h.accepted()
	h.empty()
	if placed := h.placedFor(rest...); len(placed) > 0 {
		t.Errorf("VMs %v were placed for cancelled jobs", placed)
	}
	if n := h.requests(mints); n != len(run) {
		t.Errorf("%d runners were registered for %d jobs", n, len(run))
	}
}

// A job of an owner that is none of ours: taken in, shown, and nothing else.
func TestUnknownOwner(t *testing.T) {
	h := open(t, plan{github: githubtest.Config{Repositories: []githubtest.Repository{
		{Name: "acme/app"}, {Name: "stranger/app"}, {Name: "nobody/app", Uninstalled: true},
	}}})
	foreign := append(h.run("stranger/app", githubtest.JobSpec{Name: "build", Labels: mac}),
		h.run("nobody/app", githubtest.JobSpec{Name: "build", Labels: mac})...)
	h.succeeded(h.queue(2)...)
	h.accepted()
	v := h.view()
	for _, id := range foreign {
		if v.Jobs[id] == nil || v.Jobs[id].Status != fleet.JobQueued {
			t.Errorf("job %d is %+v, want it shown as queued", id, v.Jobs[id])
		}
		h.cancel(id)
	}
	if placed := h.placedFor(foreign...); len(placed) > 0 {
		t.Errorf("VMs %v were placed for strangers", placed)
	}
	h.accepted()
	h.empty()
}

// The pool's scope is an owner who never installed the App, beside one who did: no runner
// can be registered there. The VM that was started for it must not be lost for the others.
func TestOwnerWithoutTheApp(t *testing.T) {
	h := open(t, plan{
		slots: 1, deadlines: soon,
		pool: func(p *config.Pool) { p.Scopes = []string{"nobody", "acme"} },
		github: githubtest.Config{Repositories: []githubtest.Repository{
			{Name: "nobody/app", Uninstalled: true}, {Name: "acme/app"},
		}},
	})
	stuck := h.run("nobody/app", githubtest.JobSpec{Name: "build", Labels: mac})[0]
	h.waitDelivered()
	ids := h.queue(1)
	h.succeeded(ids...)
	h.cancel(stuck)
	h.empty()
}

// The payload's installation id is wrong, or missing: the owner's name decides.
func TestWrongAndMissingInstallation(t *testing.T) {
	h := open(t, plan{github: githubtest.Config{Faults: githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Installation: 999_999_999, Drop: d.Action == "queued"}
	}}}})
	ids := h.queue(2)
	h.deliver(h.deliveriesOf(ids[0])[0], nil)
	h.deliver(h.deliveriesOf(ids[1])[0], func(fields map[string]any) { delete(fields, "installation") })
	h.succeeded(ids...)
	h.empty()
}

// Deliveries of kinds that Paddock does not know are taken and change nothing.
func TestUnknownEventType(t *testing.T) {
	h := open(t, plan{github: githubtest.Config{Faults: githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Drop: d.Action == "queued"}
	}}}})
	id := h.queue(1)[0]
	d := h.deliveriesOf(id)[0]
	for _, event := range []string{"ping", "workflow_weather", "push"} {
		unknown := d
		unknown.Event = event
		h.deliver(unknown, nil)
	}
	// An action of the future on a known event says nothing that we could act on either.
	h.deliver(d, func(fields map[string]any) { fields["action"] = "reconsidered" })
	h.deliver(d, nil)
	h.succeeded(id)
	h.empty()
}

// Labels that are missing, doubled, or in another case. A job without any is no demand of
// ours, and still GitHub gives it to the first idle runner: ours, made for another.
func TestEmptyAndDoubledLabels(t *testing.T) {
	h := open(t, plan{})
	bare := h.run("acme/app", githubtest.JobSpec{Name: "bare", Labels: []string{}})
	h.waitDelivered()
	ids := append(h.run("acme/app", githubtest.JobSpec{Name: "doubled", Labels: []string{"self-hosted", "macOS", "MACOS", "self-hosted"}}),
		h.run("acme/app", githubtest.JobSpec{Name: "shouted", Labels: []string{"SELF-HOSTED"}})...)
	h.succeeded(append(ids, bare...)...)
	h.accepted()
	h.empty()
	if placed := h.placedFor(bare...); len(placed) > 0 {
		t.Errorf("VMs %v were placed for a job that asks for no runner of ours", placed)
	}
}

// One delivery in twenty is lost, whatever it says; the sweep brings it back.
func TestLostDeliveries(t *testing.T) {
	n := 0
	h := open(t, plan{slots: 4, sweep: 200 * time.Millisecond, github: githubtest.Config{
		Faults: githubtest.Faults{Delivery: func(githubtest.Delivery) githubtest.Fate {
			n++
			return githubtest.Fate{Drop: n%20 == 7} // the 7th is a queued one
		}},
	}})
	ids := h.queue(20)
	h.succeeded(ids...)
	h.empty()
	lost := 0
	for _, d := range h.github.Deliveries() {
		if d.StatusCode != http.StatusAccepted {
			lost++
		}
	}
	if lost < 3 {
		t.Errorf("%d of %d deliveries were lost: the test shows nothing", lost, len(h.github.Deliveries()))
	}
}

// A job that failed is run again: new ids, the same run, attempt 2.
func TestRerunAttemptTwo(t *testing.T) {
	h := open(t, plan{})
	run, ids, err := h.github.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
		{Name: "good", Labels: mac}, {Name: "bad", Labels: mac, Steps: []string{"exit 3"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	h.succeeded(ids[0])
	if job := h.waitJob(ids[1], fleet.JobCompleted); job.Conclusion != "failure" {
		t.Errorf("the bad job ended as %q", job.Conclusion)
	}
	again, err := h.github.Rerun(run, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(again) != 1 || again[0] == ids[1] {
		t.Fatalf("run again as %v", again)
	}
	if job := h.waitJob(again[0], fleet.JobCompleted); job.Attempt != 2 || job.Starts != 1 {
		t.Errorf("attempt %d was started %d times, want 2 and once", job.Attempt, job.Starts)
	}
	h.accepted()
	h.empty()
}
