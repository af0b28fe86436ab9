// Package config is Paddock's one configuration file as a Go value: read strictly, with
// every mistake named by its line and a hint, then overlaid by the environment.
//
// It builds nothing and opens nothing but the file and the secret files it names. The
// commands in cmd/paddock call it, and so does the demo.
package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/parser"

	"github.com/paddock-ci/paddock/fleet"
)

// Config is the file. Every key is optional unless its comment says otherwise; Notes, which
// `paddock config check` prints, tells which of them a command still misses.
type Config struct {
	// Fleet is part of every runner's name at GitHub; two fleets in one account need two
	// names. Default "paddock".
	Fleet string `yaml:"fleet"`
	// Listen is host:port of the controller's HTTPS. Default ":8443".
	Listen string `yaml:"listen"`
	// URL is how nodes, pipelines and GitHub reach the controller. Default: https://, this
	// host's name and the port of Listen.
	URL string `yaml:"url"`
	// Data is the directory for the ledger, the fleet key, the self-made certificate and
	// the embedded store. Default: $XDG_STATE_HOME/paddock, else ~/.local/state/paddock.
	Data string `yaml:"data"`
	// Redis is redis:// or rediss://…; without it the store is embedded in this process.
	Redis string `yaml:"redis"`

	TLS    TLS    `yaml:"tls"`
	GitHub GitHub `yaml:"github"`
	Images Images `yaml:"images"`
	Pools  []Pool `yaml:"pools"`
	Node   Node   `yaml:"node"`
}

// TLS names the certificate; without one, Paddock makes its own and nodes pin its hash.
type TLS struct {
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// GitHub is the App that Paddock acts as.
type GitHub struct {
	AppID          int64  `yaml:"app_id"`
	PrivateKeyFile string `yaml:"private_key_file"`
	// WebhookSecretFiles: any of the secrets is accepted, so that one can be changed
	// without losing a delivery.
	WebhookSecretFiles []string `yaml:"webhook_secret_files"`
	// API is for GitHub Enterprise Server; default https://api.github.com/.
	API string `yaml:"api"`
	// SweepEvery is how often the delivery log is read for webhooks that were lost.
	// Default 20s.
	SweepEvery Duration `yaml:"sweep_every"`
}

// Images says where images may come from.
type Images struct {
	// Registries that may be pulled from; empty: all.
	Registries []string `yaml:"registries"`
	// ResolveEvery is how often a pool's tag is resolved again. Default 5m.
	ResolveEvery Duration `yaml:"resolve_every"`
	// Egress is what all nodes together may move from registries outside, in bytes per
	// second; 0: no limit.
	Egress Size `yaml:"egress"`
}

// Pool is fleet.Pool as people write it.
type Pool struct {
	Name               string            `yaml:"name"`   // required
	Scopes             []string          `yaml:"scopes"` // required: organizations or owner/repository
	Labels             []string          `yaml:"labels"` // required
	MatchHosted        bool              `yaml:"match_hosted"`
	PublicRepositories bool              `yaml:"public_repositories"`
	Image              string            `yaml:"image"` // required
	CPU                int               `yaml:"cpu"`
	Memory             Size              `yaml:"memory"`
	Disk               Size              `yaml:"disk"`
	Growth             Size              `yaml:"growth"`
	Mounts             []Mount           `yaml:"mounts"`
	Env                map[string]string `yaml:"env"`
	MinIdle            int               `yaml:"min_idle"`
	Max                int               `yaml:"max"`
	MaxPerRepository   int               `yaml:"max_per_repository"`
	Priority           int               `yaml:"priority"`
	Group              int64             `yaml:"group"`
	Nodes              []string          `yaml:"nodes"`
	NodeTags           map[string]string `yaml:"node_tags"`
	Bootstrap          string            `yaml:"bootstrap"`
	SSH                SSH               `yaml:"ssh"`
	Runner             []string          `yaml:"runner"`
	Deadlines          Deadlines         `yaml:"deadlines"`

	login *fleet.Login // what SSH's files hold, once they were read
}

// SSH is how the ssh bootstrap logs into a pool's guests. Without it, as public macOS
// images let one in: user admin with password admin.
type SSH struct {
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"`
	KeyFile      string `yaml:"key_file"` // a private key in PEM, without a passphrase
}

// Mount is a directory of the node that the guest sees.
type Mount struct {
	Name     string `yaml:"name"`
	Path     string `yaml:"path"`
	ReadOnly bool   `yaml:"read_only"`
}

// Deadlines bound the phases of a VM's life.
type Deadlines struct {
	Boot       Duration `yaml:"boot"`
	Warm       Duration `yaml:"warm"`
	Registered Duration `yaml:"registered"`
	Life       Duration `yaml:"life"`
}

// Node is this machine, when it runs VMs.
type Node struct {
	// Name is what the node joined under. Default: the host's name, made fit.
	Name string            `yaml:"name"`
	Tags map[string]string `yaml:"tags"`
	// Slots is how many VMs run at once. Default 2, which is Apple's limit for macOS guests.
	Slots int `yaml:"slots"`
	// Driver runs the VMs: vz (Apple's Virtualization.framework), qemu (Linux), or process
	// (child processes without isolation, for trying Paddock out). Default: vz on Apple
	// Silicon, else process.
	Driver string `yaml:"driver"`
	QEMU   QEMU   `yaml:"qemu"`
	// SavedStates has VMs start from states that were saved after an image's first boot on
	// this host. Default: true with driver qemu, else false.
	SavedStates *bool `yaml:"saved_states"`
	// Dir holds images, clones and the journal. Default: node under Data.
	Dir string `yaml:"dir"`
	// Streams is how many requests a pull runs at once. Default 8.
	Streams int `yaml:"streams"`
	// Site is where this node is: nodes of one site fetch images from each other, and each
	// piece once from outside. Default: the site of all nodes that name none.
	Site string `yaml:"site"`
	Peer Peer   `yaml:"peer"`
	// Mirrors are registries nearby, by the registry they mirror: host or host/prefix.
	Mirrors map[string]string `yaml:"mirrors"`
	// Layout is an OCI image layout on a directory that nodes share, such as NFS.
	Layout string `yaml:"layout"`
	// Bandwidth is what pulls may move here in bytes per second, from anywhere;
	// BandwidthBusy the same while a VM runs a job. 0: no limit.
	Bandwidth     Size `yaml:"bandwidth"`
	BandwidthBusy Size `yaml:"bandwidth_busy"`
}

// Peer is the port by which other nodes of the site fetch images from this one.
type Peer struct {
	// Listen is host:port; empty: this node serves nobody, and fetches from those that do.
	Listen string `yaml:"listen"`
	// Address is how other nodes reach it. Default: this host's name and the port of Listen.
	Address string `yaml:"address"`
	// Bandwidth is what it may send in bytes per second; 0: no limit.
	Bandwidth Size `yaml:"bandwidth"`
}

// QEMU is what only the qemu driver asks.
type QEMU struct {
	// Accel is tcg (emulation, works everywhere), kvm, or auto (kvm if it really runs a
	// guest). Default tcg.
	Accel string `yaml:"accel"`
	// Network is user (the guest reaches what this host's user reaches, this host's loopback
	// too), passt (Linux: without the loopback) or none. Default user.
	Network string `yaml:"network"`
}

// States reports whether VMs start from saved states.
func (n *Node) States() bool {
	if n.SavedStates != nil {
		return *n.SavedStates
	}
	return n.Driver == DriverQEMU
}

// The drivers.
const (
	DriverVZ      = "vz"
	DriverQEMU    = "qemu"
	DriverProcess = "process"
)

// NetworkUser is the network of QEMU's that works everywhere.
const NetworkUser = "user"

// defaultDriver is the one that runs machines on this platform without anything else.
func defaultDriver(os, arch string) string {
	if os == "darwin" && arch == "arm64" {
		return DriverVZ
	}
	return DriverProcess
}

// Load reads the file (path "" means: none) and overlays the environment. What it
// returns has its defaults filled and has passed the check.
func Load(path string, environ []string) (*Config, error) {
	c := &Config{}
	var source []byte
	if path != "" {
		var err error
		source, err = os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read the configuration: %w (hint: --config names the file; docs/paddock.example.yaml is one to start from)", err)
		}
	}
	return c, c.load(path, source, environ)
}

func (c *Config) load(path string, source []byte, environ []string) error {
	if len(strings.TrimSpace(string(source))) > 0 {
		if err := decode(source, c); err != nil {
			return explainSyntax(path, err)
		}
	}
	if err := c.overlay(environ); err != nil {
		return err
	}
	c.fillDefaults()
	if problem := c.check(); problem != nil {
		problem.File, problem.Line = path, lineOf(source, problem.Path)
		return problem
	}
	return nil
}

// decode reads one document; of several, the others would be without effect. The YAML
// library panics on some odd files (a tag of one's own before a list, for one), which is
// a mistake in the file to whoever wrote it.
func decode(source []byte, c *Config) (err error) {
	defer func() {
		if recover() != nil {
			err = &Problem{What: "this is YAML that cannot be read", Hint: "write it plainly, without tags (!) and anchors (&); docs/paddock.example.yaml shows every key"}
		}
	}()
	file, err := parser.ParseBytes(source, 0)
	if err != nil {
		return err
	}
	if len(file.Docs) > 1 {
		problem := &Problem{What: "more than one document", Hint: "take out the line ---"}
		if start := file.Docs[1].Start; start != nil {
			problem.Line = start.Position.Line
		}
		return problem
	}
	return yaml.UnmarshalWithOptions(source, c, yaml.Strict())
}

// fillDefaults puts the documented default where a key is missing.
func (c *Config) fillDefaults() {
	def(&c.Fleet, "paddock")
	def(&c.Listen, ":8443")
	if c.Data == "" {
		c.Data = filepath.Join(stateHome(), "paddock")
	}
	def(&c.Node.Driver, defaultDriver(runtime.GOOS, runtime.GOARCH))
	def(&c.Node.QEMU.Accel, "tcg")
	def(&c.Node.QEMU.Network, NetworkUser)
	def(&c.Node.Slots, 2)
	def(&c.Node.Streams, 8)
	def(&c.Node.Dir, filepath.Join(c.Data, "node"))
	if c.Node.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			host = "node"
		}
		c.Node.Name = fitName(host)
	}
	// A port that the system chooses is known when it listens.
	if _, port, err := net.SplitHostPort(c.Node.Peer.Listen); err == nil && port != "0" && c.Node.Peer.Address == "" {
		c.Node.Peer.Address = defaultHost(c.Node.Peer.Listen)
	}
	if c.URL == "" {
		c.URL = "https://" + defaultHost(c.Listen)
	}
	for i := range c.Pools {
		def(&c.Pools[i].Bootstrap, string(fleet.BootstrapAgent))
	}
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// stateHome is where a program keeps what must outlive it (XDG base directories).
func stateHome() string {
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return dir
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return os.TempDir()
	}
	return filepath.Join(home, ".local", "state")
}

// defaultHost is this host's name with the port of listen, or listen's own host.
func defaultHost(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		host = listen // without a port: the listener will say so
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		name, err := os.Hostname()
		if err != nil {
			name = "localhost"
		}
		host = name
	}
	return net.JoinHostPort(host, port)
}

// fitName makes a node name of a host name: its first label, lower case.
func fitName(host string) string {
	host, _, _ = strings.Cut(strings.ToLower(host), ".")
	fit := strings.Trim(strings.Map(func(r rune) rune {
		if (r >= 'a' && r <= 'z') || (r >= '0' && r <= '9') {
			return r
		}
		return '-'
	}, host), "-")
	if fit == "" {
		return "node"
	}
	return strings.TrimRight(fit[:min(len(fit), 63)], "-") // 63: a DNS label's most
}

// ReadSecret reads a secret's file and trims the newline that editors leave. The error
// names the file, never what is in it.
func ReadSecret(path string) ([]byte, error) {
	secret, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the secret: %w", err)
	}
	secret = []byte(strings.TrimRight(string(secret), "\r\n"))
	if len(secret) == 0 {
		return nil, fmt.Errorf("read the secret: %s is empty", path)
	}
	return secret, nil
}

// ErrInvalid is what every mistake in a configuration is.
var ErrInvalid = errors.New("invalid configuration")
