package fleet

import "time"

// Pool says which jobs get which kind of VM. Pools are read from the configuration in
// file order; the first that fits a job takes it.
type Pool struct {
	Name   PoolName `json:"name"`
	Scopes []Scope  `json:"scopes"` // where its runners are registered: organizations or repositories
	Labels Labels   `json:"labels"` // a job's labels must all be among these
	// MatchHosted takes jobs that do not ask for self-hosted, too.
	MatchHosted bool `json:"match_hosted,omitempty"`
	// PublicRepositories lets jobs of public repositories in: anyone may open a pull request there.
	PublicRepositories bool `json:"public_repositories,omitempty"`

	Image  string            `json:"image"`            // host/repository:tag or @digest
	CPU    int               `json:"cpu"`              // cores; 0: what the image says
	Memory int64             `json:"memory"`           // bytes; 0: what the image says
	Disk   int64             `json:"disk"`             // bytes the clone may grow to; 0: the image's own size
	Growth int64             `json:"growth"`           // bytes of clone growth to keep free per slot; 0: 40 GB
	Mounts []Mount           `json:"mounts,omitempty"` // host directories shown to the guest
	Env    map[string]string `json:"env,omitempty"`    // of the runner process in the guest

	MinIdle          int   `json:"min_idle,omitempty"`           // warm VMs kept ready
	Max              int   `json:"max,omitempty"`                // VMs at once; 0: as many as there are slots
	MaxPerRepository int   `json:"max_per_repository,omitempty"` // 0: no limit
	Priority         int   `json:"priority,omitempty"`           // higher goes first
	Group            int64 `json:"group,omitempty"`              // runner group id; 0: 1, the default group

	Nodes     Selector  `json:"nodes,omitzero"`
	Bootstrap Bootstrap `json:"bootstrap"`
	// Runner is the command that runs the runner in the guest; empty: the staged
	// GitHub runner. It reads the JIT config from its standard input.
	Runner    []string  `json:"runner,omitempty"`
	Deadlines Deadlines `json:"deadlines,omitzero"`
	// SSH is how the ssh bootstrap logs in; nil: as every stock image lets one in.
	SSH *Login `json:"-"`
}

// RunnerGroup is the group id to register in: 1 is every account's default group.
func (p *Pool) RunnerGroup() int64 { return max(p.Group, 1) }

// ScopeOf returns the pool's scope that a repository belongs to; a repository's own
// scope goes before its organization's.
func (p *Pool) ScopeOf(repository string) (Scope, bool) {
	found := Scope("")
	for _, s := range p.Scopes {
		if s.Contains(repository) && (found == "" || s.IsRepository()) {
			found = s
		}
	}
	return found, found != ""
}

// Mount is a host directory that a guest sees.
type Mount struct {
	Name     string `json:"name"` // as the guest sees it
	Path     string `json:"path"` // on the node
	ReadOnly bool   `json:"read_only,omitempty"`
}

// Bootstrap is how a runner gets into the guest.
type Bootstrap string

// The bootstraps.
const (
	BootstrapAgent Bootstrap = "agent" // Paddock's guest agent answers on the machine's stream
	BootstrapSSH   Bootstrap = "ssh"   // a stock image with password SSH
	BootstrapSelf  Bootstrap = "self"  // the image starts its runner by itself
)

// Login is an account in a guest. It is kept out of records and logs.
type Login struct {
	User     string
	Password string // "": none
	Key      string // private key in PEM; "": none
}

// String hides the secrets.
func (l Login) String() string { return "login of " + l.User }

// GoString hides the secrets from %#v, too.
func (l Login) GoString() string { return l.String() }

// StockLogin is what public macOS images let in, by their documentation.
var StockLogin = Login{User: "admin", Password: "admin"}

// Archive is GitHub's runner application for one kind of guest.
type Archive struct {
	OS     string `json:"os"`     // darwin or linux
	Arch   string `json:"arch"`   // arm64 or amd64
	Name   string `json:"name"`   // file name, which holds the version
	URL    string `json:"url"`    // https
	SHA256 string `json:"sha256"` // hex, by GitHub's word
}

// Deadlines bound the phases of a VM's life; a zero field means the default.
type Deadlines struct {
	Boot       time.Duration `json:"boot,omitempty"`       // placed to warm; default 10 min
	Warm       time.Duration `json:"warm,omitempty"`       // warm and unclaimed; default 30 min
	Registered time.Duration `json:"registered,omitempty"` // registered without a job; default 5 min
	Life       time.Duration `json:"life,omitempty"`       // in all, even when busy; default 6 h
}

// WithDefaults fills the zero fields.
func (d Deadlines) WithDefaults() Deadlines {
	d.Boot = or(d.Boot, 10*time.Minute)
	d.Warm = or(d.Warm, 30*time.Minute)
	d.Registered = or(d.Registered, 5*time.Minute)
	d.Life = or(d.Life, 6*time.Hour)
	return d
}

func or(d, fallback time.Duration) time.Duration {
	if d == 0 {
		return fallback
	}
	return d
}

// Selector picks nodes: by name, or by tags that must all be equal; empty picks all.
type Selector struct {
	Names []NodeID          `json:"names,omitempty"`
	Tags  map[string]string `json:"tags,omitempty"`
}

// Matches reports whether the selector picks n.
func (s Selector) Matches(n *Node) bool {
	named := len(s.Names) == 0
	for _, name := range s.Names {
		named = named || name == n.ID
	}
	for key, value := range s.Tags {
		if n.Tags[key] != value {
			return false
		}
	}
	return named
}

// Policy keeps images on nodes between jobs. Minimum and maximum count replicas.
type Policy struct {
	Name     string   `json:"name"`
	Image    string   `json:"image"`
	Nodes    Selector `json:"nodes,omitzero"`
	Min      int      `json:"min,omitempty"`
	Max      int      `json:"max,omitempty"` // 0: no limit
	Pin      bool     `json:"pin,omitempty"`
	Priority int      `json:"priority,omitempty"`
}
