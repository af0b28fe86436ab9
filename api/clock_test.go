package api

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// The time comes from a controller with the pinned certificate, and the token is not
// shown for it.
func TestClock(t *testing.T) {
	d := newDouble(t, http.StatusOK, "ok")
	ask := func(hash string) (time.Time, error) {
		c, err := New(Config{URL: d.URL, Token: "secret", CertificateHash: hash})
		if err != nil {
			t.Fatal(err)
		}
		at, took, err := c.Clock(t.Context())
		if err == nil && took <= 0 {
			t.Errorf("it took %s", took)
		}
		return at, err
	}
	at, err := ask(d.hash())
	if off := time.Since(at).Abs(); err != nil || off > time.Minute {
		t.Errorf("off by %s (%v)", off, err)
	}
	if d.auth != "" || d.path != RouteHealth {
		t.Errorf("asked for %s as %q", d.path, d.auth)
	}
	if _, err := ask(strings.Repeat("ab", 32)); err == nil || !strings.Contains(err.Error(), "another certificate") {
		t.Errorf("of another controller: %v", err)
	}
	d.status = http.StatusBadGateway
	if _, err := ask(d.hash()); err == nil || !strings.Contains(err.Error(), "502") {
		t.Errorf("of a proxy without a controller: %v", err)
	}
}
