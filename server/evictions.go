package server

import (
	"context"
	"fmt"
	"net/http"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// listEvictions tells what would leave which node, and why the rest stays.
func (s *Server) listEvictions(ctx context.Context, c call, _ struct{}) ([]api.NodeEvictions, error) {
	node := fleet.NodeID(c.query.Get("node"))
	free, err := number(c.query.Get("free"))
	if err != nil {
		return nil, refusal(http.StatusBadRequest, "free is not a number of bytes", "leave it out for what a pass lets go by itself")
	}
	if s.c.Evictions == nil {
		return nil, refusal(http.StatusNotImplemented, "nobody decides here", "ask a controller")
	}
	if node != "" {
		view, err := s.c.Store.View(ctx)
		if err != nil {
			return nil, err
		}
		if view.Nodes[node] == nil {
			return nil, refusal(http.StatusNotFound, fmt.Sprintf("no node %q", cut(string(node))), "paddock nodes list shows those that have reported")
		}
	}
	// A pass costs as much as one of the leader's: one at a time, whoever asks how often.
	select {
	case s.weighing <- struct{}{}:
		defer func() { <-s.weighing }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return s.c.Evictions(ctx, node, free)
}
