package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"reflect"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
	"github.com/google/go-containerregistry/pkg/name"

	"github.com/paddock-ci/paddock/fleet"
)

// Problem is one mistake: where it is, what is wrong and what to do.
type Problem struct {
	File string // "" when there is no file
	Line int    // 0 when the key is not in the file
	Path string // like $.pools[1].image; "": the file as a whole
	What string
	Hint string
}

func (p *Problem) Error() string {
	where := ""
	if p.File != "" {
		where = p.File + ": "
	}
	if p.Line > 0 {
		where = fmt.Sprintf("%s:%d: ", p.File, p.Line)
	}
	if p.Path != "" {
		where += strings.TrimPrefix(p.Path, "$.") + ": "
	}
	return fmt.Sprintf("%s%s (hint: %s)", where, p.What, p.Hint)
}

// Is makes every problem an ErrInvalid.
func (p *Problem) Is(target error) bool { return target == ErrInvalid }

// check returns the first mistake in file order, or nil.
func (c *Config) check() *Problem {
	if err := fleet.CheckName("fleet", c.Fleet); err != nil {
		return &Problem{Path: "$.fleet", What: err.Error(), Hint: "it becomes part of runner names"}
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return &Problem{Path: "$.listen", What: fmt.Sprintf("%q is not host:port", c.Listen), Hint: `":8443" listens on every address`}
	}
	if u, err := url.Parse(c.URL); err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return &Problem{Path: "$.url", What: fmt.Sprintf("%q is not a URL", c.URL), Hint: "like https://paddock.example.com:8443"}
	}
	if scheme, _, _ := strings.Cut(c.Redis, "://"); c.Redis != "" && !slices.Contains([]string{"redis", "rediss", "unix"}, scheme) {
		return &Problem{Path: "$.redis", What: "not a Redis URL", Hint: "redis://host:6379/0, rediss:// for TLS, or unix:///path; leave it out for the embedded store"}
	}
	if (c.TLS.Cert == "") != (c.TLS.Key == "") {
		return &Problem{Path: "$.tls", What: "cert and key go together", Hint: "give both files, or none for a self-made certificate"}
	}
	if c.GitHub.AppID < 0 {
		return &Problem{Path: "$.github.app_id", What: "must be positive", Hint: "the App's settings page shows it"}
	}
	if err := fleet.CheckName("node", c.Node.Name); err != nil {
		return &Problem{Path: "$.node.name", What: err.Error(), Hint: "leave it out for the host's name"}
	}
	if c.Node.Slots < 1 || c.Node.Slots > 64 {
		return &Problem{Path: "$.node.slots", What: fmt.Sprintf("%d slots", c.Node.Slots), Hint: "1 to 64; a Mac runs at most two macOS guests"}
	}
	if problem := c.Node.checkDriver(); problem != nil {
		return problem
	}
	if problem := c.Node.checkSources(); problem != nil {
		return problem
	}
	for i, r := range c.Images.Registries {
		if _, err := prefixOf(r); err != nil {
			return &Problem{Path: fmt.Sprintf("$.images.registries[%d]", i), What: fmt.Sprintf("%q is no registry", r), Hint: "like ghcr.io, or ghcr.io/acme for what lies below"}
		}
	}
	seen := map[string]int{}
	for i := range c.Pools {
		if problem := c.Pools[i].check(fmt.Sprintf("$.pools[%d]", i)); problem != nil {
			return problem
		}
		if err := c.Images.Allowed(c.Pools[i].Image); err != nil {
			return &Problem{Path: fmt.Sprintf("$.pools[%d].image", i), What: err.Error(), Hint: "add its registry to images.registries, or leave that out to allow all"}
		}
		if before, twice := seen[c.Pools[i].Name]; twice {
			return &Problem{Path: fmt.Sprintf("$.pools[%d].name", i), What: fmt.Sprintf("pool %d is called %q, too", before+1, c.Pools[i].Name), Hint: "pool names are unique"}
		}
		seen[c.Pools[i].Name] = i
	}
	return nil
}

func (n *Node) checkDriver() *Problem {
	switch {
	case !slices.Contains([]string{DriverVZ, DriverQEMU, DriverProcess}, n.Driver):
		return &Problem{Path: "$.node.driver", What: fmt.Sprintf("unknown driver %q", n.Driver), Hint: "vz on a Mac, qemu on Linux, or process for trying Paddock out"}
	case !slices.Contains([]string{"tcg", "kvm", "auto"}, n.QEMU.Accel):
		return &Problem{Path: "$.node.qemu.accel", What: fmt.Sprintf("unknown accelerator %q", n.QEMU.Accel), Hint: "tcg, kvm or auto"}
	case !slices.Contains([]string{NetworkUser, "passt", "none"}, n.QEMU.Network):
		return &Problem{Path: "$.node.qemu.network", What: fmt.Sprintf("unknown network %q", n.QEMU.Network), Hint: "user, passt (no way to this host's loopback) or none"}
	case n.States() && n.Driver == DriverProcess:
		return &Problem{Path: "$.node.saved_states", What: "processes have no state that could be saved", Hint: "leave it out with driver process"}
	}
	return nil
}

// Allowed refuses an image outside the registries that may be pulled from.
func (i *Images) Allowed(ref string) error {
	image, err := name.ParseReference(ref)
	if err != nil {
		return err
	}
	for _, r := range i.Registries {
		if prefix, err := prefixOf(r); err == nil && strings.HasPrefix(image.Context().Name()+"/", prefix) {
			return nil
		}
	}
	if len(i.Registries) == 0 {
		return nil
	}
	return fmt.Errorf("%s is not in an allowed registry: images.registries lists %s", ref, strings.Join(i.Registries, ", "))
}

// prefixOf reads a registry, or a part of one, as the beginning of repositories' full
// names, with a slash at its end.
func prefixOf(registry string) (string, error) {
	if strings.Contains(registry, "//") {
		return "", fmt.Errorf("%q begins with a scheme", registry)
	}
	host, path, _ := strings.Cut(strings.TrimSuffix(registry, "/"), "/")
	at, err := name.NewRegistry(host, name.StrictValidation)
	if err != nil || path == "" {
		return at.Name() + "/", err
	}
	if _, err := name.NewRepository(host + "/" + path + "/x"); err != nil {
		return "", err
	}
	return at.Name() + "/" + path + "/", nil
}

// checkSources holds what a node is told of where images come from.
func (n *Node) checkSources() *Problem {
	if n.Site != "" {
		if err := fleet.CheckName("site", n.Site); err != nil {
			return &Problem{Path: "$.node.site", What: err.Error(), Hint: "the same word on all nodes of a site; leave it out if there is one"}
		}
	}
	for key, address := range map[string]string{"listen": n.Peer.Listen, "address": n.Peer.Address} {
		if _, _, err := net.SplitHostPort(address); address != "" && err != nil {
			return &Problem{Path: "$.node.peer." + key, What: fmt.Sprintf("%q is not host:port", address), Hint: `listen: ":8444", which is every address`}
		}
	}
	if n.Peer.Listen == "" && n.Peer.Address != "" {
		return &Problem{Path: "$.node.peer.address", What: "an address, and nothing listens", Hint: `peer: {listen: ":8444", address: mac-1.example.com:8444}`}
	}
	for _, registry := range slices.Sorted(maps.Keys(n.Mirrors)) {
		_, errOf := name.NewRegistry(registry, name.StrictValidation)
		_, errBy := prefixOf(n.Mirrors[registry])
		if errOf != nil || errBy != nil {
			return &Problem{Path: "$.node.mirrors", What: fmt.Sprintf("%q as the mirror of %q", n.Mirrors[registry], registry), Hint: "mirrors: {ghcr.io: mirror.example.com/ghcr}, hosts without a scheme"}
		}
	}
	if n.Streams < 1 || n.Streams > 64 {
		return &Problem{Path: "$.node.streams", What: fmt.Sprintf("%d streams", n.Streams), Hint: "1 to 64; 8 to 16 are usual"}
	}
	return nil
}

func (p *Pool) check(path string) *Problem {
	problem := func(key, what, hint string) *Problem {
		if key != "" {
			key = "." + key
		}
		return &Problem{Path: path + key, What: what, Hint: hint}
	}
	if err := fleet.CheckName("pool", p.Name); err != nil {
		return problem("name", err.Error(), "every pool has a name")
	}
	title := fmt.Sprintf("pool %q", p.Name)
	switch {
	case p.Image == "":
		return problem("", title+" has no image", "image: ghcr.io/owner/name:tag")
	case len(p.Labels) == 0:
		return problem("", title+" has no labels", "labels: [self-hosted, macOS, …]; a job runs here if all of its labels are among them")
	case len(p.Scopes) == 0:
		return problem("", title+" has no scopes", "scopes: [my-organization] or [owner/repository], where its runners are registered")
	case p.CPU < 0 || p.MinIdle < 0 || p.Max < 0 || p.MaxPerRepository < 0 || p.Group < 0:
		return problem("", title+" has a negative number", "leave a key out for its default")
	case p.Max > 0 && p.MinIdle > p.Max:
		return problem("min_idle", fmt.Sprintf("%d warm VMs, but at most %d in all", p.MinIdle, p.Max), "raise max or lower min_idle")
	}
	if _, err := name.ParseReference(p.Image); err != nil {
		return problem("image", err.Error(), "like ghcr.io/owner/name:tag")
	}
	for i, s := range p.Scopes {
		if s == "" || strings.Count(s, "/") > 1 || strings.HasPrefix(s, "/") || strings.HasSuffix(s, "/") {
			return problem(fmt.Sprintf("scopes[%d]", i), fmt.Sprintf("%q is no scope", s), "an organization or owner/repository")
		}
	}
	known := []fleet.Bootstrap{fleet.BootstrapAgent, fleet.BootstrapSSH, fleet.BootstrapSelf}
	if !slices.Contains(known, fleet.Bootstrap(p.Bootstrap)) {
		return problem("bootstrap", fmt.Sprintf("unknown bootstrap %q", p.Bootstrap), "agent, ssh or self")
	}
	switch {
	case p.SSH != (SSH{}) && p.Bootstrap != string(fleet.BootstrapSSH):
		return problem("ssh", fmt.Sprintf("a login for bootstrap %q, which does not log in", p.Bootstrap), "bootstrap: ssh, or take ssh out")
	case p.SSH != (SSH{}) && (p.SSH.User == "" || p.SSH.PasswordFile == "" && p.SSH.KeyFile == ""):
		return problem("ssh", "a login needs a user and a password or a key", "ssh: {user: admin, password_file: /etc/paddock/guest.password}")
	}
	for i, m := range p.Mounts {
		if m.Name == "" || !strings.HasPrefix(m.Path, "/") {
			return problem(fmt.Sprintf("mounts[%d]", i), "a mount needs a name and an absolute path", "{name: cache, path: /Users/ci/cache, read_only: true}")
		}
	}
	return nil
}

// explainSyntax turns the decoder's error into one line with the file, the line and a hint.
func explainSyntax(path string, err error) error {
	var value *Problem
	if errors.As(err, &value) {
		value.File = path
		return value
	}
	problem := &Problem{File: path, What: err.Error(), Hint: "docs/paddock.example.yaml shows every key; mind the indentation"}
	var located yaml.Error
	if errors.As(err, &located) {
		problem.What = located.GetMessage()
		if at := located.GetToken(); at != nil && at.Position != nil {
			problem.Line = at.Position.Line
			problem.Path = keyOf(at)
		}
	}
	var (
		unknown *yaml.UnknownFieldError
		wrong   *yaml.TypeError
		shape   *yaml.UnexpectedNodeTypeError
		large   *yaml.OverflowError
	)
	switch {
	case errors.As(err, &unknown):
		problem.What, problem.Path = "unknown key", "$."+brief(unknown.Token.Value)
		problem.Hint = "docs/paddock.example.yaml lists every key; mind the indentation"
	case errors.As(err, &wrong):
		problem.What = fmt.Sprintf("%q is not %s", brief(wrong.Token.Value), kinds[wrong.DstType.Kind()])
	case errors.As(err, &shape) && shapes[shape.Expected] != "" && shapes[shape.Actual] != "":
		problem.What = fmt.Sprintf("this wants %s, not %s", shapes[shape.Expected], shapes[shape.Actual])
		problem.Hint = "a list is written [a, b], a mapping {key: value}; docs/paddock.example.yaml shows each key"
	case errors.As(err, &large):
		problem.What = fmt.Sprintf("%s is too large", brief(large.SrcNum))
	}
	problem.What = strings.Join(strings.Fields(problem.What), " ")
	return problem
}

// kinds says what a key of a Go type wants.
var kinds = map[reflect.Kind]string{
	reflect.Int: "a whole number", reflect.Int64: "a whole number", reflect.Bool: "true or false",
	reflect.String: "a text", reflect.Slice: "a list", reflect.Map: "a mapping", reflect.Struct: "a mapping",
}

// shapes are what YAML calls nodes, in words.
var shapes = map[ast.NodeType]string{
	ast.SequenceType: "a list", ast.MappingType: "a mapping", ast.MappingValueType: "a mapping",
	ast.StringType: "a text", ast.LiteralType: "a text", ast.IntegerType: "a number", ast.FloatType: "a number",
	ast.BoolType: "true or false", ast.NullType: "nothing", ast.AnchorType: "an anchor", ast.AliasType: "an alias", ast.TagType: "a tag",
}

// keyOf is the path of the key whose value a token is, or begins; "" if there is none.
func keyOf(at *token.Token) string {
	for before := at.Prev; before != nil && before.Position.Line == at.Position.Line; before = before.Prev {
		if before.Type == token.MappingValueType && before.Prev != nil {
			return "$." + brief(before.Prev.Value)
		}
	}
	return ""
}

// brief keeps a file that is no text at all from filling the screen.
func brief(text string) string {
	const most = 40 // runes
	runes := []rune(strings.Join(strings.Fields(strings.ToValidUTF8(text, "?")), " "))
	if len(runes) > most {
		runes = append(runes[:most], '…')
	}
	return string(runes)
}

// lineOf finds the line of a path, or of its nearest parent that is in the source; 0
// when there is no source.
func lineOf(source []byte, path string) int {
	file, err := parser.ParseBytes(source, 0)
	if err != nil || len(source) == 0 {
		return 0
	}
	for path != "" && path != "$" {
		if node := nodeAt(file, path); node != nil && node.GetToken() != nil {
			return node.GetToken().Position.Line
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
	return 0
}

func nodeAt(file *ast.File, path string) ast.Node {
	at, err := yaml.PathString(path)
	if err != nil {
		return nil
	}
	node, err := at.FilterFile(file)
	if err != nil {
		return nil
	}
	return node
}
