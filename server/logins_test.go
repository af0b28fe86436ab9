package server

import (
	"slices"
	"testing"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// The cast: two pools that log in, one with a login of its own; one that has the agent; a
// pool that is no longer configured.
func TestLogins(t *testing.T) {
	pools := map[fleet.PoolName]*fleet.Pool{
		"own":   {Name: "own", Bootstrap: fleet.BootstrapSSH, SSH: &fleet.Login{User: "ci", Password: "hush", Key: "PEM"}},
		"stock": {Name: "stock", Bootstrap: fleet.BootstrapSSH},
		"agent": {Name: "agent", Bootstrap: fleet.BootstrapAgent},
	}
	vm := func(pool fleet.PoolName, s fleet.VMState) *fleet.VM { return &fleet.VM{Pool: pool, State: s} }
	got := logins([]*fleet.VM{
		vm("stock", fleet.VMBooting), vm("own", fleet.VMBusy), vm("own", fleet.VMPlaced), vm("agent", fleet.VMWarm), vm("gone", fleet.VMWarm),
	}, pools)
	want := []api.PoolLogin{
		{Pool: "own", User: "ci", Password: "hush", Key: "PEM"},
		{Pool: "stock", User: "admin", Password: "admin"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("logins of %d pools, want those of own and stock", len(got))
	}
	if left := logins([]*fleet.VM{vm("own", fleet.VMDone)}, pools); left != nil {
		t.Error("a node whose VMs have ended still gets their login")
	}
	// The revision is shown and logged: no secret goes into it, and none is needed, since
	// pools are read once, at the start.
	one, err := revision(api.SyncReply{Logins: got})
	if err != nil {
		t.Fatal(err)
	}
	got[0].Password, got[0].Key = "", ""
	other, err := revision(api.SyncReply{Logins: got})
	if err != nil || one != other {
		t.Errorf("the revision depends on a secret: %s and %s, %v", one, other, err)
	}
	if none, err := revision(api.SyncReply{}); err != nil || none == one {
		t.Errorf("the revision does not depend on whose logins there are: %v", err)
	}
}

// A runner order names GitHub's applications only where the pool's guests run GitHub's.
func TestArchives(t *testing.T) {
	h := newHouse(t)
	applications := []fleet.Archive{{OS: "darwin", Arch: "arm64", Name: "r.tar.gz", URL: "https://example.com/r.tar.gz", SHA256: "00"}}
	h.server.c.Archives = func() []fleet.Archive { return applications }
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	m.say(m.is("vmaaaaaa", fleet.VMWarm))
	h.claim("vmaaaaaa")
	if reply := m.say(m.is("vmaaaaaa", fleet.VMWarm)); len(reply.Start) != 1 || reply.Start[0].Archives != nil {
		t.Errorf("a pool with a command of its own: %+v", reply.Start)
	}
	stock := pool
	stock.Runner = nil
	h.server.c.Pools = func() []fleet.Pool { return []fleet.Pool{stock} }
	if reply := m.say(m.is("vmaaaaaa", fleet.VMWarm)); len(reply.Start) != 1 || !slices.Equal(reply.Start[0].Archives, applications) {
		t.Errorf("a pool without one: %+v", reply.Start)
	}
}
