package server

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
)

// Whoever sends a body slowly, authentic or not, held a connection for ever. A parked
// sync, which has sent its body, must not be ended by the same clock.
func TestSlowBodyHeldForever(t *testing.T) {
	h := newHouse(t)
	h.server.bodyTime = 100 * time.Millisecond
	for name, head := range map[string]string{
		"join, by nobody":  "POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
		"refused":          "POST /v1/tokens HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
		"a GET with one":   "GET /v1/nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
		"sync, by a node ": "POST /v1/nodes/mac1/sync HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + h.token(access.Node, "mac1") + "\r\nContent-Length: 1000\r\n\r\n{",
	} {
		c, err := new(net.Dialer).DialContext(t.Context(), "tcp", h.http.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprint(c, head); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, c); err != nil { // until the server hangs up
			t.Errorf("%s: %v", name, err)
		}
		_ = c.Close()
	}
	m := h.mac("mac1")
	m.say()
	began := time.Now()
	if _, err := m.try(400 * time.Millisecond); err != nil || time.Since(began) < 400*time.Millisecond {
		t.Errorf("a parked sync ended after %s: %v", time.Since(began), err)
	}
}
