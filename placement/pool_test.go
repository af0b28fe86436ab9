package placement

import (
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

// The cast: "mac" serves the organization acme, "tool" only acme's tool with a label
// more, "any" takes jobs of "zoo" that do not ask for self-hosted.
var poolCast = []fleet.Pool{
	{Name: "mac", Scopes: []fleet.Scope{"acme"}, Labels: fleet.NewLabels("self-hosted", "macOS")},
	{Name: "tool", Scopes: []fleet.Scope{"acme", "acme/tool"}, Labels: fleet.NewLabels("self-hosted", "macOS", "gpu")},
	{Name: "any", Scopes: []fleet.Scope{"zoo"}, Labels: fleet.NewLabels("self-hosted", "macos-15"), MatchHosted: true},
}

func TestPoolFor(t *testing.T) {
	for _, c := range []struct {
		repository string
		labels     []string
		public     bool
		pool       fleet.PoolName
		scope      fleet.Scope
		refusal    string
	}{
		{repository: "acme/app", labels: []string{"self-hosted", "MACOS"}, pool: "mac", scope: "acme"},
		{repository: "ACME/Tool", labels: []string{"self-hosted", "gpu"}, pool: "tool", scope: "acme/tool"},
		{repository: "zoo/app", labels: []string{"macos-15"}, pool: "any", scope: "zoo"},
		{repository: "acme/app", labels: []string{"macos-15"}, refusal: "repository not allowed (pool any)"},
		{repository: "acme/app", labels: []string{"ubuntu-latest"}, refusal: "no pool has all its labels: nearest is any, which lacks ubuntu-latest"},
		{repository: "acme/app", labels: []string{"self-hosted", "macOS", "gpu", "x9"}, refusal: "no pool has all its labels: nearest is tool, which lacks x9"},
		{repository: "zoo/app", labels: []string{"self-hosted", "macOS", "x9"}, refusal: "no pool has all its labels: nearest is mac, which lacks x9"},
		{repository: "zoo/app", labels: []string{"self-hosted", "gpu"}, refusal: "repository not allowed (pool tool)"},
		{repository: "acme/app", labels: []string{"self-hosted", "gpu"}, public: true, refusal: "public repository (pool tool)"},
	} {
		pool, scope, refusal := PoolFor(poolCast, fleet.Job{Repository: c.repository, Labels: fleet.NewLabels(c.labels...), Public: c.public})
		got := ""
		if refusal.Refused() {
			got = refusal.String()
		}
		if pool.Name != c.pool || scope != c.scope || got != c.refusal {
			t.Errorf("%s %v: got pool %q, scope %q, %q; want %q, %q, %q", c.repository, c.labels, pool.Name, scope, got, c.pool, c.scope, c.refusal)
		}
	}
	if _, _, refusal := PoolFor(poolCast[:2], fleet.Job{Repository: "acme/app", Labels: fleet.NewLabels("macos-15")}); refusal.Reason != ReasonHosted {
		t.Errorf("a job for GitHub's own runners: got %v", refusal)
	}
	if _, _, refusal := PoolFor(nil, fleet.Job{Labels: fleet.NewLabels("self-hosted")}); refusal.String() != "no pool has all its labels" {
		t.Errorf("without pools: got %v", refusal)
	}
}
