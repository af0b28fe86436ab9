package main

import (
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// Fair weather first: jobs on two nodes, over TLS and a real Redis.
func TestJobsRun(t *testing.T) {
	tw := openTown(t, 2, "mac-1", "mac-2")
	tw.queue(6, 0.2)
	tw.waitDone(6, time.Minute)
	tw.cleanHouse()
}

// The agent is killed while a job runs: the job goes on, the next agent takes the VM
// over, sees the end and tears it down.
func TestAgentKilled(t *testing.T) {
	tw := openTown(t, 2, "mac-1")
	job := tw.queue(1, 3)[0]
	if _, err := tw.github.WaitJob(t.Context(), job, fleet.JobInProgress); err != nil {
		t.Fatal(err)
	}
	tw.nodes["mac-1"].kill()
	if len(tw.machines()) == 0 {
		t.Fatal("the VM died with the agent")
	}
	tw.startNode("mac-1")
	tw.waitDone(1, time.Minute)
	tw.cleanHouse()
}

// A service manager's stop and start of the agent is an upgrade: VMs go on.
func TestAgentRestarted(t *testing.T) {
	tw := openTown(t, 2, "mac-1")
	job := tw.queue(1, 3)[0]
	if _, err := tw.github.WaitJob(t.Context(), job, fleet.JobInProgress); err != nil {
		t.Fatal(err)
	}
	tw.nodes["mac-1"].signal(syscall.SIGTERM)
	<-tw.nodes["mac-1"].exited
	tw.startNode("mac-1")
	tw.waitDone(1, time.Minute)
	tw.cleanHouse()
}

// The controller is killed again and again while jobs are queued and run.
func TestControllerKilled(t *testing.T) {
	tw := openTown(t, 2, "mac-1", "mac-2")
	tw.queue(12, 0.3)
	for _, after := range []int{1, 4, 8} {
		tw.waitDone(after, time.Minute)
		tw.control.kill()
		tw.control = tw.start("controller", "controller")
		tw.waitReady()
	}
	tw.waitDone(12, 2*time.Minute)
	tw.cleanHouse()
}

// Redis stops for a while and comes back: webhooks meanwhile are refused and come back
// by the sweep.
func TestRedisAway(t *testing.T) {
	tw := openTown(t, 2, "mac-1", "mac-2")
	tw.queue(4, 0.5)
	tw.waitDone(1, time.Minute)
	tw.redis.Stop(t)
	tw.queue(4, 0.2)
	if err := tw.github.WaitDelivered(t.Context()); err != nil {
		t.Fatal(err)
	}
	tw.redis.Start(t)
	tw.waitDone(8, 2*time.Minute)
	tw.cleanHouse()
}

// Redis is emptied while sixty jobs are under way: every job still runs, none twice, and
// no VM that runs is destroyed for being absent.
func TestRedisEmptied(t *testing.T) {
	tw := openTown(t, 5, "mac-1", "mac-2")
	tw.queue(60, 0.5)
	for _, after := range []int{10, 30} {
		tw.waitDone(after, 2*time.Minute)
		tw.redis.Flush(t)
	}
	tw.waitDone(60, 4*time.Minute)
	for _, job := range tw.github.Jobs() {
		if job.Conclusion != "success" {
			t.Errorf("job %d ended as %q: its VM was destroyed under it", job.ID, job.Conclusion)
		}
	}
	tw.cleanHouse()
}

// A Mac is cut off at the worst moment: its runner is registered at GitHub, and it never
// gets to start it. The job runs on the other Mac as soon as the first one counts as
// silent; when that one is back, what it holds is cleared away.
func TestMacCutOff(t *testing.T) {
	tw := openTown(t, 1, "mac-1")
	cut := tw.nodes["mac-1"]
	var once sync.Once
	stopped := make(chan struct{})
	tw.github.SetFaults(githubtest.Faults{Request: func(r *http.Request) githubtest.RequestFault {
		if strings.HasSuffix(r.URL.Path, "/generate-jitconfig") {
			once.Do(func() { cut.signal(syscall.SIGSTOP); close(stopped) })
		}
		return githubtest.RequestFault{}
	}})
	t.Cleanup(func() { cut.signal(syscall.SIGCONT) }) // else it could not end
	tw.queue(1, 0.2)
	select {
	case <-stopped:
	case <-time.After(time.Minute):
		t.Fatal("no runner is registered")
	}
	token := tw.run("token", "create", "--node", "mac-2")
	tw.run("node", "join", strings.TrimSpace(token), "--name", "mac-2", "--dir", filepath.Join(tw.dir, "mac-2"))
	tw.startNode("mac-2")
	tw.waitDone(1, 75*time.Second) // 45 s of silence, then a boot
	cut.signal(syscall.SIGCONT)
	tw.cleanHouse()
}

// A third of the webhooks is lost, doubled or late: every job runs all the same.
func TestWebhooksLost(t *testing.T) {
	tw := openTown(t, 3, "mac-1", "mac-2")
	n := 0
	tw.github.SetFaults(githubtest.Faults{Delivery: func(githubtest.Delivery) githubtest.Fate {
		n++
		switch n % 9 {
		case 0:
			return githubtest.Fate{Drop: true}
		case 3:
			return githubtest.Fate{Copies: 3}
		case 6:
			return githubtest.Fate{Delay: 700 * time.Millisecond}
		default:
			return githubtest.Fate{}
		}
	}})
	tw.queue(18, 0.2)
	tw.waitDone(18, 2*time.Minute)
	tw.cleanHouse()
}
