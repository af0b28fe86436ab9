package webhook_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/webhook"
)

// A small body that never ends, from whoever finds the address, held its connection for
// ever: only large ones had a deadline.
func TestSlowBodyHeldForever(t *testing.T) {
	h, err := webhook.New(webhook.Config{
		Secrets: [][]byte{[]byte("s")}, Timeout: 100 * time.Millisecond,
		Merge: func(context.Context, store.Delivery) (store.Merged, error) { return store.Merged{}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	for _, length := range []int{1000, 100_000} {
		c, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(c, "POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\nx", length); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, c); err != nil { // until the server hangs up
			t.Errorf("%d bytes announced: %v", length, err)
		}
		_ = c.Close()
	}
}
