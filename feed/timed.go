package feed

import (
	"context"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
)

// callTimeout bounds one call of GitHub, which takes a second at most when all is well:
// a connection that falls silent must not end the recovery of lost webhooks.
const callTimeout = 30 * time.Second

// timed is a GitHub that answers or fails within callTimeout.
type timed struct{ next GitHub }

func (t timed) Deliveries(ctx context.Context, cursor string) (page []github.DeliveryInfo, next string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return t.next.Deliveries(ctx, cursor)
}

func (t timed) Delivery(ctx context.Context, id int64) (info github.DeliveryInfo, payload []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return t.next.Delivery(ctx, id)
}

func (t timed) Job(ctx context.Context, repository string, id fleet.JobID) (fleet.Job, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return t.next.Job(ctx, repository, id)
}
