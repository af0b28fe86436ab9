//go:build linux

package imagebench

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/image"
)

// pulled is the last line of "paddock image pull --json".
type pulled struct {
	State string `json:"state"`
	Disk  string `json:"disk"`
}

// pull pulls with the product's program into a store.
func pull(tb testing.TB, ref, store string) (cost, string) {
	tb.Helper()
	paddock, err := program()
	if err != nil {
		tb.Fatal(err)
	}
	c := measure(tb, paddock, "image", "pull", ref, "--store", store, "--json")
	lines := strings.Split(strings.TrimSpace(c.out), "\n")
	var p pulled
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &p); err != nil || p.State != "ready" {
		tb.Fatalf("%v: %s", err, c.out)
	}
	return c, p.Disk
}

// images makes the images once for a benchmark.
func images(tb testing.TB, mib, chunk int64) (dir string, m *image.Manifest) {
	tb.Helper()
	dir = tb.TempDir()
	role(tb, "make", dir, strconv.FormatInt(mib, 10), strconv.FormatInt(chunk, 10))
	m, err := readImage(dir, base)
	if err != nil {
		tb.Fatal(err)
	}
	return dir, m
}

// scratch is a directory for one round.
func scratch(tb testing.TB) (dir string, remove func()) {
	tb.Helper()
	dir, err := os.MkdirTemp(tb.TempDir(), "")
	if err != nil {
		tb.Fatal(err)
	}
	return dir, func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Fatal(err)
		}
	}
}

// median of what a cost is looked at for.
func median(costs []cost, of func(cost) float64) float64 {
	values := make([]float64, len(costs))
	for i, c := range costs {
		values[i] = of(c)
	}
	slices.Sort(values)
	return values[len(values)/2]
}

func wall(c cost) float64    { return c.wall.Seconds() }
func user(c cost) float64    { return c.user.Seconds() }
func system(c cost) float64  { return c.system.Seconds() }
func rss(c cost) float64     { return float64(c.rss) / (1 << 20) }
func written(c cost) float64 { return float64(c.written) / (1 << 20) }

// BenchmarkPull is a pull into an empty store, beside "crane pull" (to its tarball, and to
// an OCI layout, which it fetches in parallel) and a checked, sparse decode of what came;
// and beside that decode alone. The ways take turns; figures are medians. MiB of disk and
// of wire say what was moved.
//
// Disk traffic is what was written, and for crane's ways what was read of it again: the
// blobs, whether the page cache had them or not.
func BenchmarkPull(b *testing.B) {
	if _, err := program(); err != nil {
		b.Fatal(err)
	}
	dir, m := images(b, *diskMiB, *chunkMiB)
	host := serve(b, dir, 0)
	ways := []string{"ours", "tarball", "oci", "alone"}
	costs := map[string][]cost{}
	for b.Loop() {
		for range *rounds {
			for _, way := range ways {
				costs[way] = append(costs[way], pullBy(b, way, dir, host, m, len(costs[way]) == 0))
			}
		}
	}
	for _, way := range ways {
		c := costs[way]
		b.ReportMetric(median(c, wall), way+"-s")
		b.ReportMetric(median(c, user), way+"-user-s")
		b.ReportMetric(median(c, system), way+"-sys-s")
		b.ReportMetric(median(c, rss), way+"-rss-MiB")
		b.ReportMetric(median(c, written), way+"-written-MiB")
	}
	wire := float64(m.Bytes()) / (1 << 20)
	ours := costs["ours"]
	for _, way := range []string{"tarball", "oci"} {
		b.ReportMetric(median(costs[way], wall)/median(ours, wall), way+"/ours-wall")
		b.ReportMetric(median(ours, written)/(median(costs[way], written)+wire), "ours/"+way+"-disk")
		b.ReportMetric(median(ours, written)/median(costs[way], written), "ours/"+way+"-written")
	}
	b.ReportMetric(median(ours, user)/median(costs["alone"], user), "ours/alone-user")
	b.ReportMetric(float64(m.DiskSize)/(1<<20), "disk-MiB")
	b.ReportMetric(wire, "wire-MiB")
	b.ReportMetric(0, "ns/op") // of all ways together: it says nothing
}

// pullBy moves the image once, and looks whether it did, if asked to: that takes as long.
func pullBy(tb testing.TB, way, dir string, host served, m *image.Manifest, check bool) cost {
	tb.Helper()
	to, remove := scratch(tb)
	defer remove()
	var c cost
	var disk string
	switch way {
	case "ours":
		c, disk = pull(tb, host.ref(base), filepath.Join(to, "store"))
	case "alone":
		return role(tb, "decode", dir, base)
	default:
		c, disk = role(tb, "crane", way, host.ref(base), to), filepath.Join(to, "disk.img")
	}
	if check {
		if err := checkDisk(disk, m); err != nil {
			tb.Fatalf("%s: %v", way, err)
		}
	}
	return c
}

// BenchmarkNextTag is a pull of the next tag into a store that has the one before: 70 % of
// the chunks are the same. Once the rest of their blobs are the same too, once all blobs
// are others (recompressed).
func BenchmarkNextTag(b *testing.B) {
	if _, err := program(); err != nil {
		b.Fatal(err)
	}
	dir, _ := images(b, *diskMiB, *chunkMiB)
	host := serve(b, dir, 0)
	for _, tag := range []string{next, recoded} {
		b.Run(tag, func(b *testing.B) {
			var costs []cost
			var asked counts
			m, err := readImage(dir, tag)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				for range *rounds {
					var c cost
					c, asked = nextTag(b, host, tag, m, len(costs) == 0)
					costs = append(costs, c)
				}
			}
			b.ReportMetric(100*float64(asked.Bytes)/float64(m.Bytes()), "%-of-bytes")
			b.ReportMetric(float64(asked.Requests), "requests")
			b.ReportMetric(median(costs, wall), "s")
			b.ReportMetric(median(costs, user), "user-s")
			b.ReportMetric(median(costs, written), "written-MiB")
			b.ReportMetric(median(costs, rss), "rss-MiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func nextTag(tb testing.TB, host served, tag string, m *image.Manifest, check bool) (cost, counts) {
	tb.Helper()
	to, remove := scratch(tb)
	defer remove()
	pull(tb, host.ref(base), to)
	host.counts(tb)
	c, disk := pull(tb, host.ref(tag), to)
	asked := host.counts(tb)
	if check {
		if err := checkDisk(disk, m); err != nil {
			tb.Fatal(err)
		}
	}
	return c, asked
}
