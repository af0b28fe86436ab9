package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// qemuSwitch is a file in a node's directory by which its machines are QEMU's.
const qemuSwitch = "with-qemu"

// realOrder is one for a real machine whose runner goes on as more says.
func (m *mac) realOrder(id fleet.VMID, more string) api.VMOrder {
	return api.VMOrder{
		ID: id, Pool: "p", Image: m.image.digest, CPU: 1, Memory: qemutest.Memory, Bootstrap: fleet.BootstrapAgent, PlacedAt: time.Now(),
		Runner: []string{"sh", "-c", `read jit; echo "Running job: build"; ` + more},
	}
}

// awaitState waits until a saved state is whole: it is brought to disk while its VM has
// long been warm, and an agent that is killed meanwhile has none.
func (m *mac) awaitState(t *testing.T) {
	t.Helper()
	for late := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if marks, _ := filepath.Glob(filepath.Join(m.dir, "states", "*", "*", stateMark)); len(marks) > 0 {
			return
		}
		if time.Now().After(late) {
			t.Fatal("no state was saved within a minute")
		}
	}
}

// TestRealMachines: a real machine boots cold and is saved; the agent is killed with -9
// under its job and nothing is lost; the next machine starts from the state, sooner; one
// whose helper is killed is gone with it, and the node says so.
func TestRealMachines(t *testing.T) {
	guest, err := qemutest.Build(t.Context(), qemutest.Guest{})
	must(t, err)
	source, disk, err := guest.Source()
	must(t, err)
	m := newMac(t)
	m.image = build(t, source)
	must(t, disk.Close())
	m.prepare(t)
	for _, name := range []string{qemuSwitch, statesSwitch} {
		must(t, os.WriteFile(filepath.Join(m.dir, name), nil, 0o600))
	}
	first := m.child(t)
	m.office.order(func() { m.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
	m.office.place(m.realOrder("aaaaaaaa", "sleep 8; exit 0"))
	m.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
	m.awaitState(t)
	session := m.office.latest().Session
	first.kill(t)
	agent := m.child(t)
	m.office.await(t, "the next agent reports the job", func() bool { return m.office.last.Session != session })
	if r := m.office.awaitState(t, "aaaaaaaa", fleet.VMDone); r.Reason != "runner exited 0" || r.Failed || r.Tier != fleet.TierCold {
		t.Errorf("%+v", r)
	}
	m.office.order(func() { m.office.start["bbbbbbbb"] = runnerOrder("bbbbbbbb") })
	m.office.place(m.realOrder("bbbbbbbb", "exec sleep 300"))
	if r := m.office.awaitState(t, "bbbbbbbb", fleet.VMBusy); r.Tier != fleet.TierSaved {
		t.Errorf("%+v", r)
	}
	last := m.office.latest().Node
	image, _ := last.Image(m.image.digest)
	t.Logf("from clone to the guest's answer: cold %v, from a saved state %v", image.Start.Cold, image.Start.Saved)
	if image.Start.Saved == 0 || image.Start.Saved >= image.Start.Cold {
		t.Errorf("a saved state gains nothing: %+v", image.Start)
	}
	m.killHelper(t, "bbbbbbbb")
	if r := m.office.awaitState(t, "bbbbbbbb", fleet.VMDone); !r.Failed || !strings.HasPrefix(r.Reason, "the machine ended: ") {
		t.Errorf("%+v", r)
	}
	m.office.await(t, "both leave the journal", func() bool { return len(m.office.gone) == 2 })
	agent.stop(t)
	m.checkEmpty(t)
}
