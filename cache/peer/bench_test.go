package peer

import (
	"io"
	"strconv"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/cache"
)

// BenchmarkFetch is content from one node to another on loopback, TLS and both ends on
// this machine's cores, raw and encoded, without the store's hashing and writing.
func BenchmarkFetch(b *testing.B) {
	h := newHomeOf(b, "a", hugeChunk)
	two := h.full(b, "mac-2", plain)
	w := h.want(h.manifest.Chunks[0])
	for _, encoded := range []bool{false, true} {
		for _, streams := range []int{1, 8} {
			name := "raw"
			if encoded {
				name = "encoded"
			}
			b.Run(name+"/streams="+strconv.Itoa(streams), func(b *testing.B) {
				one := h.newStation(b, "mac-1", cache.Config{}, nil)
				one.client.c.Slow = -1
				if encoded {
					one.client.c.Slow, one.client.meter.rate = 1<<50, 1
				}
				src := h.source(b, one, two)
				b.SetBytes(hugeChunk)
				b.ReportAllocs()
				var group errgroup.Group
				group.SetLimit(streams)
				for range b.N {
					group.Go(func() error {
						r, err := src.Open(b.Context(), w, 0)
						if err != nil {
							return err
						}
						defer func() { _ = r.Close() }()
						_, err = io.CopyBuffer(io.Discard, onlyReader{r}, make([]byte, 128<<10))
						return err
					})
				}
				if err := group.Wait(); err != nil {
					b.Error(err)
				}
			})
		}
	}
}
