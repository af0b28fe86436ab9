package githubtest

import (
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// Faults is the weather at the simulated GitHub. The zero value is fair weather.
type Faults struct {
	// Delivery says what becomes of a webhook; nil: it is delivered at once. It is
	// called with the simulation locked: it must not call back.
	Delivery func(Delivery) Fate
	// Request says what becomes of a REST request; nil: it is answered. It must not call back.
	Request func(*http.Request) RequestFault
}

// Fate is what becomes of one webhook.
type Fate struct {
	// Drop: it is never sent; the delivery log shows it as failed.
	Drop bool
	// Silent: with Drop, the delivery log shows it as delivered all the same.
	Silent bool
	// Delay before it is sent, which also lets later ones overtake it.
	Delay time.Duration
	// Copies are sent besides, with the same GUID.
	Copies int
	// Installation is written into the payload instead of the true id; 0: the true id.
	Installation int64
}

// RequestFault is what becomes of one REST request.
type RequestFault struct {
	// Status to answer, without doing anything, for instance 403 or 429 as a secondary
	// limit, or 502; 0: the request is served.
	Status int
	// RetryAfter is sent along, in whole seconds; 0: no such header.
	RetryAfter time.Duration
	// Exhausted: with Status, the primary limit: nothing remains until Reset.
	Exhausted bool
	Reset     time.Time
	// Lose does the work and then cuts the connection instead of answering.
	Lose bool
}

// SetFaults changes the weather.
func (g *GitHub) SetFaults(f Faults) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.weather = f
}

// Storm is bad weather by chance. Each probability is between 0 and 1.
type Storm struct {
	Seed   uint64  // the same seed, the same weather
	Drop   float64 // of a delivery that never arrives
	Double float64 // of a delivery that arrives twice
	Late   float64 // of a delivery that is late, and so out of order
	// Delay is the most that a late one waits; 0: 100 ms.
	Delay time.Duration
}

// Faults makes a weather of the storm.
func (s Storm) Faults() Faults {
	var mu sync.Mutex
	random := rand.New(rand.NewPCG(s.Seed, 0))
	most := s.Delay
	if most == 0 {
		most = 100 * time.Millisecond
	}
	return Faults{Delivery: func(Delivery) Fate {
		mu.Lock()
		defer mu.Unlock()
		var f Fate
		f.Drop = random.Float64() < s.Drop
		if random.Float64() < s.Double {
			f.Copies = 1
		}
		if random.Float64() < s.Late {
			f.Delay = time.Duration(random.Int64N(int64(most)) + 1)
		}
		return f
	}}
}

// Once makes a fault that strikes the first n requests that match and no other.
func Once(n int, matches func(*http.Request) bool, fault RequestFault) Faults {
	var mu sync.Mutex
	return Faults{Request: func(r *http.Request) RequestFault {
		mu.Lock()
		defer mu.Unlock()
		if n <= 0 || !matches(r) {
			return RequestFault{}
		}
		n--
		return fault
	}}
}
