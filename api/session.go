package api

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/paddock-ci/paddock/fleet"
)

// StreamProtocol is what the Upgrade header of a session says: after the 101 the
// connection is a raw stream, in both directions, until one side closes it.
const StreamProtocol = "paddock-stream"

// Stream is one end of a session. Close ends both directions; CloseWrite says that
// nothing more is sent, while the other direction goes on.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// streamTransport is t for calls that become streams. HTTP/2 has no Upgrade, and a
// connection for each call lets a balancer send the next try to another replica.
func streamTransport(t *http.Transport) *http.Transport {
	t = t.Clone()
	t.ForceAttemptHTTP2, t.HTTP2 = false, nil
	t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	t.TLSClientConfig.NextProtos = []string{"http/1.1"}
	t.DisableKeepAlives = true
	return t
}

// Session connects to a VM: order says to which one and what for; its ID is the
// controller's to make. It returns once the VM's node has answered, at most 20 s later,
// or with the *Error that says why there is no session. ctx bounds only that.
func (c *Client) Session(ctx context.Context, order SessionOrder) (Stream, error) {
	query := url.Values{"kind": {string(order.Kind)}}
	if order.Port != 0 {
		query.Set("port", strconv.Itoa(order.Port))
	}
	if order.Once {
		query.Set("once", "true")
	}
	return c.stream(ctx, path(RouteVMSession, string(order.VM))+"?"+query.Encode())
}

// Answer is a node's end of a session that an order asked for. A 421 is another
// replica's than the one where the caller waits: try again.
func (c *Client) Answer(ctx context.Context, node fleet.NodeID, sid string) (Stream, error) {
	return c.stream(ctx, path(RouteNodeSession, string(node), sid))
}

// Refuse tells whoever waits for a session why there will be none. A 421 is as with
// Answer.
func (c *Client) Refuse(ctx context.Context, node fleet.NodeID, sid string, why Error) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var answer struct{}
	return c.doBy(ctx, c.streams, http.MethodPost, path(RouteNodeSession, string(node), sid), why, &answer)
}

// Misdirected reports whether another replica of the controller holds what was asked for.
func Misdirected(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusMisdirectedRequest
}

// stream makes a call that becomes a raw stream, within callTime.
func (c *Client) stream(ctx context.Context, path string) (Stream, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel() // has no effect on a connection that was handed over
	request, err := c.request(ctx, http.MethodPost, path, http.NoBody)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Connection", "Upgrade")
	request.Header.Set("Upgrade", StreamProtocol)
	response, err := c.streams.Do(request)
	if err != nil {
		return nil, unreachable(c.base, err)
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		defer func() { _ = response.Body.Close() }()
		return nil, readError(response)
	}
	// net/http's body after a 101 is the connection itself.
	stream, ok := response.Body.(Stream)
	if !ok || response.Header.Get("Upgrade") != StreamProtocol {
		_ = response.Body.Close()
		return nil, fmt.Errorf("the controller switched to another protocol than %s", StreamProtocol)
	}
	return stream, nil
}
