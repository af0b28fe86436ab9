package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// progress shows how far something is: a bar on a terminal; else, for a log, a line for
// every tenth part and every ten seconds; or lines of JSON. It is safe for concurrent use.
type progress struct {
	name  string
	bytes bool // done and total are bytes, and are told with a rate

	mu     sync.Mutex
	step   step
	meter  rateMeter
	shown  int       // tenths that have had their line; -1: none
	next   time.Time // when a line is due whatever has moved
	ended  bool
	lines  io.Writer // of text; nil: none
	json   io.Writer // nil: none
	screen *mpb.Progress
	bar    *mpb.Bar
}

// step is where something stands; it is a line of --json.
type step struct {
	State string  `json:"state"`
	Ref   string  `json:"ref,omitempty"`
	Done  int64   `json:"done"`  // bytes: of a pull on the wire, with those in flight; of a push of the disk
	Total int64   `json:"total"` // 0: not known yet
	Rate  int64   `json:"rate"`  // bytes per second, lately; 0: not known
	ETA   float64 `json:"eta"`   // seconds left at that rate; 0: not known
}

// lineEvery is how long a log or a reader of JSON waits for a line at most, while bytes move.
const (
	lineEvery = 10 * time.Second
	jsonEvery = time.Second
)

// barWidth is that of the bar alone, in columns, so that it fits a terminal of 80 with what
// is said beside it.
const barWidth = 24

// unit is what a progress counts.
type unit int

const (
	inBytes unit = iota // told with a rate
	inParts             // of something that has no measure of its own
)

// newProgress shows people on w how far name is.
func newProgress(w io.Writer, name string, counts unit) *progress {
	p := &progress{name: name, bytes: counts == inBytes, shown: -1}
	if drawable(w) {
		p.screen = mpb.New(mpb.WithOutput(w), mpb.WithWidth(barWidth), mpb.WithRefreshRate(200*time.Millisecond))
	} else {
		p.lines = w
	}
	return p
}

// newSteps tells programs, in lines on out, how far ref is.
func newSteps(out io.Writer, ref string) *progress {
	return &progress{shown: -1, step: step{Ref: ref}, json: out}
}

// progress is for a command whose JSON is one document: people see how far it is, and
// programs wait.
func (g *globals) progress(cmd *cobra.Command, name string, counts unit) *progress {
	if g.output == "json" {
		return &progress{}
	}
	return newProgress(cmd.ErrOrStderr(), name, counts)
}

// steps is for a command whose JSON is lines.
func (g *globals) steps(cmd *cobra.Command, ref string) *progress {
	if g.output == "json" {
		return newSteps(cmd.OutOrStdout(), ref)
	}
	return newProgress(cmd.ErrOrStderr(), ref, inBytes)
}

// drawable reports whether w is a terminal with room for a bar; one of no size is a
// program's that only looks like a terminal.
func drawable(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0 && height > 0
}

// begin says what is going on, at how much; a line of JSON for each.
func (p *progress) begin(state string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.step.State == state {
		return
	}
	p.step.State = state
	p.emit()
}

// finish tells that it is in its last state; there may have been no other.
func (p *progress) finish(state string, total int64) {
	p.mu.Lock()
	p.step.State = state
	p.mu.Unlock()
	p.tell(total, total)
}

// tell is called as often as there is something to tell.
func (p *progress) tell(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.meter.add(now, done)
	p.step.Done, p.step.Total = done, total
	rate := p.meter.rate(now)
	p.step.Rate, p.step.ETA = int64(rate), 0
	if rate > 0 && total > done {
		p.step.ETA = float64(total-done) / rate
	}
	if p.ended || total <= 0 {
		return
	}
	if p.screen != nil {
		p.draw()
		return
	}
	tenth := int(10 * done / total)
	if tenth > p.shown || !now.Before(p.next) {
		p.shown = max(tenth, p.shown)
		p.emit()
	}
}

// at is what was told last.
func (p *progress) at() (done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.step.Done, p.step.Total
}

// draw moves the bar, which begins to exist here; p.mu is held.
func (p *progress) draw() {
	if p.bar == nil {
		style := mpb.BarStyle().Lbound("[").Filler("#").Tip("#").Padding(" ").Rbound("]")
		p.bar = p.screen.New(0, style, // of an open end: it is end that completes it
			mpb.PrependDecorators(decor.Name(shorten(p.name, 24)+" ")),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string {
				p.mu.Lock()
				defer p.mu.Unlock()
				return " " + p.text()
			})))
	}
	bar, done, total := p.bar, p.step.Done, p.step.Total
	// The bar draws itself in a goroutine that asks for p.text.
	p.mu.Unlock()
	bar.SetTotal(total, false)
	bar.SetCurrent(min(done, total))
	p.mu.Lock()
}

// emit writes a line; p.mu is held.
func (p *progress) emit() {
	switch {
	case p.json != nil:
		p.next = time.Now().Add(jsonEvery)
		line := p.step
		line.ETA = math.Round(10*line.ETA) / 10
		_ = json.NewEncoder(p.json).Encode(line) // a reader that has gone ends nothing here
	case p.lines != nil && p.step.Total > 0:
		p.next = time.Now().Add(lineEvery)
		if p.bytes {
			fmt.Fprintf(p.lines, "%s: %s\n", p.name, p.text())
		} else {
			fmt.Fprintln(p.lines, p.text())
		}
	}
}

// text is where it stands, for people; p.mu is held.
func (p *progress) text() string {
	if p.step.Total <= 0 {
		return p.step.State
	}
	s := fmt.Sprintf("%d%%", 100*p.step.Done/p.step.Total)
	if p.bytes {
		s += fmt.Sprintf(", %s of %s", or(size(p.step.Done), "0 B"), size(p.step.Total))
		if p.step.Rate > 0 && p.step.Done < p.step.Total {
			s += fmt.Sprintf(", %s/s", size(p.step.Rate))
		}
	}
	if p.step.ETA > 0 && p.step.Done > 0 {
		s += ", about " + short(time.Duration(p.step.ETA*float64(time.Second))) + " left"
	}
	return s
}

// end leaves the terminal's line as it is; tell and end do nothing from then on.
func (p *progress) end() {
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	p.ended = true
	screen, bar, whole := p.screen, p.bar, p.step.Done >= p.step.Total
	p.mu.Unlock()
	if screen == nil {
		return
	}
	switch {
	case bar == nil:
	case whole:
		bar.SetTotal(-1, true)
	default:
		bar.Abort(false) // and it stays on the screen as it is
	}
	screen.Wait()
}

// shorten keeps the end of a name, which tells images apart.
func shorten(name string, most int) string {
	if len(name) <= most {
		return name
	}
	return "..." + name[len(name)-most+3:]
}

// rateMeter smooths how fast a count grows.
type rateMeter struct {
	start, last    time.Time // of the first count and of the last sample
	from, at, here int64     // the counts then, and now
	smooth         float64   // per second; 0: no sample yet
}

const (
	// meterSample is the least time that makes a sample, and meterWeight what a new one
	// counts: after ten seconds or so a changed rate is believed.
	meterSample = time.Second
	meterWeight = 0.2
)

func (m *rateMeter) add(now time.Time, count int64) {
	if m.start.IsZero() || count < m.here { // what turned out bad is taken back
		*m = rateMeter{start: now, last: now, from: count, at: count, here: count}
		return
	}
	m.here = count
	spent := now.Sub(m.last)
	if spent < meterSample {
		return
	}
	sample := float64(count-m.at) / spent.Seconds()
	if m.smooth == 0 {
		m.smooth = sample
	} else {
		m.smooth += meterWeight * (sample - m.smooth)
	}
	m.last, m.at = now, count
}

// rate is per second; before the first sample, what there was since the start.
func (m *rateMeter) rate(now time.Time) float64 {
	if spent := now.Sub(m.start).Seconds(); m.smooth == 0 && spent > 0 {
		return float64(m.here-m.from) / spent
	}
	return m.smooth
}
