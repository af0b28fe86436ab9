package parts

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/github/githubtest"
)

// controllerConfig is the configuration of a controller in a process of its own.
const controllerConfig = `
fleet: bench
listen: 127.0.0.1:0
data: %s
redis: %s
github: {app_id: %d, private_key_file: %s, webhook_secret_files: [%s], api: %s}
pools: [{name: mac, scopes: [acme], labels: [self-hosted, macOS], image: %s}]
`

// BenchmarkQueued queues 12,000 jobs, as signed webhooks, to a controller process on a
// real redis-server with no node to run them, and then looks at that process: what it
// holds (RSS-MB, and peak-MB on the way), how fast the jobs came in (jobs/s; the
// simulated GitHub writes, checks and signs them on the same machine), what a pass over
// the queue takes (step-ms), and how much of a core it uses with nothing happening but
// its own loops (idle-cpu-%). GitHub's delivery log is swept all the while.
func BenchmarkQueued(b *testing.B) {
	const jobs = 12_000
	const watched = 30 * time.Second // a sweep and a half, and 30 passes
	for b.Loop() {
		b.StopTimer()
		s := newStage(b, true, 0, githubtest.Faults{})
		p := s.controlProcess()
		before := p.memory("VmRSS")
		b.StartTimer()
		began := time.Now()
		for range jobs / 250 {
			s.queue(250)
		}
		if err := s.github.WaitDelivered(b.Context()); err != nil {
			b.Fatal(err)
		}
		arrived := time.Since(began)
		b.StopTimer()
		s.until("the controller knows all jobs", 30*time.Second, func() bool { return p.metric(`paddock_jobs{status="queued"}`) == jobs })
		steps, spent, cpu := p.steps(), p.stepSeconds(), p.cpu()
		idle := time.NewTimer(watched)
		<-idle.C
		b.ReportMetric(float64(jobs)/arrived.Seconds(), "jobs/s")
		b.ReportMetric(before, "empty-MB")
		b.ReportMetric(p.memory("VmRSS"), "RSS-MB")
		b.ReportMetric(p.memory("VmHWM"), "peak-MB")
		b.ReportMetric((p.stepSeconds()-spent)/(p.steps()-steps)*1000, "step-ms")
		b.ReportMetric((p.cpu()-cpu).Seconds()/watched.Seconds()*100, "idle-cpu-%")
		b.StartTimer()
	}
}

// controlProcess is a controller in another process.
type controlProcess struct {
	s        *stage
	cmd      *exec.Cmd
	endpoint Endpoint
}

// controlProcess starts one, to which GitHub posts its webhooks.
func (s *stage) controlProcess() *controlProcess {
	s.b.Helper()
	path, c := filepath.Join(s.dir, "paddock.yaml"), s.config
	text := fmt.Appendf(nil, controllerConfig, c.Data, c.Redis, c.GitHub.AppID, c.GitHub.PrivateKeyFile,
		c.GitHub.WebhookSecretFiles[0], c.GitHub.API, c.Pools[0].Image)
	err := os.WriteFile(path, text, 0o600)
	if err != nil {
		s.b.Fatal(err)
	}
	log, err := os.Create(filepath.Join(s.dir, "controller.log"))
	if err != nil {
		s.b.Fatal(err)
	}
	p := &controlProcess{s: s, cmd: exec.Command(s.self, "controller", "--config", path)} //nolint:noctx // ended below
	p.cmd.Stderr = log
	if err := p.cmd.Start(); err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		_ = p.cmd.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && s.b.Failed() {
			s.b.Logf("the controller's log:\n%s", text)
		}
		_ = log.Close()
	})
	s.until("the controller answers", 30*time.Second, func() bool {
		if p.endpoint, err = ReadEndpoint(filepath.Join(s.config.Data, CLIFile)); err != nil {
			return false
		}
		client, err := p.endpoint.Client()
		if err != nil {
			s.b.Fatal(err)
		}
		_, err = client.Nodes(s.b.Context())
		return err == nil
	})
	s.github.SetWebhook(p.endpoint.URL + WebhookPath)
	return p
}

// memory reads a line of the process's status, in MB (10^6 bytes).
func (p *controlProcess) memory(line string) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.s.b.Fatal(err)
	}
	_, rest, _ := bytes.Cut(text, []byte(line+":"))
	var kib float64
	if _, err := fmt.Sscan(string(rest), &kib); err != nil {
		p.s.b.Fatal(err)
	}
	return kib * 1024 / 1e6
}

// cpu is the time that the process has used, of user and system.
func (p *controlProcess) cpu() time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		p.s.b.Fatal(err)
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // from the third on
	var ticks int64
	for _, field := range fields[11:13] { // utime and stime, of 10 ms
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			p.s.b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func (p *controlProcess) steps() float64       { return p.metric("paddock_step_seconds_count") }
func (p *controlProcess) stepSeconds() float64 { return p.metric("paddock_step_seconds_sum") }

// metric reads one of the controller's metrics.
func (p *controlProcess) metric(name string) float64 {
	b := p.s.b
	request, err := http.NewRequestWithContext(b.Context(), http.MethodGet, p.endpoint.URL+"/metrics", nil)
	if err != nil {
		b.Fatal(err)
	}
	answer, err := Trusting().RoundTrip(request)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	lines := bufio.NewScanner(io.LimitReader(answer.Body, 1<<20))
	for lines.Scan() {
		if value, found := strings.CutPrefix(lines.Text(), name+" "); found {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	b.Fatalf("no metric %s", name)
	return 0
}
