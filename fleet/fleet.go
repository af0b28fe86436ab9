// Package fleet holds the nouns that every other package speaks in: jobs, virtual
// machines, pools, nodes and images, their typed identifiers, and labels.
//
// It does no I/O, reads no clock and decides nothing beyond what a noun means by
// itself (labels are compared here, jobs are merged here; where a job runs is
// decided in placement, and what a VM may do next in runner).
//
// Everything calls it; it calls nothing of ours.
package fleet

import (
	"crypto/rand"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Identifiers are types, so that a node's name cannot be handed over as a pool's.
type (
	// JobID is GitHub's id of one workflow job; a re-run gets new ones.
	JobID int64
	// VMID names a virtual machine: eight lower-case base32 characters.
	VMID string
	// NodeID is the name a node joined under.
	NodeID string
	// PoolName is a pool's name in the configuration.
	PoolName string
	// Digest is "sha256:" and 64 lower-case hex digits.
	Digest string
	// Scope is where runners are registered: "org" or "owner/repository".
	Scope string
)

// Owner is the account of a scope: the part before the slash.
func (s Scope) Owner() string {
	owner, _, _ := strings.Cut(string(s), "/")
	return owner
}

// IsRepository tells a repository's scope from an organization's.
func (s Scope) IsRepository() bool { return strings.Contains(string(s), "/") }

// Contains reports whether jobs of repository ("owner/name") belong to the scope.
// GitHub compares names without case.
func (s Scope) Contains(repository string) bool {
	if s.IsRepository() {
		return strings.EqualFold(string(s), repository)
	}
	return strings.EqualFold(string(s), Scope(repository).Owner())
}

// vmIDAlphabet is base32 without letters that are read for digits.
const vmIDAlphabet = "abcdefghijkmnpqrstuvwxyz23456789"

// NewVMID draws a random id: 32^8, about 10^12; a clash is refused by the store.
func NewVMID() VMID {
	var b [8]byte
	rand.Read(b[:]) // never fails: crypto/rand aborts the program instead
	for i := range b {
		b[i] = vmIDAlphabet[int(b[i])%len(vmIDAlphabet)]
	}
	return VMID(b[:])
}

// namePattern is what fleets, nodes and pools may be called: it must fit into a host
// name, a file name and a Redis key.
var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CheckName returns an error with a hint if name cannot name a fleet, node or pool.
func CheckName(kind, name string) error {
	if namePattern.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%s name %q: use 1 to 63 lower-case letters, digits and inner hyphens", kind, name)
}

// digestPattern is the only digest algorithm Paddock knows.
var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// CheckDigest returns an error if d is not a sha256 digest in its canonical form.
func CheckDigest(d Digest) error {
	if digestPattern.MatchString(string(d)) {
		return nil
	}
	return fmt.Errorf("digest %.80q: want sha256: and 64 lower-case hex digits", d)
}

// Short is the first twelve hex digits, for people.
func (d Digest) Short() string {
	hex := strings.TrimPrefix(string(d), "sha256:")
	return hex[:min(12, len(hex))]
}

// Labels is a set of runner labels: lower case, trimmed, sorted, without doubles.
// Make one with NewLabels; GitHub compares labels without case.
type Labels []string

// NewLabels normalizes raw labels; empty ones are dropped.
func NewLabels(raw ...string) Labels {
	labels := make(Labels, 0, len(raw))
	for _, l := range raw {
		if l = strings.ToLower(strings.TrimSpace(l)); l != "" {
			labels = append(labels, l)
		}
	}
	slices.Sort(labels)
	return slices.Compact(labels)
}

// ContainsAll reports whether every label of want is in l: the rule by which GitHub
// lets a runner with labels l take a job that asks for want.
func (l Labels) ContainsAll(want Labels) bool { return len(l.Missing(want)) == 0 }

// Missing returns the labels of want that are not in l.
func (l Labels) Missing(want Labels) Labels {
	var missing Labels
	for _, w := range want {
		if _, found := slices.BinarySearch(l, w); !found {
			missing = append(missing, w)
		}
	}
	return missing
}

// Key is the set as one string, equal for equal sets.
func (l Labels) Key() string { return strings.Join(l, ",") }

// RunnerName is the name under which attempt number n of a VM registers at GitHub.
// It parses back with ParseRunnerName, so that a runner seen there finds its VM here.
func RunnerName(fleetName string, vm VMID, n int) string {
	return fmt.Sprintf("paddock-%s-%s-%d", fleetName, vm, n)
}

// ParseRunnerName is the inverse of RunnerName; ok is false for a foreign runner,
// which must never be touched.
func ParseRunnerName(fleetName, name string) (vm VMID, n int, ok bool) {
	rest, ours := strings.CutPrefix(name, "paddock-"+fleetName+"-")
	id, number, dash := strings.Cut(rest, "-")
	if !ours || !dash || len(id) != 8 {
		return "", 0, false
	}
	if _, err := fmt.Sscanf(number, "%d", &n); err != nil || n < 1 || RunnerName(fleetName, VMID(id), n) != name {
		return "", 0, false
	}
	return VMID(id), n, true
}
