package feed_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/feed"
	"github.com/paddock-ci/paddock/github"
)

// mute is a small GitHub whose first listing never ends.
type mute struct {
	logbook
	lists int
}

func (m *mute) Deliveries(ctx context.Context, cursor string) ([]github.DeliveryInfo, string, error) {
	if m.lists++; m.lists == 1 {
		<-ctx.Done()
		return nil, "", ctx.Err()
	}
	return m.logbook.Deliveries(ctx, cursor)
}

// One call that GitHub never answers does not end the sweep of deliveries.
func TestSilentCallDoesNotEndTheSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log mute
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		f := newFeed(t, feed.Config{GitHub: &log, Store: newMemory()})
		if err := f.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run ends with %v", err)
		}
		want(t, "listings", log.lists, 5) // at 0 s, given up at 30 s; at 50, 70, 90 and 110 s
	})
}
