package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Clock asks the controller for its time, to the second, without saying who asks; took is
// how long the answer needed. It tells at the same time whether the controller is reached
// and shows the certificate that it should.
func (c *Client) Clock(ctx context.Context) (at time.Time, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+RouteHealth, nil)
	if err != nil {
		return time.Time{}, 0, fmt.Errorf("ask the controller for its time: %w", err)
	}
	r.Header.Set("User-Agent", c.agent)
	began := time.Now()
	reply, err := c.http.Do(r)
	if err != nil {
		return time.Time{}, 0, fmt.Errorf("ask the controller for its time: %w", err)
	}
	defer func() { _ = reply.Body.Close() }()
	_, _ = io.CopyN(io.Discard, reply.Body, 1<<10) // the connection can be used again
	took = time.Since(began)
	if reply.StatusCode != http.StatusOK {
		return time.Time{}, 0, &Error{Status: reply.StatusCode, Message: "this is no controller, or not a healthy one: it answered " + reply.Status}
	}
	at, err = http.ParseTime(reply.Header.Get("Date"))
	if err != nil {
		return time.Time{}, 0, &Error{Status: reply.StatusCode, Message: "the answer has no time", Hint: "is there a proxy in between that takes it out?"}
	}
	return at, took, nil
}
