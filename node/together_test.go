package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm/helper"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/qemu"
)

// The parts of production fit.
var (
	_ Images   = (*cache.Store)(nil)
	_ Sweeper  = (*cache.Store)(nil)
	_ Changer  = (*cache.Store)(nil)
	_ Machines = (*helper.Driver)(nil)
)

// Names by which this test binary is another program.
const (
	helperArg = "vm-helper"
	agentArg  = "node-agent"
	guestArg  = "node-guest"
)

// TestMain makes this binary, when a test has started it, the guest, the helper of one
// machine, or the agent of a node.
func TestMain(m *testing.M) {
	processtest.Guest()
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	var err error
	switch os.Args[1] {
	case helperArg:
		err = helperMain()
	case guestArg:
		err = process.GuestMain(context.Background(), guest.AgentConfig{System: calm{}})
	case agentArg:
		err = agentMain(os.Args[2], os.Args[3])
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func helperMain() error {
	if len(os.Args) > 2 && os.Args[2] == qemuSwitch {
		driver, err := qemu.New(qemu.Config{CloneFile: cache.CloneFile, Network: "none"})
		if err != nil {
			return err
		}
		return helper.Main(context.Background(), driver, os.Stdin)
	}
	driver, err := process.New(process.Config{Command: []string{os.Args[0], guestArg}, Env: processtest.Env})
	if err != nil {
		return err
	}
	return helper.Main(context.Background(), savingDriver{driver}, os.Stdin)
}

// agentMain is a node: everything real but the controller, which is at url.
func agentMain(dir, url string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	agent, store, err := realAgent(dir, url, nil, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	return errors.Join(agent.Run(ctx), store.Close())
}

func realAgent(dir, url string, sources []cache.Source, log *slog.Logger) (*Agent, *cache.Store, error) {
	config := cache.Config{Dir: filepath.Join(dir, "images"), Sources: sources}
	store, err := cache.Open(config)
	for late := time.Now().Add(lockTime); errors.Is(err, cache.ErrInUse) && time.Now().Before(late); {
		store, err = cache.Open(config) // see lockTime
	}
	if err != nil {
		return nil, nil, err
	}
	command := []string{os.Args[0], helperArg}
	if _, err := os.Lstat(filepath.Join(dir, qemuSwitch)); err == nil {
		command = append(command, qemuSwitch)
	}
	machines, err := helper.New(helper.Config{Command: command, Dir: filepath.Join(dir, "run"), Env: processtest.Env})
	if err != nil {
		return nil, nil, err
	}
	_, noStates := os.Lstat(filepath.Join(dir, statesSwitch))
	agent, err := New(Config{
		SaveStates: noStates == nil, CloneFile: cache.CloneFile, StateMargin: 1,
		ID: "mac-1", Dir: dir, Driver: "process", Machines: machines, Images: store, Rate: store.Rate, Free: store.Free, Log: log,
		Sync: func(ctx context.Context, r api.SyncRequest) (reply api.SyncReply, err error) {
			body, err := json.Marshal(r)
			if err != nil {
				return reply, err
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
			if err != nil {
				return reply, err
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return reply, err
			}
			defer func() { _ = resp.Body.Close() }()
			if resp.StatusCode != http.StatusOK {
				return reply, errors.New(resp.Status)
			}
			return reply, json.NewDecoder(resp.Body).Decode(&reply)
		},
	})
	return agent, store, err
}

// serve makes the office reachable for other processes.
func (o *office) serve(t *testing.T) string {
	t.Helper()
	o.remote = true
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var request api.SyncRequest
		if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		reply, err := o.Sync(r.Context(), request)
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_ = json.NewEncoder(w).Encode(reply) // a killed agent does not listen
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// built is an image in memory and the fetcher of it.
type built struct {
	digest   fleet.Digest
	manifest []byte
	blobs    map[fleet.Digest][]byte
}

func build(t *testing.T, source tart.Source) *built {
	t.Helper()
	b := &built{blobs: map[fleet.Digest][]byte{}}
	var err error
	b.manifest, err = tart.Build(t.Context(), source, func(_ context.Context, l tart.Layer) (err error) {
		b.blobs[l.Digest], err = l.Bytes()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	b.digest = image.DigestOf(b.manifest)
	return b
}

func (b *built) Manifest(context.Context, string, fleet.Digest) ([]byte, error) {
	return b.manifest, nil
}

func (b *built) Name() string { return "built" }

func (b *built) Kind() cache.Kind { return cache.KindRegistry }

func (b *built) Has(w cache.Want) (int64, bool) { return w.Chunk.BlobSize, true }

func (b *built) Open(_ context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b.blobs[w.Chunk.Blob][from:])), nil
}

func (b *built) hold() fleet.Hold {
	return fleet.Hold{Digest: b.digest, Ref: "registry.example/base:1", Demand: true}
}

// mac is a node of real parts in a short directory, since sockets live in it.
type mac struct {
	dir    string
	office *office
	url    string
	image  *built
}

func newMac(t *testing.T) *mac {
	t.Helper()
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m := &mac{dir: dir, office: newOffice(), image: build(t, registrytest.Source("ab0a", 64<<10))}
	m.url = m.office.serve(t)
	return m
}

// order is one for a VM whose runner notes each run in a file, says that it has a job,
// and goes on as more says.
func (m *mac) order(id fleet.VMID, more string) api.VMOrder {
	return api.VMOrder{
		ID: id, Pool: "p", Image: m.image.digest, Bootstrap: fleet.BootstrapAgent, PlacedAt: time.Now(),
		Runner: []string{"sh", "-c", `read jit; echo run >>` + m.ran(id) + `; echo "Running job: build"; ` + more},
	}
}

func (m *mac) ran(id fleet.VMID) string { return filepath.Join(m.dir, "ran-"+string(id)) }

// runs counts how often a VM's runner ran.
func (m *mac) runs(id fleet.VMID) int {
	data, _ := os.ReadFile(m.ran(id)) // none: it never ran
	return strings.Count(string(data), "run")
}

// checkEmpty fails the test if anything but the image and its directory is left.
func (m *mac) checkEmpty(t *testing.T) {
	t.Helper()
	m.office.check(t)
	for _, dir := range []string{"clones", "journal", "run", "images/leases/*", "images/trash"} {
		left, err := filepath.Glob(filepath.Join(m.dir, dir, "*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v (%v)", dir, left, err)
		}
	}
	if left := processtest.Leftovers(t, m.dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestTogether: with the real image store, helpers and guests, an image is pulled, two
// VMs run a job each, and nothing is left.
func TestTogether(t *testing.T) {
	m := newMac(t)
	agent, store, err := realAgent(m.dir, m.url, []cache.Source{m.image}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx); err != nil {
			t.Errorf("the agent: %v", err)
		}
	})
	m.office.order(func() { m.office.hold = []fleet.Hold{m.image.hold()} })
	m.office.await(t, "the image is ready", func() bool {
		i, ok := m.office.last.Node.Image(m.image.digest)
		return ok && i.State == fleet.ImageReady
	})
	for id, code := range map[fleet.VMID]int{"aaaaaaaa": 0, "bbbbbbbb": 1} {
		m.office.order(func() { m.office.start[id] = runnerOrder(id) })
		m.office.place(m.order(id, fmt.Sprintf("exit %d", code)))
	}
	for id, want := range map[fleet.VMID]string{"aaaaaaaa": "runner exited 0", "bbbbbbbb": "runner exited 1"} {
		if r := m.office.awaitState(t, id, fleet.VMDone); r.Reason != want || r.Failed || m.runs(id) != 1 {
			t.Errorf("%+v after %d runs", r, m.runs(id))
		}
	}
	m.office.await(t, "both leave the journal", func() bool { return len(m.office.gone) == 2 })
	stop()
	running.Wait()
	if err := store.Close(); err != nil {
		t.Error(err)
	}
	m.checkEmpty(t)
}

// child is an agent in a process of its own.
type child struct {
	cmd    *exec.Cmd
	exited chan error
}

// prepare puts the image into the store, where the agents of other processes find it.
func (m *mac) prepare(t *testing.T) {
	t.Helper()
	store, err := cache.Open(cache.Config{Dir: filepath.Join(m.dir, "images"), Sources: []cache.Source{m.image}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(store.Pull(t.Context(), m.image.hold()), store.Close()); err != nil {
		t.Fatal(err)
	}
}

func (m *mac) child(t *testing.T) *child {
	t.Helper()
	c := &child{cmd: exec.CommandContext(t.Context(), os.Args[0], agentArg, m.dir, m.url), exited: make(chan error, 1)}
	c.cmd.Stdout, c.cmd.Stderr = t.Output(), t.Output()
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { c.exited <- c.cmd.Wait() }()
	return c
}

func (c *child) kill(t *testing.T) {
	t.Helper()
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatalf("%v, and the agent had ended by itself: %v", err, <-c.exited)
	}
	if err := <-c.exited; err == nil {
		t.Error("killed, but it ended well")
	}
}

func (c *child) stop(t *testing.T) {
	t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-c.exited; err != nil {
		t.Errorf("the agent: %v", err)
	}
}
