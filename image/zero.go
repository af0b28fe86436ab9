package image

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"

	"github.com/paddock-ci/paddock/fleet"
)

// zeroHashLimit is the largest all-zero chunk that is recognized: hashing it takes about
// half a second, once. A larger one is fetched like any other.
const zeroHashLimit = 1 << 30

// knownZeros caches the digests of all-zero chunks by size. The usual size is known from
// the start, so that reading a manifest of a public image hashes 71 MB and not 537.
var knownZeros = struct {
	sync.Mutex
	digests map[int64]fleet.Digest
}{digests: map[int64]fleet.Digest{
	512 << 20: "sha256:9acca8e8c22201155389f65abbf6bc9723edc7384ead80503839f49dcc56d767",
}}

// maxKnownZeros bounds the cache; images use one or two sizes, so this is many images.
const maxKnownZeros = 4096

// ZeroDigest is the digest of size zero bytes. It fails for a negative size and above
// 1 GiB.
func ZeroDigest(size int64) (fleet.Digest, error) {
	if size < 0 || size > zeroHashLimit {
		return "", fmt.Errorf("%w: zero chunk of %d bytes", ErrTooLarge, size)
	}
	return hashZeros([]int64{size})[size], nil
}

// zeroDigests returns the digest of zeros for each size that occurs in chunks.
func zeroDigests(chunks []Chunk) map[int64]fleet.Digest {
	var sizes []int64
	for _, c := range chunks {
		if c.Size <= zeroHashLimit {
			sizes = append(sizes, c.Size)
		}
	}
	slices.Sort(sizes)
	return hashZeros(slices.Compact(sizes))
}

// hashZeros hashes zeros once up to the largest unknown size and takes the digest at
// each size on the way, so that many sizes cost no more than the largest.
func hashZeros(ascending []int64) map[int64]fleet.Digest {
	found := make(map[int64]fleet.Digest, len(ascending))
	knownZeros.Lock()
	var unknown []int64
	for _, size := range ascending {
		if d, ok := knownZeros.digests[size]; ok {
			found[size] = d
		} else {
			unknown = append(unknown, size)
		}
	}
	knownZeros.Unlock()

	var zeros [64 << 10]byte
	hash, hashed := sha256.New(), int64(0)
	for _, size := range unknown {
		for hashed < size {
			n := min(size-hashed, int64(len(zeros)))
			hash.Write(zeros[:n])
			hashed += n
		}
		found[size] = digest(hash.Sum(nil))
	}

	knownZeros.Lock()
	defer knownZeros.Unlock()
	for _, size := range unknown {
		if len(knownZeros.digests) < maxKnownZeros {
			knownZeros.digests[size] = found[size]
		}
	}
	return found
}
