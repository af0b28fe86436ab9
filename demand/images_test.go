package demand

import (
	"bytes"
	"fmt"
	"math"
	"testing"
	"time"
)

// One image is asked for by one job an hour, on and on; another was, once.
func TestRates(t *testing.T) {
	i, now := NewImages(), monday
	i.Observe("once", now)
	for range 20 * 24 {
		now = now.Add(time.Hour)
		i.Observe("hourly", now)
	}
	if r := i.Rate("hourly", now); math.Abs(r-1) > 0.05 {
		t.Errorf("one job an hour is taken for %v", r)
	}
	if half, full := i.Rate("hourly", now.Add(halfLife)), i.Rate("hourly", now); math.Abs(half-full/2) > 1e-9 {
		t.Errorf("%v after a half-life without jobs; it was %v", half, full)
	}
	if once, never := i.Rate("once", now), i.Rate("never", now); once != 0 || never != 0 {
		t.Errorf("asked for 20 days ago: %v; never: %v", once, never)
	}
	later, sooner := NewImages(), NewImages()
	for k := range 10 {
		later.Observe("i", monday.Add(time.Duration(k)*time.Hour))
		sooner.Observe("i", monday.Add(time.Duration(9-k)*time.Hour))
	}
	if a, b := later.Rate("i", monday.Add(halfLife)), sooner.Rate("i", monday.Add(halfLife)); math.Abs(a-b) > 1e-12 || a == 0 {
		t.Errorf("the order in which jobs are told of matters: %v and %v", a, b)
	}
}

func TestRatesAreKept(t *testing.T) {
	i := NewImages()
	for k := range maxImages + 5 {
		i.Observe(fmt.Sprintf("image-%d", k), monday.Add(time.Duration(k)*time.Minute))
	}
	end := i.Latest()
	if i.Rate("image-0", end) != 0 || i.Rate("image-9", end) == 0 {
		t.Error("not the ones asked for longest ago are forgotten")
	}
	var saved bytes.Buffer
	if err := history().Save(&saved, i); err != nil {
		t.Fatal(err)
	}
	loaded := NewImages()
	if err := New(Config{}).Load(bytes.NewReader(saved.Bytes()), loaded); err != nil {
		t.Fatal(err)
	}
	if got, want := loaded.Rate("image-99", end), i.Rate("image-99", end); got != want || !loaded.Latest().Equal(end) {
		t.Errorf("%v until %v after loading; want %v until %v", got, loaded.Latest(), want, end)
	}
	for _, bad := range []string{`-1`, `1e300`} {
		in := `{"version":1,"images":[{"ref":"i","jobs_per_hour":` + bad + `}]}`
		if err := New(Config{}).Load(bytes.NewReader([]byte(in)), loaded); err == nil || loaded.Rate("image-99", end) == 0 {
			t.Errorf("%s jobs an hour: %v", bad, err)
		}
	}
}
