package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/runner/guest"
)

// client finds the controller: --url with PADDOCK_TOKEN, or what the controller on this
// host left in its data directory.
func (g *globals) client() (*api.Client, error) {
	url, token := g.url, os.Getenv("PADDOCK_TOKEN")
	if url == "" && token != "" {
		url = os.Getenv("PADDOCK_URL") // without a token it is the configuration's overlay
	}
	if url != "" {
		if token == "" {
			return nil, errors.New("--url needs a token in PADDOCK_TOKEN (hint: on the controller: paddock token create NAME --role viewer)")
		}
		return api.New(api.Config{URL: url, Token: token, CertificateHash: os.Getenv("PADDOCK_CERTIFICATE")})
	}
	c, err := g.load()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(c.Data, parts.CLIFile)
	endpoint, err := parts.ReadEndpoint(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("no controller has run on this host with data in %s (hint: paddock up starts one; --config or PADDOCK_DATA names another directory; --url another host)", c.Data)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s belongs to another user (hint: run as the controller's user, or use --url with a token of your own)", path)
	case err != nil:
		return nil, err
	}
	return endpoint.Client()
}

// column is one column of a table; wide ones are shown by -o wide only.
type column[T any] struct {
	title string
	wide  bool
	text  func(T) string
}

// maxCell bounds one cell of a table in bytes: a reason has 2,000 of them at most.
const maxCell = 4 << 10

// show prints rows as the output flag says. An empty list is a table of its titles, and
// an empty JSON array. Whatever a cell repeats of a guest's words makes no rows and moves
// no cursor.
func show[T any](cmd *cobra.Command, g *globals, rows []T, columns []column[T]) error {
	w := cmd.OutOrStdout()
	if g.output == "json" {
		if rows == nil {
			rows = []T{}
		}
		return writeJSON(w, rows)
	}
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	line := func(text func(column[T]) string) {
		var cells []string
		for _, c := range columns {
			if !c.wide || g.output == "wide" {
				cells = append(cells, or(guest.Plain(text(c), maxCell), "-"))
			}
		}
		_, _ = fmt.Fprintln(table, strings.Join(cells, "\t")) // reported by Flush
	}
	line(func(c column[T]) string { return c.title })
	for _, row := range rows {
		line(func(c column[T]) string { return c.text(row) })
	}
	return table.Flush()
}

func writeJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// count is a number of things.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// size is a number of bytes for people, in the decimal units of disks.
func size(bytes int64) string {
	if bytes <= 0 {
		return ""
	}
	value, unit := float64(bytes), 0
	units := []string{"B", "kB", "MB", "GB", "TB"}
	for value >= 999.5 && unit < len(units)-1 {
		value, unit = value/1000, unit+1
	}
	if unit == 0 || value >= 100 {
		return fmt.Sprintf("%.0f %s", value, units[unit])
	}
	return fmt.Sprintf("%.1f %s", value, units[unit])
}

// ago is how long something is past.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return short(time.Since(t))
}

// short is a duration with one unit: 850ms, 12s, 7m, 3h, 4d.
func short(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < 100*time.Second:
		return fmt.Sprintf("%.0fs", d.Seconds())
	case d < 100*time.Minute:
		return fmt.Sprintf("%.0fm", d.Minutes())
	case d < 48*time.Hour:
		return fmt.Sprintf("%.0fh", d.Hours())
	default:
		return fmt.Sprintf("%.0fd", d.Hours()/24)
	}
}
