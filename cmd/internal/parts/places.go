package parts

import (
	"path/filepath"

	"github.com/paddock-ci/paddock/cmd/internal/config"
)

// Places in a node's directory, for commands that look at it beside the agent.

// CredentialPath is the file that says who the node is; ReadEndpoint reads it.
func CredentialPath(c config.Node) string { return filepath.Join(c.Dir, credentialFile) }

// HelpersDir holds a folder for each VM's helper.
func HelpersDir(c config.Node) string { return filepath.Join(c.Dir, "vms") }

// ImagesDir is the node's store of images.
func ImagesDir(c config.Node) string { return filepath.Join(c.Dir, "images") }

// HostMemory is this host's memory in bytes, 0 where it cannot be told.
func HostMemory() int64 { return hostMemory() }
