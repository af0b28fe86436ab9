package node

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/access"
)

// tower is the two clocks, and what is said of them. The controller's is time.Now.
type tower struct {
	mu     sync.Mutex
	ahead  time.Duration // the host's is, of the controller's
	takes  time.Duration // an answer
	silent error         // nil: the controller answers
	log    bytes.Buffer
}

func (w *tower) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

// host is the host's clock.
func (w *tower) host() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.ahead)
}

func (w *tower) ask(context.Context) (time.Time, time.Duration, error) {
	w.mu.Lock()
	takes, silent := w.takes, w.silent
	w.mu.Unlock()
	time.Sleep(takes / 2)
	at := time.Now().Truncate(time.Second)
	time.Sleep(takes / 2)
	return at, takes, silent
}

// The host's clock is ten minutes ahead of the controller's, is then set, and later goes
// wrong again. A neighbour's token is judged by the controller's time all the while, and
// each turn to the worse is said once.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &tower{ahead: 10 * time.Minute, takes: 100 * time.Millisecond}
		clock, err := NewClock(ClockConfig{Log: slog.New(slog.NewTextHandler(w, nil)), Now: w.host, Ask: w.ask})
		if err != nil {
			t.Fatal(err)
		}
		if goodNow(t, clock.Now()) == nil {
			t.Error("a clock that is not measured yet is right")
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go clock.Run(ctx)
		for _, step := range []struct {
			ahead, takes, after time.Duration
			silent              error
			warned              int
			wrong               bool
		}{
			{ahead: 10 * time.Minute, after: time.Second, warned: 1},
			{ahead: 10 * time.Minute, after: time.Hour, warned: 1},
			{ahead: 0, after: 2 * clockEvery, warned: 1},
			{ahead: -4 * time.Second, after: 2 * clockEvery, warned: 1}, // corrected, not worth a word
			{ahead: -time.Hour, after: 2 * clockEvery, warned: 2},
			{ahead: -time.Hour, after: time.Hour, silent: errors.New("no route"), warned: 2}, // what was measured counts on
			{ahead: 0, after: time.Hour, takes: clockLate + time.Second, warned: 2, wrong: true},
			{ahead: 0, after: 2 * clockEvery, warned: 2},
		} {
			w.mu.Lock()
			w.ahead, w.silent = step.ahead, step.silent
			w.takes = step.takes
			w.mu.Unlock()
			time.Sleep(step.after)
			synctest.Wait()
			off, token := time.Until(clock.Now()).Abs(), goodNow(t, clock.Now())
			if (off > 2*time.Second) != step.wrong || (token != nil) != step.wrong {
				t.Errorf("%+v: the time is off by %s, a token: %v", step, off, token)
			}
			w.mu.Lock()
			if n := strings.Count(w.log.String(), "WARN"); n != step.warned {
				t.Errorf("%+v: %d warnings:\n%s", step, n, &w.log)
			}
			w.mu.Unlock()
		}
		if n := strings.Count(w.log.String(), "agree again"); n != 2 {
			t.Errorf("said %d times that all is well:\n%s", n, &w.log)
		}
	})
}

// goodNow judges a new token of a neighbour at a time.
func goodNow(t *testing.T, now time.Time) error {
	t.Helper()
	key := access.NewKey()
	token, err := key.SignPeer(access.PeerGrant{Receiver: "mac-2", Server: "mac-1", Image: base, ExpiresAt: time.Now().Add(access.PeerLife - clockOff)})
	if err != nil {
		t.Fatal(err)
	}
	text, err := key.PeerKey()
	if err != nil {
		t.Fatal(err)
	}
	v, err := access.ParsePeerKey(text)
	if err != nil {
		t.Fatal(err)
	}
	_, err = v.Verify(string(token), "mac-1", base, now)
	return err
}
