package api

import (
	"net/url"
	"strings"
)

// The routes. {id} stands for one path segment. Every route but join and the probes
// wants "Authorization: Bearer pdk_…".
const (
	RouteSync      = "/v1/nodes/{id}/sync"     // POST SyncRequest → SyncReply
	RouteJoin      = "/v1/join"                // POST JoinRequest → JoinReply; the join token is in the body
	RouteNodes     = "/v1/nodes"               // GET → []NodeRow
	RouteNode      = "/v1/nodes/{id}"          // DELETE → NodeRow, as it was; 409 while VMs live there
	RouteCordon    = "/v1/nodes/{id}/cordon"   // POST → NodeRow
	RouteUncordon  = "/v1/nodes/{id}/uncordon" // POST → NodeRow
	RouteVMs       = "/v1/vms"                 // GET → []VMRow
	RouteImages    = "/v1/images"              // GET → []ImageRow
	RouteEvictions = "/v1/images/evictions"    // GET ?node=&free= → []NodeEvictions; a dry run
	RouteJobs      = "/v1/jobs"                // GET ?status= → []JobRow
	RouteExplain   = "/v1/jobs/{id}/explain"   // GET → Explanation
	RouteEvents    = "/v1/events"              // GET ?job=&vm=&node=&limit= → []Event
	RouteTokens    = "/v1/tokens"              // GET → []TokenRow; POST TokenRequest → TokenReply
	RouteToken     = "/v1/tokens/{id}"         // DELETE → TokenRow

	RouteVMSession   = "/v1/vms/{id}/session"          // POST ?kind=&port=&once= by HTTP/1.1 with Upgrade: paddock-stream → 101 and a raw stream, once the VM's node has answered (else 502, or 504 after 20 s)
	RouteNodeSession = "/v1/nodes/{id}/sessions/{sid}" // POST with the same Upgrade → 101 and the other end of the stream, or without it Error → nothing, which is what the caller is told (421: another replica holds the session, try again)

	RouteChunks    = "/v1/nodes/{id}/chunks"     // POST ChunksRequest → ChunksReply
	RoutePullToken = "/v1/nodes/{id}/pull-token" // POST PullTokenRequest → PullTokenReply

	RouteHealth  = "/healthz" // the process runs
	RouteReady   = "/readyz"  // the store answers
	RouteMetrics = "/metrics" // Prometheus
)

// path fills the {id} of a route, and its {sid} if there is one.
func path(route, id string, sid ...string) string {
	route = strings.Replace(route, "{id}", url.PathEscape(id), 1)
	for _, s := range sid {
		route = strings.Replace(route, "{sid}", url.PathEscape(s), 1)
	}
	return route
}
