package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
)

// NodeEvictions is what goes from a node, what would go next, and what stays there, and
// why.
type NodeEvictions = placement.NodeEvictions

// Evictions is a dry run: what would leave a node, or with "" every one, by id. With
// free > 0 it is as if so many bytes had to be free there.
func (c *Client) Evictions(ctx context.Context, node fleet.NodeID, free int64) ([]NodeEvictions, error) {
	query := url.Values{}
	if node != "" {
		query.Set("node", string(node))
	}
	if free > 0 {
		query.Set("free", strconv.FormatInt(free, 10))
	}
	return call[[]NodeEvictions](ctx, c, http.MethodGet, RouteEvictions+"?"+query.Encode(), nil)
}
