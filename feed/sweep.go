package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
)

const (
	// cursorName is the sweep's cursor in the store: the time, as RFC 3339, before which
	// every delivery was applied.
	cursorName = "deliveries"
	// overlap is how far before the cursor a sweep looks again: GitHub's log is not
	// strictly ordered, and entries turn up late in it.
	overlap = 5 * time.Minute
	// deepEvery is how often the whole overlap is looked at; in between, a sweep stops at
	// the first page that brings nothing new.
	deepEvery = time.Minute
	// unknownReach is how far an emptied store is swept when nothing is known of what it
	// held: GitHub drops jobs that were queued for 24 hours.
	unknownReach = 24 * time.Hour
	// logLife is how long GitHub keeps deliveries.
	logLife = 72 * time.Hour
	// receiverTimeout is how long GitHub waits for the answer to a delivery.
	receiverTimeout = 10 * time.Second

	// maxPages of 100 deliveries in one pass: some 15 s with everything to be fetched.
	maxPages = 10
	// fetches are under way at once; GitHub allows 100 in all.
	fetches = 8
	// maxAttempts at a delivery that cannot be fetched, one in a pass: 10 minutes.
	maxAttempts = 30
	// maxApplied is how many GUIDs are remembered, some 4 MB: the overlap of a fleet
	// that starts 100,000 jobs an hour.
	maxApplied = 30_000

	// Deliveries that we answered with 202 are fetched all the same, as long as this
	// leaves enough of the 5,000 requests an hour that an App has.
	verifyPerSecond = 1
	verifyBurst     = 500
)

// sweep goes through the delivery log.
type sweep struct {
	github  GitHub
	store   Store
	news    *news
	log     *slog.Logger
	metrics *metrics

	incarnation string    // that was swept into; "" before the first pass
	cursor      time.Time // everything sent before was applied
	reach       time.Time // how far back an emptied store would be swept; zero: unknown
	doubted     time.Time // a 202 for a delivery sent before is no proof: the store was emptied since
	applied     *applied
	attempts    map[string]int // at deliveries that could not be fetched
	verify      *rate.Limiter

	scan   *scan     // under way; nil: the next pass begins one
	clean  bool      // the last scan was completed and applied everything
	deepAt time.Time // when the whole overlap was last looked at
}

// scan is one way through the log, from the newest delivery back to a floor. It may take
// several passes.
type scan struct {
	floor  time.Time // it ends at the first delivery sent before
	deep   bool      // it does not end at a page without anything new
	next   string    // the page to go on with; "": the first
	passes int       // that it has taken so far
	begun  bool      // its first page was listed
	top    time.Time // the newest delivery when it began
	missed time.Time // the oldest one that could not be applied; zero: none
}

func newSweep(c Config, n *news, m *metrics) *sweep {
	return &sweep{
		github: c.GitHub, store: c.Store, news: n, log: c.Log, metrics: m,
		applied: newApplied(maxApplied), attempts: map[string]int{},
		verify: rate.NewLimiter(verifyPerSecond, verifyBurst),
	}
}

// step does one pass.
func (s *sweep) step(ctx context.Context, now time.Time) (more bool, err error) {
	view, err := s.look(ctx, now)
	if err != nil {
		return false, err
	}
	s.news.mu.Lock()
	s.news.known = map[fleet.JobID]bool{}
	s.news.mu.Unlock()

	if s.scan == nil {
		floor := s.cursor.Add(-overlap)
		if life := now.Add(-logLife); floor.Before(life) {
			floor = life
		}
		s.scan = &scan{floor: floor, deep: !s.clean || now.Sub(s.deepAt) >= deepEvery}
		s.clean = false
	} else if s.scan.next != "" {
		// A long way back is under way: what is new at the top does not wait for its end.
		// What is missed here, the next scan finds again: the cursor stays below.
		head := &scan{floor: s.scan.floor}
		if _, err := s.page(ctx, now, view, head); err != nil {
			return false, fmt.Errorf("sweep deliveries: %w", err)
		}
	}
	s.scan.passes++
	for range maxPages {
		done, err := s.page(ctx, now, view, s.scan)
		if err != nil {
			return false, s.restart(err)
		}
		if done {
			return s.finish(ctx, now)
		}
	}
	return true, nil
}

// look reads the store and the cursor in it, and notices if the store was emptied, or
// was set back to an older state.
func (s *sweep) look(ctx context.Context, now time.Time) (*store.View, error) {
	view, err := s.store.View(ctx)
	if err != nil {
		return nil, fmt.Errorf("sweep deliveries: %w", err)
	}
	text, err := s.store.Cursor(ctx, cursorName)
	if err != nil {
		return nil, fmt.Errorf("sweep deliveries: %w", err)
	}
	cursor, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		cursor = time.Time{} // none, or not ours: as if it were lost
	}
	switch {
	case view.Incarnation != s.incarnation, cursor.Before(s.cursor) && !cursor.IsZero():
		lost := s.incarnation != "" || cursor.IsZero()
		s.applied.clear()
		s.scan, s.clean, s.incarnation = nil, false, view.Incarnation
		s.cursor = cursor
		if lost {
			s.doubted = now
		}
		if cursor.IsZero() {
			s.cursor = s.start(now)
			s.log.InfoContext(ctx, "store is empty: sweeping deliveries again", "since", s.cursor.UTC().Format(time.RFC3339))
		}
	case !cursor.IsZero():
		s.cursor = cursor
		s.reach = reach(view, cursor)
	}
	return view, nil
}

// reach is how far back everything that is open now was told.
func reach(view *store.View, cursor time.Time) time.Time {
	if open := view.OpenJobs(); len(open) > 0 && open[0].CreatedAt.Before(cursor) && !open[0].CreatedAt.IsZero() {
		return open[0].CreatedAt
	}
	return cursor
}

// start is where the sweep of an emptied store begins.
func (s *sweep) start(now time.Time) time.Time {
	if s.reach.IsZero() {
		return now.Add(-unknownReach)
	}
	return s.reach
}

// page lists one page of a scan and applies what is new on it.
func (s *sweep) page(ctx context.Context, now time.Time, view *store.View, sc *scan) (done bool, err error) {
	list, next, err := s.github.Deliveries(ctx, sc.next)
	if err != nil {
		return false, err
	}
	if !sc.begun {
		sc.begun = true
		if len(list) > 0 {
			sc.top = list[0].At
		}
	}
	p := s.pick(list, sc.floor, now)
	if err := s.apply(ctx, now, view, p.fetch, sc); err != nil {
		return false, err
	}
	sc.next = next
	return next == "" || p.atFloor || !p.anyNew && !sc.deep, nil
}

// picked is what a page of the log holds for us.
type picked struct {
	fetch   []github.DeliveryInfo // to be fetched
	anyNew  bool                  // something on it, of whatever kind, was not seen before
	atFloor bool                  // it reaches below the floor
}

// pick looks through a page of the log.
func (s *sweep) pick(page []github.DeliveryInfo, floor, now time.Time) (p picked) {
	twice := map[string]bool{}
	for _, d := range page {
		if d.At.Before(floor) {
			p.atFloor = true
			return p
		}
		key := keyOf(d)
		if s.applied.has(key) || twice[key] {
			continue
		}
		p.anyNew = true
		switch {
		case d.Event != "workflow_job":
			s.applied.add(key)
		case d.StatusCode == 0 && d.Status == "" && now.Sub(d.At) < receiverTimeout:
			// Under way to the webhook: not lost yet.
		case d.StatusCode == http.StatusAccepted && d.At.After(s.doubted) && !s.verify.AllowN(now, 1):
			s.applied.add(key)
			s.metrics.count(fleet.FeedSweep, newsTrusted)
		default:
			twice[key] = true
			p.fetch = append(p.fetch, d)
		}
	}
	return p
}

// keyOf is what a delivery is remembered by.
func keyOf(d github.DeliveryInfo) string {
	if d.GUID == "" {
		return strconv.FormatInt(d.ID, 10)
	}
	return d.GUID
}

// apply fetches and merges deliveries, several at a time. What cannot be fetched is
// noted as missed and does not hold up the rest; a failing store or a limit at GitHub
// does.
func (s *sweep) apply(ctx context.Context, now time.Time, view *store.View, list []github.DeliveryInfo, sc *scan) error {
	errs := make([]error, len(list))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(fetches)
	for i, d := range list {
		group.Go(func() error {
			errs[i] = errNotTried
			if groupCtx.Err() != nil {
				return nil
			}
			errs[i] = s.news.apply(groupCtx, now, view, d)
			if hopeless(errs[i]) {
				return errs[i] // ends the others, too
			}
			return nil
		})
	}
	stop := group.Wait()
	if stop == nil {
		stop = ctx.Err()
	}
	for i, d := range list {
		key := keyOf(d)
		switch {
		case errs[i] == nil:
			s.applied.add(key)
			delete(s.attempts, key)
		case stop == nil:
			s.miss(ctx, d, sc, errs[i])
		}
	}
	return stop
}

// errNotTried is the outcome of a delivery that was not come to.
var errNotTried = errors.New("not tried")

// hopeless errors would meet the next delivery as well.
func hopeless(err error) bool {
	var limited *github.RateLimited
	return errors.Is(err, errStore) || errors.As(err, &limited)
}

// miss notes a delivery that could not be applied: the cursor waits for it, but not for
// ever.
func (s *sweep) miss(ctx context.Context, d github.DeliveryInfo, sc *scan, err error) {
	key := keyOf(d)
	s.attempts[key]++
	if s.attempts[key] >= maxAttempts {
		s.log.ErrorContext(ctx, "delivery given up", "delivery", d.GUID, "attempts", s.attempts[key], "error", err)
		s.metrics.count(fleet.FeedSweep, newsGivenUp)
		s.applied.add(key)
		delete(s.attempts, key)
		return
	}
	if s.attempts[key] == 1 {
		s.log.WarnContext(ctx, "delivery cannot be fetched, trying again", "delivery", d.GUID, "error", err)
	}
	if sc.missed.IsZero() || d.At.Before(sc.missed) {
		sc.missed = d.At
	}
}

// restart lets a scan whose listing failed begin at the top again, unless it was a limit
// or the store, after which it goes on where it was: GitHub's page cursors do not live
// for ever. Nothing is fetched twice for that.
func (s *sweep) restart(err error) error {
	if !hopeless(err) {
		s.scan = nil
	}
	return fmt.Errorf("sweep deliveries: %w", err)
}

// finish moves the cursor to where the scan began, or to the oldest delivery that it
// missed.
func (s *sweep) finish(ctx context.Context, now time.Time) (more bool, err error) {
	sc := s.scan
	to := s.cursor
	if sc.top.After(to) {
		to = sc.top
	}
	if !sc.missed.IsZero() && sc.missed.Before(to) {
		to = sc.missed
	}
	if to.Before(s.cursor) {
		to = s.cursor
	}
	err = s.store.SetCursor(ctx, cursorName, to.UTC().Format(time.RFC3339Nano))
	s.scan = nil
	if errors.Is(err, store.ErrFenced) {
		return true, nil // the store was emptied meanwhile: the next pass goes back
	}
	if err != nil {
		return false, fmt.Errorf("sweep deliveries: %w", err)
	}
	// Only a log that was seen in one go has nothing new below a page without news.
	s.cursor, s.clean = to, sc.missed.IsZero() && sc.passes == 1
	if sc.deep {
		s.deepAt = now
	}
	if sc.missed.IsZero() {
		clear(s.attempts)
	}
	s.metrics.cursor.Set(float64(to.Unix()))
	return false, nil
}
