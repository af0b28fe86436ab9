package demand

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"
)

// The cast: acme/app has a job "build" of about ten minutes and a matrix "test (1)",
// "test (2)" of about four; acme/tool has run nothing yet.
var monday = time.Date(2026, 6, 1, 8, 0, 0, 0, time.UTC)

func history() *Durations {
	d := New(Config{})
	for i := range 10 {
		d.Observe("acme/app", "build", 10*time.Minute, monday.Add(time.Duration(i)*time.Hour))
		d.Observe("acme/app", fmt.Sprintf("test (%d)", i%2+1), 4*time.Minute, monday.Add(time.Duration(i)*time.Hour))
	}
	return d
}

func TestEstimateFallsBack(t *testing.T) {
	for _, c := range []struct {
		repository, name string
		mean             time.Duration
		basis            Basis
	}{
		{"acme/app", "build", 10 * time.Minute, BasisJob},
		{"ACME/App", "build", 10 * time.Minute, BasisJob}, // GitHub compares repositories without case
		{"acme/app", "test (1)", 4 * time.Minute, BasisJob},
		{"acme/app", "test (3)", 4 * time.Minute, BasisMatrix},
		{"acme/app", "test", 4 * time.Minute, BasisMatrix},
	} {
		e, ok := history().Estimate(c.repository, c.name)
		if !ok || e.Basis != c.basis || (e.Mean-c.mean).Abs() > time.Millisecond || e.Spread != 0 {
			t.Errorf("%s %q: got %+v, %v; want %v by %s", c.repository, c.name, e, ok, c.mean, c.basis)
		}
	}
	for repository, basis := range map[string]Basis{"acme/app": BasisRepository, "acme/tool": BasisFleet} {
		e, ok := history().Estimate(repository, "deploy")
		if !ok || e.Basis != basis || e.Mean <= 4*time.Minute || e.Mean >= 10*time.Minute || e.Spread == 0 {
			t.Errorf("%s deploy: got %+v, %v; want a mean between the jobs', with a spread, by %s", repository, e, ok, basis)
		}
	}
	if d, ok := New(Config{}).Predict("acme/app", "build"); ok {
		t.Errorf("without history: got %v, want not known", d)
	}
}

// A job that gets slower is known again after a few runs; the first ones weigh alike.
func TestRecentRunsCountMore(t *testing.T) {
	d := New(Config{})
	d.Observe("a/b", "j", 2*time.Minute, monday)
	d.Observe("a/b", "j", 4*time.Minute, monday)
	if got, _ := d.Predict("a/b", "j"); got != 3*time.Minute {
		t.Errorf("after two runs: got %v, want their plain mean", got)
	}
	for range 12 {
		d.Observe("a/b", "j", 20*time.Minute, monday)
	}
	if got, _ := d.Predict("a/b", "j"); got < 18*time.Minute || got > 20*time.Minute {
		t.Errorf("after twelve slow runs: got %v, want nearly 20m", got)
	}
}

func TestImpossibleDurationsSayNothing(t *testing.T) {
	d := New(Config{})
	for _, ran := range []time.Duration{0, -time.Second, 6 * 24 * time.Hour} {
		d.Observe("a/b", "j", ran, monday)
	}
	if d.Len() != 0 {
		t.Errorf("got %d names, want none", d.Len())
	}
}

// Names are chosen in workflow files: a job that invents a new one for every run must
// not grow the memory, nor push out what still runs.
func TestBoundedOldestOut(t *testing.T) {
	d := New(Config{MaxKeys: 100})
	for i := range 1000 {
		at := monday.Add(time.Duration(i) * time.Minute)
		d.Observe("a/b", fmt.Sprintf("run %d", i), time.Minute, at)
		d.Observe("a/b", "steady", 7*time.Minute, at)
		if d.Len() > 100 {
			t.Fatalf("after %d runs: %d names, want at most 100", i+1, d.Len())
		}
	}
	if e, _ := d.Estimate("a/b", "steady"); e.Basis != BasisJob || e.Runs != 1000 {
		t.Errorf("the steady job: got %+v, want its own history", e)
	}
	if e, _ := d.Estimate("a/b", "run 1"); e.Basis != BasisRepository {
		t.Errorf("the oldest job: got %+v, want it forgotten", e)
	}
	d.Observe("a/b", strings.Repeat("ü", 10_000), time.Minute, monday.Add(time.Hour*999))
	for k := range d.keys {
		if len(k.name) > maxName {
			t.Errorf("a name of %d bytes was kept", len(k.name))
		}
	}
}

func TestSaveAndLoad(t *testing.T) {
	var saved, again bytes.Buffer
	if err := history().Save(&saved, NewImages()); err != nil {
		t.Fatal(err)
	}
	d := New(Config{})
	if err := d.Load(bytes.NewReader(saved.Bytes()), NewImages()); err != nil {
		t.Fatal(err)
	}
	if err := d.Save(&again, NewImages()); err != nil {
		t.Fatal(err)
	}
	if saved.String() != again.String() {
		t.Errorf("saved, loaded and saved again:\n%s\nwant\n%s", &again, &saved)
	}
	want, _ := history().Predict("acme/app", "test (2)")
	if got, ok := d.Predict("acme/app", "test (2)"); !ok || got != want {
		t.Errorf("after loading: got %v, want %v", got, want)
	}
	small := New(Config{MaxKeys: 3})
	if err := small.Load(bytes.NewReader(saved.Bytes()), NewImages()); err != nil || small.Len() > 3 {
		t.Errorf("into a smaller bound: %d names, %v", small.Len(), err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"empty":       {"", "EOF"},
		"not JSON":    {"durations", "invalid character"},
		"version":     {`{"version":2}`, "version 2"},
		"no version":  {`{}`, "version 0"},
		"negative":    {`{"version":1,"durations":[{"mean_s":-1,"runs":1}]}`, "row 1"},
		"no runs":     {`{"version":1,"durations":[{"mean_s":1}]}`, "row 1"},
		"a long time": {`{"version":1,"durations":[{"mean_s":1e300,"runs":1}]}`, "row 1"},
	} {
		d := history()
		if err := d.Load(strings.NewReader(c.in), NewImages()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
		if _, ok := d.Predict("acme/app", "build"); !ok {
			t.Errorf("%s: the old history is gone", name)
		}
	}
}

// The file lies on disk between versions of the program and may be cut or edited:
// loading never panics, and what is loaded can be used and saved.
func FuzzLoad(f *testing.F) {
	var saved bytes.Buffer
	if err := history().Save(&saved, NewImages()); err != nil {
		f.Fatal(err)
	}
	f.Add(saved.Bytes())
	f.Add([]byte(`{"version":1,"durations":[{"repository":"a/b","name":"\ud800","mean_s":1,"runs":1,"at":"2026-06-01T08:00:00Z"}]}`))
	f.Add([]byte(`{"version":1,"durations":[{"mean_s":1,"runs":9223372036854775807}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d := New(Config{MaxKeys: 10})
		if d.Load(bytes.NewReader(data), NewImages()) != nil {
			return
		}
		if d.Len() > 11 {
			t.Errorf("loaded %d names into a bound of 10", d.Len())
		}
		d.Observe("a/b", "j", time.Minute, monday)
		if ran, ok := d.Predict("a/b", "j"); !ok || ran < 0 || ran > maxDuration {
			t.Errorf("predicted %v, %v", ran, ok)
		}
		var out bytes.Buffer
		if err := d.Save(&out, NewImages()); err != nil {
			t.Error(err)
		}
	})
}
