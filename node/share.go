package node

import (
	"path/filepath"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest/self"
)

// shareDir is where the host's end of a share with the guest lies: in the clone, with
// which it goes.
func shareDir(clone string) string { return filepath.Join(clone, "share") }

// prepareShare makes the share of a VM whose image starts its runner by itself.
func prepareShare(clone string) ([]fleet.Mount, error) { return self.Prepare(shareDir(clone)) }

func openShare(clone string) bootstrap { return self.Open(shareDir(clone)) }
