package server

import (
	"cmp"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/store"
)

// Limits on what a node may say, far above what one does.
const (
	maxImages  = 500 // 90 GB each on 45 TB; an honest one has ten
	maxSlots   = 1000
	maxSession = 64   // bytes
	maxReason  = 2000 // bytes; the rest is cut off
	maxWord    = 256  // bytes of a version, an architecture, a tag, a label
	maxText    = 1024 // bytes of an image's reference and of its error
	maxWords   = 100  // tags of a node; labels of a runner
	// maxVMs is far more than a node with few slots has, those included whose end was not
	// acknowledged yet; one with many slots may have vmsPerSlot for each.
	maxVMs     = 100
	vmsPerSlot = 4
)

// forgiveness is how long after its boot deadline a VM to be destroyed that its node
// never began may still be on its way; then it is over.
const forgiveness = 2 * time.Minute

// vmIDPattern is what fleet.NewVMID draws.
var vmIDPattern = regexp.MustCompile(`^[a-z0-9]{8}$`)

// checkSync refuses what no agent of ours sends: it comes from outside.
func checkSync(r *api.SyncRequest) error {
	if r.Protocol != api.Protocol {
		return refusal(http.StatusUpgradeRequired, fmt.Sprintf("this controller speaks version %d of sync, not %d", api.Protocol, r.Protocol),
			"run the same version of paddock on node and controller")
	}
	bad := func(what string) error {
		return refusal(http.StatusBadRequest, "a sync with "+what, "this is not what a paddock node sends; compare the versions")
	}
	n := &r.Node
	switch {
	case r.Session == "" || len(r.Session) > maxSession || strings.ContainsFunc(r.Session, func(c rune) bool { return c <= ' ' || c > '~' }):
		return bad("no session, or one that is not a short word")
	case r.Sequence < 1:
		return bad("a sequence below 1")
	case n.Slots < 0 || n.Slots > maxSlots || n.CPU < 0 || n.Memory < 0 || n.DiskFree < 0 || n.PullRate < 0:
		return bad("impossible sizes")
	case len(r.VMs) > vmLimit(n.Slots) || len(n.Images) > maxImages:
		return bad("too many VMs or images")
	case len(n.Tags) > maxWords || long(maxWord, n.Arch, n.OS, n.Driver, n.Version):
		return bad("too many tags, or an overlong version or platform")
	}
	if what := badPlace(n); what != "" {
		return bad(what)
	}
	for key, value := range n.Tags {
		if long(maxWord, key, value) {
			return bad("an overlong tag")
		}
	}
	for i := range n.Images {
		image := &n.Images[i]
		if err := fleet.CheckDigest(image.Digest); err != nil {
			return bad(cut(err.Error()))
		}
		if long(maxText, image.Ref) || long(maxWord, string(image.State), image.Class) {
			return bad("an overlong image reference or state")
		}
		if s := image.Start; s.Cold < 0 || s.Saved < 0 || s.States < 0 {
			return bad("impossible starts of an image")
		}
		image.Error = guest.Plain(image.Error, maxText)
	}
	seen := map[fleet.VMID]bool{}
	for _, vm := range r.VMs {
		if !vmIDPattern.MatchString(string(vm.ID)) || seen[vm.ID] {
			return bad(cut(fmt.Sprintf("a VM named %q, or named twice", vm.ID)))
		}
		seen[vm.ID] = true
		if k := vm.Runner; k != nil && (len(k.Labels) > maxWords || long(maxWord, k.Labels...) || long(maxWord, k.Name, string(k.Scope))) {
			return bad("a runner with too many or overlong words")
		}
	}
	return nil
}

// certificatePattern is a hex SHA-256.
var certificatePattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// badPlace says what is wrong with a node's site or with its port for other nodes, "" if
// nothing is. Where the port is, nobody but the nodes of the site can know.
func badPlace(n *fleet.Node) string {
	if n.Site != "" && fleet.CheckName("site", n.Site) != nil {
		return cut(fleet.CheckName("site", n.Site).Error())
	}
	switch {
	case n.Peer == (fleet.NodePeer{}):
		return ""
	case n.Peer.Address == "" && certificatePattern.MatchString(n.Peer.Certificate):
		return "" // it has no port, and shows the certificate where it fetches
	}
	host, port, err := net.SplitHostPort(n.Peer.Address)
	if number, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || number == 0 || host == "" || long(maxWord, host) ||
		strings.ContainsFunc(host, func(c rune) bool { return c <= ' ' || c > '~' || c == '/' || c == '@' }) {
		return cut(fmt.Sprintf("the address %q for other nodes; want host:port", n.Peer.Address))
	}
	if !certificatePattern.MatchString(n.Peer.Certificate) {
		return "an address for other nodes and no hex SHA-256 of its certificate"
	}
	return ""
}

// vmLimit is how many VMs a node may tell of.
func vmLimit(slots int) int { return max(maxVMs, vmsPerSlot*slots) }

// long reports whether one of the words is.
func long(most int, words ...string) bool {
	return slices.ContainsFunc(words, func(w string) bool { return len(w) > most })
}

// report turns a node's word into one transaction on a view.
type report struct {
	view  *store.View
	node  fleet.NodeID
	fleet string
	now   time.Time
	boot  func(fleet.PoolName) time.Duration // a pool's boot deadline
	ours  func(fleet.Scope) bool             // some pool registers runners there

	room  int // records that may be made by this node's word
	told  int // VMs written for nothing but what is shown of them
	txn   store.Txn
	moves []move
}

// move is one step that a VM took by this report, for metrics.
type move struct {
	vm fleet.VM
	on runner.Event
}

// apply fills the transaction; cordoned is for a node that has no record. It fails with
// what the node is told.
func (r *report) apply(q *api.SyncRequest, cordoned bool) error {
	r.txn = store.Txn{
		Report:      &store.Report{Node: r.node, Session: q.Session, Sequence: q.Sequence},
		Incarnation: r.view.Incarnation,
	}
	r.room = vmLimit(q.Node.Slots)
	for _, vm := range r.view.VMsOn(r.node) {
		if !vm.State.Final() {
			r.room--
		}
	}
	reported := make(map[fleet.VMID]bool, len(q.VMs))
	for i := range q.VMs {
		reported[q.VMs[i].ID] = true
		if err := r.vm(&q.VMs[i]); err != nil {
			return err
		}
	}
	for _, vm := range r.view.VMsOn(r.node) {
		if !reported[vm.ID] {
			r.missing(vm)
		}
	}
	changed := r.self(q, cordoned)
	r.txn.Quiet = !changed && len(r.txn.VMs) == r.told && len(r.txn.Events) == 0
	return nil
}

// self writes the node's own record; it reports whether anything but a heartbeat
// changed.
func (r *report) self(q *api.SyncRequest, cordoned bool) bool {
	n := q.Node
	n.ID, n.Session, n.Sequence = r.node, q.Session, q.Sequence
	n.Cordoned, n.SeenAt, n.JoinedAt, n.Rev = cordoned, r.now, r.now, 0
	was := r.view.Nodes[r.node]
	if was != nil {
		// The copy of the ledger that the caller has may be older than the record.
		n.JoinedAt, n.Rev, n.Cordoned = was.JoinedAt, was.Rev, was.Cordoned
	}
	r.txn.Nodes = []fleet.Node{n}
	switch {
	case was == nil:
		r.event("node.appeared", nil, fmt.Sprintf("%s, %s/%s, %d slots, paddock %s", n.ID, n.OS, n.Arch, n.Slots, n.Version))
	case was.Session != n.Session:
		r.event("node.restarted", nil, fmt.Sprintf("the agent on %s began a new session (paddock %s)", n.ID, n.Version))
	case r.now.Sub(was.SeenAt) >= unreachableAfter:
		r.event("node.returned", nil, fmt.Sprintf("%s was silent for %s", n.ID, r.now.Sub(was.SeenAt).Round(time.Second)))
	}
	return was == nil || !reflect.DeepEqual(steady(*was), steady(n))
}

// steady is a node without what moves all the time and makes nobody decide anew.
func steady(n fleet.Node) fleet.Node {
	n.Sequence, n.SeenAt, n.DiskFree, n.PullRate, n.Rev = 0, time.Time{}, 0, 0, 0
	images := slices.Clone(n.Images)
	for i := range images {
		images[i].Done, images[i].DiskBytes, images[i].UsedAt, images[i].ReadyAt = 0, 0, time.Time{}, time.Time{}
		images[i].RetryAt = images[i].RetryAt.UTC()
		images[i].Start = fleet.ImageStart{} // weighed when something else is decided
	}
	n.Images = images
	if len(n.Images) == 0 {
		n.Images = nil
	}
	if len(n.Tags) == 0 {
		n.Tags = nil
	}
	return n
}

// vm takes the node's word on one VM.
func (r *report) vm(v *api.VMReport) error {
	record := r.view.VMs[v.ID]
	if record != nil && record.Node != r.node {
		return refusal(http.StatusForbidden, fmt.Sprintf("VM %s is not on node %s: a node speaks only for itself", v.ID, r.node),
			"every node needs a name and a data directory of its own")
	}
	if err := r.checkRunner(v); err != nil {
		return err
	}
	if record == nil {
		return r.unknown(v)
	}
	if record.State.Final() {
		return nil // the reply has it destroyed if it still lives
	}
	vm, changed := *record, false
	if v.Runner != nil {
		var err error
		if changed, err = r.acknowledge(&vm, v.Runner); err != nil {
			return err
		}
	}
	if vm.Retire == fleet.RetireLose && v.State != fleet.VMDone {
		vm.Retire, vm.Reason, changed = fleet.RetireNone, "", true
		r.event("vm.returned", &vm, fmt.Sprintf("VM %s is there after all", vm.ID))
	}
	return r.advance(vm, v, changed)
}

// checkRunner refuses a runner's name that is not this VM's.
func (r *report) checkRunner(v *api.VMReport) error {
	if v.Runner == nil {
		return nil
	}
	if id, n, ours := fleet.ParseRunnerName(r.fleet, v.Runner.Name); !ours || id != v.ID || n != v.Runner.Attempt {
		return refusal(http.StatusForbidden, fmt.Sprintf("runner %q is not VM %s's: a node speaks only for itself", v.Runner.Name, v.ID),
			"node and controller must belong to the same fleet")
	}
	return nil
}

// unknown makes a record again after the store was emptied: the VM runs, and only what
// is present acts. One that is done needs no record.
//
// A node's word for which job it was is not taken: it would keep that job from
// everybody else. By pool, scope and labels the VM counts for one queued job anyway, so
// none is served twice, until GitHub names the runner of each.
func (r *report) unknown(v *api.VMReport) error {
	if v.State == fleet.VMDone {
		return nil
	}
	if r.room--; r.room < 0 {
		return refusal(http.StatusBadRequest, fmt.Sprintf("VM %s is one too many: the store knows of more VMs on this node than it can run", v.ID),
			"those of them that the node has no more are given up within minutes")
	}
	if err := cmp.Or(fleet.CheckDigest(v.Order.Image), fleet.CheckName("pool", string(v.Order.Pool))); err != nil {
		return refusal(http.StatusBadRequest, fmt.Sprintf("VM %s was not ordered like this: %s", v.ID, cut(err.Error())), "this is not what a paddock node sends; compare the versions")
	}
	vm := fleet.VM{
		ID: v.ID, Node: r.node, Pool: v.Order.Pool, Image: v.Order.Image,
		State: fleet.VMPlaced, PlacedAt: v.Order.PlacedAt,
	}
	if vm.PlacedAt.IsZero() || vm.PlacedAt.After(r.now) {
		vm.PlacedAt = r.now
	}
	if v.Runner != nil {
		if _, err := r.acknowledge(&vm, v.Runner); err != nil {
			return err
		}
	}
	r.event("vm.recovered", &vm, fmt.Sprintf("VM %s was not in the store; its node has it", vm.ID))
	return r.advance(vm, v, true)
}

// acknowledge takes down that the node has the runner's JIT config: from now on it is
// in nobody's hands but the guest's. A claim that the store does not have (it was
// emptied, or restored from before) is learned from the node, but never a runner's
// number: the leader deletes at GitHub what a claim names, and any number would do. It
// finds the runner by its name, which checkRunner has held to this VM and fleet.
func (r *report) acknowledge(vm *fleet.VM, k *api.RunnerReport) (changed bool, err error) {
	var claim fleet.Claim
	switch {
	case k.Attempt > vm.Attempt:
		if !r.ours(k.Scope) {
			return false, refusal(http.StatusForbidden, fmt.Sprintf("runner %q is at %q, where no pool has runners", k.Name, cut(string(k.Scope))),
				"if the pool was taken out of the configuration, this ends with the VM; else compare the node's fleet")
		}
		claim = fleet.Claim{Scope: k.Scope, Group: k.Group, Labels: fleet.NewLabels(k.Labels...), Runner: k.Name, At: r.now}
		vm.Attempt = k.Attempt
	case vm.Claim == nil: // the leader has had GitHub delete it
		return false, nil
	case vm.Claim.Runner != k.Name || (vm.Claim.Started && vm.Claim.Sealed == ""):
		return false, nil
	default:
		claim = *vm.Claim
	}
	claim.Started, claim.Sealed = true, ""
	vm.Claim = &claim
	return true, nil
}

// advance walks the VM to where the node says it is.
func (r *report) advance(vm fleet.VM, v *api.VMReport, changed bool) error {
	next, moves, err := runner.Advance(vm, runner.Report{
		State: v.State, Now: r.now,
		BootingAt: v.BootingAt, WarmAt: v.WarmAt, RegisteredAt: v.RegisteredAt, BusyAt: v.BusyAt, DoneAt: v.DoneAt,
	})
	if err != nil {
		return refusal(http.StatusBadRequest, cut(err.Error()), "this is not what a paddock node sends; compare the versions")
	}
	if next.State == fleet.VMDone && !vm.State.Final() {
		next.Reason, next.Failed = cut(v.Reason), v.Failed
	}
	for _, m := range moves {
		r.moves = append(r.moves, move{next, m.On})
		text := fmt.Sprintf("VM %s: %s", vm.ID, m.On)
		if m.On == runner.Ended && next.Reason != "" {
			text += ": " + next.Reason
		}
		r.event("vm."+string(m.To), &next, text)
	}
	loud := changed || len(moves) > 0
	if told := describe(&next, v); loud || told {
		r.txn.VMs = append(r.txn.VMs, next)
		if !loud {
			r.told++
		}
	}
	return nil
}

// describe takes down what is shown of a VM and decides nothing: how its machine started
// and the guest's address, as far as they are what they should be. It reports whether
// there was news.
func describe(vm *fleet.VM, v *api.VMReport) bool {
	was := *vm
	if vm.Tier = v.Tier; vm.Tier != fleet.TierSaved && vm.Tier != fleet.TierCold {
		vm.Tier = ""
	}
	vm.Address = ""
	if addr, err := netip.ParseAddr(v.Address); err == nil && addr.Zone() == "" {
		vm.Address = addr.String()
	}
	return vm.Tier != was.Tier || vm.Address != was.Address
}

// cut bounds and tames a text from outside: it may repeat a guest's words, is stored, and
// ends on people's terminals.
func cut(text string) string { return guest.Plain(text, maxReason) }

// missing looks at a record of this node that its report does not name. The report is
// the whole journal, but absence does not act: the leader is asked to have GitHub say
// first whether the runner is busy. A VM in placed is merely ordered again.
func (r *report) missing(record *fleet.VM) {
	vm := *record
	switch {
	case vm.State.Final() || vm.Retire == fleet.RetireLose:
		return
	case vm.State != fleet.VMPlaced:
		vm.Retire, vm.Reason = fleet.RetireLose, "missing in the node's journal"
		r.event("vm.missing", &vm, fmt.Sprintf("VM %s is not in the journal of %s any more", vm.ID, r.node))
	case vm.Destroy && r.now.Sub(vm.PlacedAt) > r.boot(vm.Pool)+forgiveness:
		ended, ok := runner.Apply(vm, runner.Ended, r.now)
		if !ok {
			return
		}
		vm = ended
		r.moves = append(r.moves, move{vm, runner.Ended})
		r.event("vm.done", &vm, fmt.Sprintf("VM %s was never begun", vm.ID))
	default:
		return
	}
	r.txn.VMs = append(r.txn.VMs, vm)
}

// event notes what happened, by this node's word.
func (r *report) event(kind string, vm *fleet.VM, text string) {
	e := fleet.Event{At: r.now, Kind: kind, Node: r.node, Actor: "node:" + string(r.node), Text: cut(text)}
	if vm != nil {
		e.VM, e.Job, e.Image = vm.ID, vm.Job, vm.Image
	}
	r.txn.Events = append(r.txn.Events, e)
}
