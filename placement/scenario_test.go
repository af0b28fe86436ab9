package placement

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/paddock-ci/paddock/fleet"
)

var update = flag.Bool("update", false, "write the plans of the scenarios into their files")

// TestScenarios plays testdata/*.txtar. Each file opens with prose that says what it
// shows; "cast" is the snapshot in the small language of parseCast, "plan" the plan
// expected, "explain" the tables of the jobs that the cast asks about.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) < 15 {
		t.Fatalf("found %d scenarios (%v), want at least 15", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { playScenario(t, file) })
	}
}

func playScenario(t *testing.T, file string) {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(bytes.Fields(archive.Comment)) < 10 || len(archive.Files) == 0 || archive.Files[0].Name != "cast" {
		t.Fatal("want prose that says what the scenario shows, then -- cast --")
	}
	c, err := parseCast(string(archive.Files[0].Data))
	if err != nil {
		t.Fatal(err)
	}
	got := []txtar.File{archive.Files[0], {Name: "plan", Data: []byte(c.showPlan(Make(c.Snapshot)))}}
	var tables strings.Builder
	for _, job := range c.explain {
		x, ok := Explain(c.Snapshot, job)
		if !ok {
			t.Fatalf("job %d is not explained", job)
		}
		tables.WriteString(showExplanation(x))
	}
	if len(c.explain) > 0 {
		got = append(got, txtar.File{Name: "explain", Data: []byte(tables.String())})
	}
	if c.evictions != nil {
		got = append(got, txtar.File{Name: "evictions", Data: []byte(c.showEvictions())})
	}
	played := txtar.Format(&txtar.Archive{Comment: archive.Comment, Files: got})
	if *update {
		if err := os.WriteFile(file, played, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if want := txtar.Format(archive); !bytes.Equal(played, want) {
		t.Errorf("got:\n%s\nwant (-update writes it):\n%s", played, want)
	}
}

// cast is a parsed scenario.
type cast struct {
	Snapshot
	digests map[fleet.Digest]string // image names back
	refs    map[string]string       // of unused images
	explain []fleet.JobID
	// evictions asks for the table, with so many bytes to be free; nil: it is not asked for.
	evictions *int64
}

// words after a line's noun and name: bare ones are flags, others key=value.
type options map[string]string

// parseCast reads one thing per line; # begins a comment.
//
//	image NAME pull=20GB disk=50GB
//	pool NAME image=I [scopes=acme,b/c labels=a,b min-idle= max= max-per-repo= priority= growth=10GB nodes=n1,tag:value public hosted]
//	node NAME [slots=2 free=400GB rate=100MB has=I,J leased=I pulling=I:5GB queued=I:0GB failed=I hold=I prewarm=I
//	          paused=I:5GB verifying=I marked=I recalled=I pinned=I shared=I:3GB boots=I:20s states=I:2 resumes=I:900ms came=I:3m tags=k:v failures= failing=P cordoned unreachable]
//	vm NAME on=NODE pool=P [state=busy idle job=7 ends=4m]
//	job ID [repo=acme/app name=build age=1m labels=a,b public]
//	duration REPO name=build 5m      running REPO 3      wait-cap 20m      explain ID
//	unused NAME [of=I]               demand I 3.5        pin I             evictions 100GB
func parseCast(text string) (*cast, error) {
	now := time.Date(2026, 6, 1, 9, 0, 0, 0, time.UTC)
	c := &cast{digests: map[fleet.Digest]string{}, refs: map[string]string{}}
	c.Now, c.Images, c.Running = now, map[string]fleet.Image{}, map[string]int{}
	durations := map[[2]string]time.Duration{}
	c.Durations = func(repository, name string) (time.Duration, bool) {
		d, ok := durations[[2]string{repository, name}]
		return d, ok
	}
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if len(words) < 2 {
			return nil, fmt.Errorf("line %d: %q wants a name", i+1, line)
		}
		o := options{}
		for _, w := range words[2:] {
			key, value, _ := strings.Cut(w, "=")
			o[key] = value
		}
		switch name := words[1]; words[0] {
		case "image":
			d := fleet.Digest(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(name))))
			c.digests[d] = name
			c.Images[name] = fleet.Image{Ref: name, Digest: d, Bytes: gigabytes(o["pull"]), DiskBytes: gigabytes(o["disk"])}
		case "unused": // an image on nodes that no pool knows
			c.digests[fleet.Digest("sha256:"+name)] = name
			c.refs[name] = o.or("of", name)
		case "demand":
			lambda, err := strconv.ParseFloat(words[2], 64)
			if err != nil {
				return nil, err
			}
			if c.Demand == nil {
				c.Demand = map[fleet.Digest]float64{}
			}
			c.Demand[c.digest(name)] = lambda
		case "pin":
			c.Pinned = map[fleet.Digest]string{c.digest(name): "by hand"}
		case "evictions":
			free := gigabytes(name)
			c.evictions = &free
		case "pool":
			c.Pools = append(c.Pools, o.pool(name))
		case "node":
			c.Nodes = append(c.Nodes, c.node(name, o))
		case "vm":
			if err := c.addVM(name, o); err != nil {
				return nil, err
			}
		case "job":
			c.Jobs = append(c.Jobs, o.job(name, now))
		case "duration":
			durations[[2]string{name, o["name"]}] = o.duration(words[len(words)-1])
		case "running":
			c.Running[name] = number(words[2])
		case "wait-cap":
			c.WaitCap = o.duration(name)
		case "explain":
			c.explain = append(c.explain, fleet.JobID(number(name)))
		default:
			return nil, fmt.Errorf("line %d: unknown noun %q", i+1, words[0])
		}
	}
	return c, nil
}

func (o options) duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		panic(err)
	}
	return d
}

func number(s string) int {
	if s == "" {
		return 0
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}

func gigabytes(s string) int64 {
	if s == "" {
		return 0
	}
	f, err := strconv.ParseFloat(strings.TrimSuffix(s, "GB"), 64)
	if err != nil {
		panic(err)
	}
	return int64(f * 1e9)
}

// list splits a comma-separated option; empty is no item.
func (o options) list(key string) []string {
	return strings.FieldsFunc(o[key], func(r rune) bool { return r == ',' })
}

func (o options) has(key string) bool { _, ok := o[key]; return ok }

func (o options) or(key, fallback string) string {
	if o.has(key) {
		return o[key]
	}
	return fallback
}

func (o options) pool(name string) fleet.Pool {
	p := fleet.Pool{Name: fleet.PoolName(name), Image: o["image"], Labels: fleet.NewLabels(strings.Split(o.or("labels", "self-hosted,"+name), ",")...),
		MinIdle: number(o["min-idle"]), Max: number(o["max"]), MaxPerRepository: number(o["max-per-repo"]), Priority: number(o["priority"]),
		Growth: gigabytes(o.or("growth", "20GB")), PublicRepositories: o.has("public"), MatchHosted: o.has("hosted")}
	for _, s := range strings.Split(o.or("scopes", "acme"), ",") {
		p.Scopes = append(p.Scopes, fleet.Scope(s))
	}
	for _, s := range o.list("nodes") {
		if key, value, tag := strings.Cut(s, ":"); tag {
			p.Nodes.Tags = map[string]string{key: value}
		} else {
			p.Nodes.Names = append(p.Nodes.Names, fleet.NodeID(s))
		}
	}
	return p
}

func (c *cast) node(name string, o options) Node {
	n := Node{Reachable: !o.has("unreachable"), Failures: number(o["failures"])}
	n.ID, n.Cordoned = fleet.NodeID(name), o.has("cordoned")
	n.Node.Slots, n.DiskFree = number(o.or("slots", "2")), gigabytes(o.or("free", "400GB"))
	n.PullRate = int64(number(strings.TrimSuffix(o.or("rate", "100MB"), "MB"))) * 1e6
	n.Missing = map[fleet.Digest]int64{}
	for _, s := range o.list("failing") {
		n.Failing = map[fleet.PoolName]bool{fleet.PoolName(s): true}
	}
	for _, s := range o.list("tags") {
		key, value, _ := strings.Cut(s, ":")
		n.Tags = map[string]string{key: value}
	}
	for key, state := range map[string]fleet.ImageState{"has": fleet.ImageReady, "leased": fleet.ImageReady, "pulling": fleet.ImageCaching,
		"queued": fleet.ImageQueued, "failed": fleet.ImageFailed, "evicting": fleet.ImageEvicting,
		"paused": fleet.ImagePaused, "verifying": fleet.ImageVerifying} {
		for _, s := range o.list(key) {
			image, done, _ := strings.Cut(s, ":")
			n.Images = append(n.Images, c.nodeImage(image, gigabytes(done), state, key))
		}
	}
	for _, key := range []string{"boots", "states", "resumes", "came"} {
		for _, s := range o.list(key) {
			image, figure, _ := strings.Cut(s, ":")
			at := slices.IndexFunc(n.Images, func(on fleet.NodeImage) bool { return on.Ref == image })
			switch start := &n.Images[at].Start; key {
			case "boots":
				start.Cold = o.duration(figure)
			case "states":
				start.States = number(figure)
			case "came":
				n.Images[at].ReadyAt = c.Now.Add(-o.duration(figure))
			case "resumes":
				start.Saved = o.duration(figure)
			}
		}
	}
	slices.SortFunc(n.Images, func(a, b fleet.NodeImage) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	for _, key := range []string{"hold", "prewarm"} {
		for _, s := range o.list(key) {
			n.Hold = append(n.Hold, fleet.Hold{Digest: c.Images[s].Digest, Demand: key == "hold"})
		}
	}
	for _, s := range o.list("marked") {
		n.Evict = append(n.Evict, c.digest(s))
	}
	for _, s := range o.list("recalled") {
		n.Recalled = append(n.Recalled, c.digest(s))
	}
	for _, s := range o.list("pinned") {
		n.Pinned = map[fleet.Digest]string{c.digest(s): ""}
	}
	for _, s := range o.list("shared") {
		image, left, _ := strings.Cut(s, ":")
		n.Missing[c.Images[image].Digest] = gigabytes(left)
	}
	return n
}

// digest is an image's, also of one that no pool uses.
func (c *cast) digest(name string) fleet.Digest {
	if i, known := c.Images[name]; known {
		return i.Digest
	}
	return fleet.Digest("sha256:" + name)
}

// nodeImage is an image on a node; "has" ones were last used done GB hours ago.
func (c *cast) nodeImage(name string, done int64, state fleet.ImageState, key string) fleet.NodeImage {
	i, known := c.Images[name]
	if !known {
		i = fleet.Image{Digest: fleet.Digest("sha256:" + name), Bytes: 20e9, DiskBytes: 50e9}
	}
	on := fleet.NodeImage{Digest: i.Digest, Ref: name, State: state, DiskBytes: i.DiskBytes}
	if ref, unused := c.refs[name]; unused {
		on.Ref = ref
	}
	switch state {
	case fleet.ImageCaching, fleet.ImageQueued, fleet.ImagePaused:
		on.Done, on.Total = done, i.Bytes
		on.DiskBytes = int64(float64(i.DiskBytes) * float64(done) / float64(max(1, i.Bytes)))
	case fleet.ImageFailed:
		on.RetryAt, on.DiskBytes = c.Now.Add(time.Minute), 0
	case fleet.ImageReady:
		on.UsedAt = c.Now.Add(-time.Duration(done/1e9) * time.Hour)
	case fleet.ImageVerifying, fleet.ImageEvicting:
	}
	if key == "leased" {
		on.Leases = 1
	}
	return on
}

func (c *cast) addVM(name string, o options) error {
	s := Slot{VM: fleet.VMID(name), Pool: fleet.PoolName(o["pool"]), State: fleet.VMState(o.or("state", "busy")), Job: fleet.JobID(number(o["job"]))}
	if o.has("idle") {
		s.Idle, s.State = true, fleet.VMWarm
	}
	if o.has("ends") {
		s.Ends = c.Now.Add(o.duration(o["ends"]))
	}
	for i := range c.Pools {
		if c.Pools[i].Name == s.Pool {
			s.Image = c.Images[c.Pools[i].Image].Digest
		}
	}
	for i := range c.Nodes {
		if string(c.Nodes[i].ID) == o["on"] {
			c.Nodes[i].Slots = append(c.Nodes[i].Slots, s)
			return nil
		}
	}
	return fmt.Errorf("vm %s: no node %q", name, o["on"])
}

func (o options) job(id string, now time.Time) fleet.Job {
	return fleet.Job{ID: fleet.JobID(number(id)), Repository: o.or("repo", "acme/app"), Name: o.or("name", "build"), Public: o.has("public"),
		Labels: fleet.NewLabels(strings.Split(o.or("labels", "self-hosted"), ",")...), Status: fleet.JobQueued,
		CreatedAt: now.Add(-o.duration(o.or("age", "1m")))}
}

// showPlan is the plan as a person reads it.
func (c *cast) showPlan(p Plan) string {
	var b strings.Builder
	for _, x := range p.Bind {
		what, how := fmt.Sprintf("job %d", x.Job), "warm"
		if x.Job == 0 {
			what = "idle VM"
		}
		if x.Cold {
			how = "cold"
		}
		fmt.Fprintf(&b, "bind %s of pool %s on %s with %s, %s, ready in %s\n", what, x.Pool, x.Node, c.digests[x.Image], how, x.Ready.Sub(c.Now))
	}
	for _, x := range p.Hold {
		kind := "pre-warm"
		if x.Demand {
			kind = "demand"
		}
		fmt.Fprintf(&b, "hold %s on %s, %s, priority %d: %s\n", c.digests[x.Digest], x.Node, kind, x.Priority, x.Why)
	}
	for _, x := range p.Evict {
		fmt.Fprintf(&b, "evict %s from %s: %s\n", c.digests[x.Digest], x.Node, x.Why)
	}
	for _, x := range p.Evacuate {
		fmt.Fprintf(&b, "evacuate %s\n", x)
	}
	for _, d := range p.Decisions {
		fmt.Fprintf(&b, "\n%s: jobs %v, %d bound\n", d.Class, d.Jobs, d.Bound)
		if d.Choice != nil {
			fmt.Fprintf(&b, "  choice    %s\n", showOption(d.Choice))
		}
		if d.RunnerUp != nil {
			fmt.Fprintf(&b, "  runner-up %s\n", showOption(d.RunnerUp))
		}
		if len(d.Refusals) > 0 {
			fmt.Fprintf(&b, "  refused   %s\n", listRefusals(d.Refusals))
		}
		if d.Wait != "" {
			fmt.Fprintf(&b, "  waits     %s\n", d.Wait)
		}
	}
	return b.String()
}

func showOption(o *Option) string {
	s := fmt.Sprintf("%s slot %s image %s ready %s cost %s", o.Node, o.Slot, o.Image, o.Ready, o.Cost)
	if o.NewPull {
		s += fmt.Sprintf(", pulls %s", size(o.Pull))
	}
	return s
}

// showEvictions is the dry run as a person reads it.
func (c *cast) showEvictions() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, n := range Evictions(c.Snapshot, "", *c.evictions) {
		fmt.Fprintf(w, "%s: %s free, %s kept for clones, %s wanted, %s free then\n", n.Node, size(n.DiskFree), size(n.Growth), size(n.Want), size(n.Free))
		for _, i := range n.Images {
			fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", c.digests[i.Digest], size(i.DiskBytes), i.Fate, i.Turn, i.Stay, i.Why)
		}
	}
	_ = w.Flush()
	return b.String()
}

// showExplanation is the whole table of one job.
func showExplanation(x Explanation) string {
	var b strings.Builder
	fmt.Fprintf(&b, "job %d, %s old, %d ahead of it", x.Job, x.Age, x.Ahead)
	if x.Pool == "" {
		fmt.Fprintf(&b, "\nrefused: %s\n", x.Refusal)
		return b.String()
	}
	fmt.Fprintf(&b, ", pool %s in scope %s, runs %s\n", x.Pool, x.Scope, x.Duration)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tSLOT\tIMAGE\tBOOT\tREADY\tCOST\tNOTE")
	for _, o := range x.Options {
		if o.Refusal != "" {
			fmt.Fprintf(w, "%s\t-\t-\t-\t-\t-\t%s\n", o.Node, o.Refusal.Words())
			continue
		}
		var notes []string
		if x.Choice != nil && x.Choice.Node == o.Node {
			notes = append(notes, "chosen")
		}
		if o.Pull > 0 {
			notes = append(notes, size(o.Pull)+" to come")
		}
		if o.SlotUnknown {
			notes = append(notes, "slot's end not known")
		}
		if o.Start != usualStart {
			notes = append(notes, o.Start)
		}
		if o.Evacuate != "" {
			notes = append(notes, "evacuates "+string(o.Evacuate))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", o.Node, o.Slot, o.Image, o.Boot, o.Ready, o.Cost, strings.Join(notes, ", "))
	}
	_ = w.Flush()
	switch {
	case x.Bound:
		b.WriteString("bound\n")
	default:
		fmt.Fprintf(&b, "waits %s\n", x.Wait)
	}
	return b.String()
}
