package parts

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/ocidir"
	"github.com/paddock-ci/paddock/cache/peer"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/node"
)

// Sources are where a node's images come from, but for its peers: a layout on a shared
// directory, mirrors, and the registries themselves. token buys pull tokens for registries;
// nil: there are the Docker config's credentials only.
func Sources(c config.Node, token func(ctx context.Context, repository string) (string, error), log *slog.Logger) ([]cache.Source, error) {
	var sources []cache.Source
	if c.Layout != "" {
		layout, err := ocidir.Open(c.Layout)
		if err != nil {
			return nil, fmt.Errorf("opening the images of node.layout: %w", err)
		}
		sources = append(sources, layout)
	}
	for _, registryHost := range slices.Sorted(maps.Keys(c.Mirrors)) {
		// Mirrors are asked with credentials of this host: the controller knows its own.
		mirror, err := registry.New(registry.Config{Mirror: c.Mirrors[registryHost], For: registryHost, Tries: 2, Log: log})
		if err != nil {
			return nil, fmt.Errorf("node.mirrors: %w", err)
		}
		sources = append(sources, mirror)
	}
	upstream, err := registry.New(registry.Config{Token: token, Log: log})
	if err != nil {
		return nil, err
	}
	return append(sources, upstream), nil
}

// layoutTime is how long the start waits for a look at node.layout, which may be a mount
// that hangs.
const layoutTime = 5 * time.Second

// checkLayout warns of a node.layout that has no images: it is there for what it saves, and
// without it everything comes from farther away. A mount may come later, so the node starts.
func checkLayout(ctx context.Context, dir string, log *slog.Logger) error {
	if dir == "" {
		return nil
	}
	layout, err := ocidir.Open(dir)
	if err != nil {
		return fmt.Errorf("opening the images of node.layout: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, layoutTime)
	defer cancel()
	if _, err := layout.List(ctx); err != nil {
		log.Warn("no images come from node.layout for now", "dir", dir, "error", err)
	}
	return nil
}

// images are a node's store and its ways to other nodes of the site.
type images struct {
	*cache.Store
	peer  *peer.Server
	near  *peer.Client
	clock *node.Clock
}

// Close closes the store, and the connections to peers.
func (i *images) Close() error {
	i.near.Close()
	return i.Store.Close()
}

// openImages opens a node's images with all their sources.
func openImages(ctx context.Context, c NodeConfig, client *api.Client) (*images, error) {
	id := fleet.NodeID(c.Node.Name)
	identity, err := peer.OpenIdentity(c.Node.Dir, id, nil)
	if err != nil {
		return nil, err
	}
	near, err := peer.NewClient(peer.ClientConfig{Identity: identity})
	if err != nil {
		return nil, err
	}
	site, err := node.NewSite(node.SiteConfig{Node: id, Chunks: client.Chunks, Source: near.Source, Log: c.Log})
	if err != nil {
		return nil, err
	}
	clock, err := node.NewClock(node.ClockConfig{Ask: client.Clock, Log: c.Log})
	if err != nil {
		return nil, err
	}
	tokens, err := node.NewTokens(node.TokensConfig{Node: id, PullToken: client.PullToken, Log: c.Log})
	if err != nil {
		return nil, err
	}
	sources, err := Sources(c.Node, tokens.PullToken, c.Log)
	if err != nil {
		return nil, err
	}
	if err := checkLayout(ctx, c.Node.Layout, c.Log); err != nil {
		return nil, err
	}
	store, err := openStore(ctx, cache.Config{Dir: ImagesDir(c.Node), Sources: sources, Site: site, Streams: c.Node.Streams, Log: c.Log})
	if err != nil {
		return nil, err
	}
	port, err := peer.NewServer(peer.Config{
		Node: id, Identity: identity, Pieces: store, Listen: c.Node.Peer.Listen, Address: c.Node.Peer.Address,
		Bandwidth: int64(c.Node.Peer.Bandwidth), Now: clock.Now, Log: c.Log,
	})
	if err != nil {
		_ = store.Close() // nothing was done with it
		return nil, err
	}
	return &images{Store: store, peer: port, near: near, clock: clock}, nil
}
