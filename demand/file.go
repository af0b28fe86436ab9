package demand

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"time"
)

// version of the saved form; another one is refused rather than misread.
const version = 1

// file is the saved form. Rows are sorted, so equal histories are equal bytes.
type file struct {
	Version   int        `json:"version"`
	Durations []row      `json:"durations"`
	Images    []imageRow `json:"images,omitempty"`
}

// imageRow is how often an image was asked for.
type imageRow struct {
	Ref     string    `json:"ref"`
	PerHour float64   `json:"jobs_per_hour"`
	At      time.Time `json:"at"`
}

// row is one accumulator. Without a name it is the repository's, without a repository
// the fleet's.
type row struct {
	Repository string    `json:"repository,omitempty"`
	Name       string    `json:"name,omitempty"`
	Matrix     bool      `json:"matrix,omitempty"`
	Mean       float64   `json:"mean_s"`                // seconds
	Variance   float64   `json:"variance_s2,omitempty"` // seconds squared
	Runs       int       `json:"runs"`
	At         time.Time `json:"at"`
}

// Save writes the history as JSON, with that of images beside it.
func (d *Durations) Save(w io.Writer, images *Images) error {
	f := file{Version: version, Durations: make([]row, 0, len(d.keys))}
	for _, k := range d.sorted() {
		a := d.keys[k]
		f.Durations = append(f.Durations, row{k.repository, k.name, k.matrix, a.mean, a.variance, a.n, a.at})
	}
	for _, ref := range images.sorted() {
		f.Images = append(f.Images, imageRow{ref, images.rates[ref].perHour, images.rates[ref].at})
	}
	if err := json.NewEncoder(w).Encode(f); err != nil {
		return fmt.Errorf("saving durations: %w", err)
	}
	return nil
}

// Load replaces the history by a saved one, and that of images; on an error both are left
// as they were. Rows beyond the bound are forgotten, the oldest first.
func (d *Durations) Load(r io.Reader, images *Images) error {
	var f file
	if err := json.NewDecoder(r).Decode(&f); err != nil {
		return fmt.Errorf("loading durations: %w", err)
	}
	if f.Version != version {
		return fmt.Errorf("loading durations: version %d, this program reads %d; move the file away to start without history", f.Version, version)
	}
	keys := make(map[key]*accumulator, len(f.Durations))
	for i, r := range f.Durations {
		if r.Runs < 1 || !within(r.Mean, maxDuration.Seconds()) || !within(r.Variance, math.Pow(maxDuration.Seconds(), 2)) {
			return fmt.Errorf("loading durations: row %d (%s %s) has impossible figures", i+1, r.Repository, r.Name)
		}
		keys[key{cut(r.Repository), cut(r.Name), r.Matrix}] = &accumulator{r.Mean, r.Variance, r.Runs, r.At}
	}
	rates := make(map[string]rate, len(f.Images))
	for i, r := range f.Images {
		if !within(r.PerHour, maxRate) {
			return fmt.Errorf("loading demand: row %d (%.100s) has impossible figures", i+1, r.Ref)
		}
		rates[cut(r.Ref)] = rate{r.PerHour, r.At}
	}
	d.keys, images.rates = keys, rates
	d.forget()
	images.forget()
	return nil
}

// within reports whether v is a number from 0 to limit.
func within(v, limit float64) bool { return v >= 0 && v <= limit }
