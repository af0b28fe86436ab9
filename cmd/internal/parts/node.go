package parts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/node"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm/helper"
	"github.com/paddock-ci/paddock/vm/process"
)

// The roles in which a binary starts itself again: hidden commands of both programs.
const (
	HelperRole = "vm-helper"   // one per VM, keeps it across the agent's restarts
	GuestRole  = "guest-agent" // what runs inside a machine of the process driver
)

// credentialFile, in the node's directory, is who the node is to the controller.
const credentialFile = "credential.json"

// Join exchanges a one-time token for the node's credential and keeps it in the node's
// directory. The token says where the controller is and which certificate it shows;
// url overrides the former, for a controller that is reached by another name from here.
func Join(ctx context.Context, c config.Node, token, url string) error {
	return join(ctx, c, token, Endpoint{URL: url})
}

// join is Join at an address and with a certificate; what at leaves empty the token says.
func join(ctx context.Context, c config.Node, token string, at Endpoint) error {
	said, err := access.ReadJoin(token)
	if errors.Is(err, access.ErrMalformed) {
		return fmt.Errorf("this is no join token (hint: one begins with pdkjoin_ and is one line; on the controller: paddock token create --node %s)", c.Name)
	}
	if err != nil {
		return fmt.Errorf("read the join token: %w", err)
	}
	if said.Node != fleet.NodeID(c.Name) {
		return fmt.Errorf("the token is for node %q, this one is %q (hint: set node.name, or make a token for this name: paddock token create --node %s)", said.Node, c.Name, c.Name)
	}
	at.URL, at.Certificate = cmp.Or(at.URL, said.URL), cmp.Or(at.Certificate, said.Certificate)
	client, err := at.Client()
	if err != nil {
		return err
	}
	reply, err := client.Join(ctx, token)
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return fmt.Errorf("make the node's directory: %w", err)
	}
	at.Token = reply.Credential
	return writeFile(filepath.Join(c.Dir, credentialFile), at)
}

// NodeConfig of a node. Node and Self are required.
type NodeConfig struct {
	Node config.Node
	// Self is the argv by which this program starts itself; a role is appended.
	Self    []string
	Version string
	// Keep leaves VMs running when the node is stopped, for the next start to adopt.
	Keep func() bool
	Log  *slog.Logger // nil: discarded
}

// Node is a node's agent with what it works with.
type Node struct {
	agent  *node.Agent
	images *images
}

// NewNode builds the agent of a node that has joined. It takes seconds where it has to
// try what this host's CPU can do for machines.
func NewNode(ctx context.Context, c NodeConfig) (*Node, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	path := filepath.Join(c.Node.Dir, credentialFile)
	endpoint, err := ReadEndpoint(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("node %s has not joined (hint: on the controller: paddock token create --node %s; here: paddock node join TOKEN)", c.Node.Name, c.Node.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("read the node's credential: %w", err)
	}
	client, err := endpoint.Client()
	if err != nil {
		return nil, err
	}
	command, err := helperCommand(ctx, c)
	if err != nil {
		return nil, err
	}
	machines, err := helper.New(helper.Config{
		Command: command, Dir: filepath.Join(c.Node.Dir, "vms"), Log: c.Log,
	})
	if err != nil {
		return nil, err
	}
	images, err := openImages(ctx, c, client)
	if err != nil {
		return nil, err
	}
	agent, err := node.New(node.Config{
		ID: fleet.NodeID(c.Node.Name), Tags: c.Node.Tags, Slots: c.Node.Slots, Memory: hostMemory(), Dir: c.Node.Dir,
		Driver: c.Node.Driver, Version: c.Version, Machines: machines, Images: images, Sync: client.Sync, Sessions: client,
		Site: c.Node.Site, Peer: images.peer, Clock: images.clock, Limit: images.Limit, Streams: c.Node.Streams,
		Bandwidth: int64(c.Node.Bandwidth), BandwidthBusy: int64(c.Node.BandwidthBusy),
		Renewed: func(credential string) error {
			endpoint.Token = credential
			if err := writeFile(path, endpoint); err != nil {
				return err
			}
			client.SetToken(credential)
			return nil
		},
		SaveStates: c.Node.States(), CloneFile: cache.CloneFile,
		CanShare: func() (bool, error) { return cache.CanShare(c.Node.Dir) },
		Keep:     c.Keep, Rate: images.Rate, Free: images.Free, Log: c.Log,
	})
	if err != nil {
		return nil, errors.Join(err, images.Close())
	}
	return &Node{agent: agent, images: images}, nil
}

// openStore waits up to two seconds for the store's lock: an agent that was killed
// between fork and exec of a helper leaves it held for that moment.
func openStore(ctx context.Context, c cache.Config) (*cache.Store, error) {
	late := time.After(2 * time.Second)
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		images, err := cache.Open(c)
		if !errors.Is(err, cache.ErrInUse) {
			return images, err
		}
		select {
		case <-again.C:
		case <-late:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Run runs the agent until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	return errors.Join(n.agent.Run(ctx), n.images.Close())
}

// hostMemory is this host's memory in bytes, 0 where it cannot be told.
func hostMemory() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return darwinMemory()
	}
	var kib int64
	for line := range strings.Lines(string(text)) {
		if n, _ := fmt.Sscanf(line, "MemTotal: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return 0
}

// Guest is the body of the hidden command that is the guest of the process driver.
func Guest(ctx context.Context) error {
	return process.GuestMain(ctx, guest.AgentConfig{})
}
