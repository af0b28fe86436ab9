package demand

import (
	"math"
	"slices"
	"strings"
	"time"
)

const (
	// halfLife is after how long a job counts half: long enough that a night does not let a
	// busy image look unused, short enough that one that is given up goes within days.
	halfLife = 24 * time.Hour
	// maxImages bounds what is remembered; more than a configuration has pools.
	maxImages = 1000
	// leastRate, in jobs per hour, is one job ten days ago: nothing any more.
	leastRate = 3e-5
	// maxRate is more jobs per hour than GitHub lets anybody queue.
	maxRate = 1e6
)

// rate is an exponentially weighted mean of jobs per hour, as it was at at.
type rate struct {
	perHour float64
	at      time.Time
}

// after is the mean at a time, if nothing more came; it only ever falls.
func (r rate) after(at time.Time) float64 {
	return r.perHour * math.Exp2(-max(0, at.Sub(r.at).Hours())/halfLife.Hours())
}

// Images remembers how often jobs ask for each image, by its reference: a tag that moves
// takes its demand along. It is for one goroutine at a time.
type Images struct{ rates map[string]rate }

// NewImages returns one without any history.
func NewImages() *Images { return &Images{rates: map[string]rate{}} }

// Observe records that a job that needs the image was queued at at. Jobs may come in any
// order.
func (i *Images) Observe(ref string, at time.Time) {
	ref = cut(ref)
	r, one := i.rates[ref], math.Ln2/halfLife.Hours()
	if at.Before(r.at) {
		r.perHour += rate{one, at}.after(r.at)
	} else {
		r = rate{r.after(at) + one, at}
	}
	r.perHour = min(maxRate, r.perHour)
	i.rates[ref] = r
	i.forget()
}

// Rate is the mean of jobs per hour that ask for an image; 0: none, or not known.
func (i *Images) Rate(ref string, now time.Time) float64 {
	if perHour := i.rates[cut(ref)].after(now); perHour >= leastRate {
		return perHour
	}
	return 0
}

// Latest is when the latest job that was observed was queued; zero without any history.
func (i *Images) Latest() time.Time {
	var latest time.Time
	for _, r := range i.rates {
		if r.at.After(latest) {
			latest = r.at
		}
	}
	return latest
}

// forget drops the images not asked for longest.
func (i *Images) forget() {
	if len(i.rates) <= maxImages {
		return
	}
	refs := i.sorted()
	slices.SortStableFunc(refs, func(a, b string) int { return i.rates[a].at.Compare(i.rates[b].at) })
	for _, ref := range refs[:len(refs)-maxImages] {
		delete(i.rates, ref)
	}
}

// sorted are the references in order.
func (i *Images) sorted() []string {
	refs := make([]string, 0, len(i.rates))
	for ref := range i.rates {
		refs = append(refs, ref)
	}
	slices.SortFunc(refs, strings.Compare)
	return refs
}
