package server

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/store"
)

func (s *Server) listNodes(ctx context.Context, c call, _ struct{}) ([]api.NodeRow, error) {
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	rows := []api.NodeRow{}
	for _, id := range slices.Sorted(maps.Keys(view.Nodes)) {
		rows = append(rows, nodeRow(view, view.Nodes[id], c.now))
	}
	return rows, nil
}

func nodeRow(view *store.View, n *fleet.Node, now time.Time) api.NodeRow {
	row := api.NodeRow{
		ID: n.ID, Status: api.NodeReady, Tags: n.Tags, Arch: n.Arch, OS: n.OS, Driver: n.Driver, Version: n.Version,
		Slots: n.Slots, CPU: n.CPU, Memory: n.Memory, DiskFree: n.DiskFree, PullRate: n.PullRate,
		Site: n.Site, Peer: n.Peer.Address, JoinedAt: n.JoinedAt, SeenAt: n.SeenAt,
	}
	switch {
	case now.Sub(n.SeenAt) >= unreachableAfter:
		row.Status = api.NodeUnreachable
	case n.Cordoned:
		row.Status = api.NodeCordoned
	}
	for _, i := range n.Images {
		if i.State == fleet.ImageReady {
			row.Images++
		}
	}
	for _, vm := range view.VMsOn(n.ID) {
		if !vm.State.Final() {
			row.Used++
		}
	}
	return row
}

func (s *Server) listVMs(ctx context.Context, _ call, _ struct{}) ([]api.VMRow, error) {
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	rows := make([]api.VMRow, 0, len(view.VMs))
	for _, vm := range view.VMs {
		row := api.VMRow{
			ID: vm.ID, Node: vm.Node, Pool: vm.Pool, State: vm.State, Since: runner.EnteredAt(*vm),
			Image: vm.Image, Cold: vm.Cold, Job: vm.Job, Reason: vm.Reason,
			Tier: vm.Tier, Address: vm.Address,
			Ending:   !vm.State.Final() && (vm.Destroy || vm.Retire != fleet.RetireNone),
			PlacedAt: vm.PlacedAt, BootingAt: vm.BootingAt, WarmAt: vm.WarmAt,
			RegisteredAt: vm.RegisteredAt, BusyAt: vm.BusyAt, DoneAt: vm.DoneAt,
		}
		if vm.Claim != nil {
			row.Runner = vm.Claim.Runner
		}
		if job := view.Jobs[vm.Job]; job != nil {
			row.JobName = job.Repository + ": " + job.Name
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b api.VMRow) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), a.PlacedAt.Compare(b.PlacedAt), cmp.Compare(a.ID, b.ID))
	})
	return rows, nil
}

// listImages turns the nodes' words around: by image instead of by node.
func (s *Server) listImages(ctx context.Context, _ call, _ struct{}) ([]api.ImageRow, error) {
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	type key struct {
		ref    string
		digest fleet.Digest
	}
	found := map[key]*api.ImageRow{}
	for _, id := range slices.Sorted(maps.Keys(view.Nodes)) {
		for _, i := range view.Nodes[id].Images {
			k := key{i.Ref, i.Digest}
			row := found[k]
			if row == nil {
				row = &api.ImageRow{Digest: i.Digest}
				row.Name, row.Tag = splitRef(i.Ref)
				if known := view.Images[i.Ref]; known != nil && known.Digest == i.Digest {
					row.Bytes, row.Current = known.Bytes, true
				}
				found[k] = row
			}
			row.SpaceUsed += i.DiskBytes
			if i.State == fleet.ImageReady {
				row.NodesCount++
			}
			row.Nodes = append(row.Nodes, api.ImageOnNode{Node: id, NodeImage: i})
		}
	}
	rows := make([]api.ImageRow, 0, len(found))
	for _, row := range found {
		rows = append(rows, *row)
	}
	slices.SortFunc(rows, func(a, b api.ImageRow) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Tag, b.Tag), cmp.Compare(a.Digest, b.Digest))
	})
	return rows, nil
}

// splitRef cuts "host:5000/repository:tag" at its tag; a reference by digest has none.
func splitRef(ref string) (name, tag string) {
	ref, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

func (s *Server) listJobs(ctx context.Context, c call, _ struct{}) ([]api.JobRow, error) {
	status := fleet.JobStatus(c.query.Get("status"))
	if _, known := fleet.StatusRanks[status]; status != "" && !known {
		return nil, refusal(http.StatusBadRequest, fmt.Sprintf("no job is ever %q", status), "use waiting, queued, in_progress or completed")
	}
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	serving := map[fleet.JobID]*fleet.VM{}
	for _, vm := range view.VMs {
		if better(vm, serving[vm.Job]) {
			serving[vm.Job] = vm
		}
	}
	rows := []api.JobRow{}
	for _, job := range view.Jobs {
		if status == "" || job.Status == status {
			rows = append(rows, jobRow(job, serving[job.ID]))
		}
	}
	slices.SortFunc(rows, func(a, b api.JobRow) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return rows, nil
}

// better picks among VMs that are or were meant for one job: the one that ran it, then
// a live one, then the latest.
func better(vm, than *fleet.VM) bool {
	if vm.Job == 0 || than == nil {
		return vm.Job != 0
	}
	yes := func(b bool) int { return map[bool]int{true: 1}[b] }
	return cmp.Or(
		cmp.Compare(yes(!vm.BusyAt.IsZero()), yes(!than.BusyAt.IsZero())),
		cmp.Compare(yes(!vm.State.Final()), yes(!than.State.Final())),
		vm.PlacedAt.Compare(than.PlacedAt),
		cmp.Compare(vm.ID, than.ID),
	) > 0
}

func jobRow(job *fleet.Job, vm *fleet.VM) api.JobRow {
	row := api.JobRow{Job: *job}
	if vm == nil {
		return row
	}
	row.Pool, row.VM, row.Node, row.Start = vm.Pool, vm.ID, vm.Node, warmth(vm)
	if !vm.BusyAt.IsZero() {
		p := phases(vm, job)
		row.Phases = &p
	}
	return row
}

func (s *Server) explain(ctx context.Context, c call, _ struct{}) (api.Explanation, error) {
	id, err := strconv.ParseInt(c.id, 10, 64)
	if err != nil || id <= 0 {
		return api.Explanation{}, refusal(http.StatusBadRequest, fmt.Sprintf("%q is not a job's id", c.id), "it is GitHub's number, as paddock job list shows it")
	}
	if s.c.Explain == nil {
		return api.Explanation{}, refusal(http.StatusNotImplemented, "nobody decides here", "ask a controller")
	}
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return api.Explanation{}, err
	}
	if view.Jobs[fleet.JobID(id)] == nil {
		return api.Explanation{}, refusal(http.StatusNotFound, fmt.Sprintf("no job %d is known", id), "completed jobs are kept for an hour; paddock job list shows what is there")
	}
	return s.c.Explain(ctx, fleet.JobID(id))
}

// maxEvents bounds one answer; 10,000 are kept in all.
const maxEvents = 1000

func (s *Server) listEvents(ctx context.Context, c call, _ struct{}) ([]api.Event, error) {
	f := store.EventFilter{VM: fleet.VMID(c.query.Get("vm")), Node: fleet.NodeID(c.query.Get("node"))}
	job, err := number(c.query.Get("job"))
	if err != nil {
		return nil, refusal(http.StatusBadRequest, "job is not a number", "it is GitHub's id, as paddock job list shows it")
	}
	limit, err := number(c.query.Get("limit"))
	if err != nil || limit > maxEvents {
		return nil, refusal(http.StatusBadRequest, "limit is not a number up to 1000", "leave it out for 100")
	}
	f.Job, f.Limit = fleet.JobID(job), int(limit)
	events, err := s.c.Store.Events(ctx, f)
	if events == nil {
		events = []api.Event{}
	}
	return events, err
}

// number reads a query's number; none is 0.
func number(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 63)
	return int64(n), err
}
