//go:build linux

package imagebench

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
)

// clones is how often a clone is measured.
const clones = 9

// BenchmarkClone clones an image where files can share blocks (an xfs that is mounted for
// it, as root) and where they cannot (an ext4 of the same size). Milliseconds are medians;
// moved-MiB is what one copy wrote, allocated-MiB what the image's disk has on disk.
func BenchmarkClone(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("file systems are mounted by root only")
	}
	dir, m := images(b, *diskMiB, *chunkMiB)
	host := serve(b, dir, 0)
	for _, fs := range []struct {
		name string
		make []string
	}{
		{"xfs", []string{"mkfs.xfs", "-q", "-m", "reflink=1"}},
		{"ext4", []string{"mke2fs", "-q", "-t", "ext4"}},
	} {
		b.Run(fs.name, func(b *testing.B) {
			at := mount(b, fs.make, 4**diskMiB+1024)
			store := filepath.Join(at, "store")
			role(b, "pull", host.ref(base), string(m.Digest), store)
			shares, err := cache.CanShare(store)
			if err != nil || shares != (fs.name == "xfs") {
				b.Fatalf("files share blocks: %v, %v", shares, err)
			}
			var costs []cost
			var micros []cost
			for b.Loop() {
				to := filepath.Join(at, "clones"+strconv.Itoa(len(costs)))
				if err := os.Mkdir(to, 0o700); err != nil {
					b.Fatal(err)
				}
				count := clones
				if !shares {
					count = 3 // which fill the disk
				}
				c := role(b, "clone", store, string(m.Digest), to, strconv.Itoa(count))
				c.written /= int64(count)
				costs = append(costs, c)
				micros = append(micros, each(b, c.out)...)
				if err := checkDisk(filepath.Join(to, "0", "disk.img"), m); err != nil {
					b.Fatal(err)
				}
				if err := os.RemoveAll(to); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(median(micros, wall)*1000, "ms")
			b.ReportMetric(median(costs, written), "moved-MiB")
			b.ReportMetric(allocated(b, store), "allocated-MiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// each reads what cloneAlone printed.
func each(tb testing.TB, out string) (list []cost) {
	tb.Helper()
	for line := range strings.Lines(out) {
		n, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			tb.Fatal(err)
		}
		list = append(list, cost{wall: time.Duration(n) * time.Microsecond})
	}
	return list
}

// mount makes a file system in a file of some MiB, and mounts it.
func mount(tb testing.TB, make []string, mib int64) string {
	tb.Helper()
	file, at := filepath.Join(tb.TempDir(), "fs"), filepath.Join(tb.TempDir(), "mnt")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Truncate(file, mib<<20); err != nil {
		tb.Fatal(err)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		tb.Fatal(err)
	}
	for _, command := range [][]string{append(make, file), {"mount", "-o", "loop", file, at}} {
		if out, err := exec.CommandContext(tb.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			tb.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
		}
	}
	tb.Cleanup(func() {
		if out, err := exec.CommandContext(context.WithoutCancel(tb.Context()), "umount", at).CombinedOutput(); err != nil {
			tb.Errorf("umount: %v: %s", err, out)
		}
	})
	return at
}

// allocated is how many MiB the disks of a store's images have on disk.
func allocated(tb testing.TB, store string) float64 {
	tb.Helper()
	disks, err := filepath.Glob(filepath.Join(store, "images", "*", "disk.img"))
	if err != nil || len(disks) != 1 {
		tb.Fatalf("%d disks, %v", len(disks), err)
	}
	info, err := os.Stat(disks[0])
	if err != nil {
		tb.Fatal(err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		tb.Fatal("no blocks are known of a file")
	}
	return float64(stat.Blocks) * 512 / (1 << 20)
}
