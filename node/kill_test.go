package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	insecure "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/runner/guest/self"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/process/processtest"
)

// Files in a node's directory: the one that has its agents save states, and what went
// wrong with identities.
const (
	statesSwitch = "with-states"
	faultsFile   = "faults"
)

// savingDriver gives processes what a saved machine has: a disk and an identity, of which
// a host must never have two. A lock on the identity shows it, for as long as the machine
// lives: a helper outlives its machine by a moment.
type savingDriver struct{ *process.Driver } // also its Reap

func (d savingDriver) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	top := filepath.Dir(filepath.Dir(spec.Dir)) // clones lie in the node's directory
	identity := rand.Text()
	if spec.State != "" {
		data, err := os.ReadFile(filepath.Join(spec.Dir, vm.IdentityFile))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", vm.ErrState, err)
		}
		identity = string(data)
	}
	if err := os.MkdirAll(filepath.Join(top, "identities"), 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(top, "identities", identity), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = os.WriteFile(filepath.Join(top, faultsFile), []byte(fmt.Sprintf("%s has %s: %v", spec.ID, identity, err)), 0o600)
		return nil, err
	}
	m, err := d.Driver.Boot(ctx, spec)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	launcher, err := launch(spec)
	if err != nil {
		return nil, errors.Join(err, m.Destroy(ctx), lock.Close())
	}
	unlock := sync.OnceFunc(func() { _ = lock.Close() })
	go func() { // ends with the machine, and at the latest with the helper
		if _, err := m.Wait(context.WithoutCancel(ctx)); err == nil {
			unlock()
		}
	}()
	return savedMachine{m, spec, identity, unlock, launcher}, nil
}

// launch starts the reference launcher, as an image with it does, if the machine has the
// share for it.
func launch(spec vm.Spec) (*exec.Cmd, error) {
	shares := map[string]string{}
	for _, m := range spec.Mounts {
		shares[m.Name] = m.Path
	}
	if shares[self.MountIn] == "" {
		return nil, nil
	}
	cmd := exec.CommandContext(context.Background(), "sh", "-c", self.LauncherScript)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + spec.Dir, "PADDOCK_IN=" + shares[self.MountIn], "PADDOCK_OUT=" + shares[self.MountOut]}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd, cmd.Start()
}

type savedMachine struct {
	vm.Machine
	spec     vm.Spec
	identity string
	unlock   func()
	launcher *exec.Cmd
}

func (m savedMachine) Destroy(ctx context.Context) error {
	if m.launcher != nil {
		_ = syscall.Kill(-m.launcher.Process.Pid, syscall.SIGKILL)
		_ = m.launcher.Wait()
	}
	defer m.unlock()
	return m.Machine.Destroy(ctx)
}

func (m savedMachine) Save(ctx context.Context, dir string) error {
	return errors.Join(
		cache.CloneFile(ctx, filepath.Join(m.spec.Dir, vm.ConfigFile), filepath.Join(dir, vm.ConfigFile)),
		cache.CloneFile(ctx, filepath.Join(m.spec.Dir, vm.DiskFile), filepath.Join(dir, vm.DiskFile)),
		os.WriteFile(filepath.Join(dir, vm.IdentityFile), []byte(m.identity), 0o600))
}

// DialPort reaches the server that a test has on a socket in the node's directory.
func (m savedMachine) DialPort(ctx context.Context, port int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", portSocket(filepath.Dir(filepath.Dir(m.spec.Dir)), port))
}

func portSocket(dir string, port int) string { return filepath.Join(dir, fmt.Sprintf("port-%d", port)) }

// openPort serves a port of the guests of a node.
func (m *mac) openPort(t *testing.T, port int, serve func(net.Conn)) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", portSocket(m.dir, port))
	must(t, err)
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		conns.Wait()
	})
}

// calm is a system in which nothing has to be done.
type calm struct{}

func (calm) NetworkUp(context.Context) error        { return nil }
func (calm) Wake(context.Context, guest.Wake) error { return nil }
func (calm) Shutdown(context.Context) error         { return nil }

// killHelper kills a machine's helper with -9.
func (m *mac) killHelper(t *testing.T, id fleet.VMID) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.dir, "run", string(id), "helper.pid"))
	must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
}

// TestKilledHelper: a helper that is killed takes its machine with it, whether the agent
// watches or is dead as well; clone, lease and slot are free again and the seat of the
// saved state serves the next VM.
func TestKilledHelper(t *testing.T) {
	for name, alone := range map[string]bool{"the agent watches": false, "the agent is dead": true} {
		t.Run(name, func(t *testing.T) {
			m := newMac(t)
			m.prepare(t)
			must(t, os.WriteFile(filepath.Join(m.dir, statesSwitch), nil, 0o600))
			m.office.order(func() { m.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
			m.office.place(m.order("aaaaaaaa", "exec sleep 300"))
			agent := m.child(t)
			m.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
			m.awaitState(t) // for the next VM
			if alone {
				agent.kill(t)
			}
			m.killHelper(t, "aaaaaaaa")
			if alone {
				agent = m.child(t)
			}
			if r := m.office.awaitState(t, "aaaaaaaa", fleet.VMDone); !r.Failed || !strings.HasPrefix(r.Reason, "the machine ended: ") {
				t.Errorf("%+v", r)
			}
			if left := processtest.Find(t, filepath.Join(m.dir, "clones", "aaaaaaaa")); len(left) > 0 {
				t.Errorf("processes left: %v", left)
			}
			m.office.order(func() { m.office.start["bbbbbbbb"] = runnerOrder("bbbbbbbb") })
			m.office.place(m.order("bbbbbbbb", "exit 0"))
			if r := m.office.awaitState(t, "bbbbbbbb", fleet.VMDone); r.Reason != "runner exited 0" || r.Tier != fleet.TierSaved {
				t.Errorf("%+v", r)
			}
			m.office.await(t, "both leave the journal", func() bool { return len(m.office.gone) == 2 })
			agent.stop(t)
			if _, err := os.Lstat(filepath.Join(m.dir, faultsFile)); !errors.Is(err, fs.ErrNotExist) {
				t.Error("machines collided")
			}
			m.checkEmpty(t)
		})
	}
}

// TestKilledAnywhere: agents are killed with -9 again and again at moments of chance
// while VMs boot, start, run and end. No runner runs twice, every VM comes to its end,
// and one whose runner ran to its end is done for that reason.
func TestKilledAnywhere(t *testing.T) {
	for name, states := range map[string]bool{"cold": false, "saved states": true} {
		t.Run(name, func(t *testing.T) { killAnywhere(t, states) })
	}
}

func killAnywhere(t *testing.T, states bool) {
	m := newMac(t)
	m.prepare(t)
	if states {
		must(t, os.WriteFile(filepath.Join(m.dir, statesSwitch), nil, 0o600))
	}
	const vms = 8
	for i := range vms {
		id := fleet.VMID(fmt.Sprintf("vm%06d", i))
		m.office.order(func() { m.office.start[id] = runnerOrder(id) })
		m.office.place(m.order(id, `sleep 0.1; exit 0`))
	}
	const kills = 25
	for range kills {
		c := m.child(t)
		lived := time.NewTimer(20*time.Millisecond + insecure.N(250*time.Millisecond))
		<-lived.C
		c.kill(t)
	}
	killed := m.office.latest().Session
	last := m.child(t)
	m.office.await(t, "all VMs leave the journal", func() bool { return len(m.office.gone) == vms && m.office.last.Session != killed })
	last.stop(t)
	good, saved := 0, 0
	m.office.mu.Lock()
	reports := maps.Clone(m.office.reports)
	m.office.mu.Unlock()
	for id, r := range reports {
		switch n := m.runs(id); {
		case n > 1:
			t.Errorf("VM %s ran its runner %d times: %+v", id, n, r)
		case r.Reason == "runner exited 0" && n == 1 && !r.Failed:
			good++
			if r.Tier == fleet.TierSaved {
				saved++
			}
		default:
			t.Errorf("VM %s after %d runs: %q, failed %v", id, n, r.Reason, r.Failed)
		}
	}
	t.Logf("%d of %d VMs ran their job in spite of %d kills, %d from a saved state", good, vms, kills, saved)
	if faults, err := os.ReadFile(filepath.Join(m.dir, faultsFile)); err == nil {
		t.Errorf("machines that collided: %s", faults)
	}
	m.checkEmpty(t)
}

// TestKilledWithARunningJob: the agent is killed with -9 while a job runs. The job goes
// on, whatever the way into its guest; the next agent says so, sees it end as it would
// have, and leaves nothing.
func TestKilledWithARunningJob(t *testing.T) {
	for _, b := range []fleet.Bootstrap{fleet.BootstrapAgent, fleet.BootstrapSSH, fleet.BootstrapSelf} {
		t.Run(string(b), func(t *testing.T) { killWithARunningJob(t, b) })
	}
}

func killWithARunningJob(t *testing.T, b fleet.Bootstrap) {
	m := newMac(t)
	m.prepare(t)
	guest := newSSHD(t)
	if b == fleet.BootstrapSSH {
		m.openPort(t, sshPort, guest.serve)
		m.office.order(func() { m.office.logins = []api.PoolLogin{guest.login} })
	}
	end := filepath.Join(m.dir, "end")
	m.office.order(func() { m.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
	order := m.order("aaaaaaaa", `until test -e `+end+`; do sleep 0.02; done; exit 0`)
	order.Bootstrap = b
	m.office.place(order)
	first := m.child(t)
	m.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
	session := m.office.latest().Session
	first.kill(t)
	if len(processtest.Find(t, filepath.Join(m.dir, "clones", "aaaaaaaa"))) == 0 {
		t.Fatal("the machine went with the agent")
	}
	second := m.child(t)
	m.office.await(t, "the next agent reports the job", func() bool {
		return m.office.last.Session != session && len(m.office.last.VMs) == 1 && m.office.last.VMs[0].State == fleet.VMBusy
	})
	if err := os.WriteFile(end, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := m.office.awaitState(t, "aaaaaaaa", fleet.VMDone); r.Reason != "runner exited 0" || r.Failed || m.runs("aaaaaaaa") != 1 {
		t.Errorf("%+v after %d runs", r, m.runs("aaaaaaaa"))
	}
	m.office.await(t, "it leaves the journal", func() bool { return m.office.gone["aaaaaaaa"] })
	second.stop(t)
	m.checkEmpty(t)
	guest.check(t)
}
