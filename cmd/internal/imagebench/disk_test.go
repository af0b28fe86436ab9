//go:build linux

package imagebench

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
)

// cell is what the disk is made of: each has content of one kind.
const cell = 64 << 10

// disk is a disk that is never held: its content is computed where it is read. 60 % of it
// is zero, as on the disks of public images: 3 of 8 chunks are, and in the others runs of
// 256 KiB and single pages. The rest is a mix of noise, words, and records that are half
// noise.
type disk struct {
	size, chunk int64
	// next is the disk of the next tag: 3 of 10 chunks that are not zero differ.
	next bool
}

var _ io.ReaderAt = disk{}

func (d disk) Size() int64 { return d.size }

// empty reports whether a whole chunk is zero.
func (d disk) empty(chunk int64) bool { return chunk%8 >= 5 }

// Zero implements tart.Sparse; as holes in a file, it knows whole chunks.
func (d disk) Zero(offset, size int64) bool {
	return size > 0 && offset/d.chunk == (offset+size-1)/d.chunk && d.empty(offset/d.chunk)
}

// seed is what content a cell has: it differs between cells, and between the versions of
// a changed chunk.
func (d disk) seed(at int64) uint64 {
	chunk := at / d.chunk
	full := chunk/8*5 + chunk%8 // among those that are not zero
	seed := uint64(at / cell)
	if d.next && full%10 < 3 {
		seed += 1 << 40
	}
	return seed
}

// ReadAt implements io.ReaderAt.
func (d disk) ReadAt(b []byte, at int64) (n int, err error) {
	var page [cell]byte
	for n < len(b) && at < d.size {
		start := at / cell * cell
		d.fill(page[:], start)
		m := copy(b[n:], page[at-start:min(cell, d.size-start)])
		n += m
		at += int64(m)
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// fill computes one cell.
func (d disk) fill(page []byte, at int64) {
	if d.empty(at / d.chunk) {
		clear(page)
		return
	}
	seed := d.seed(at)
	// Of runs of four cells, 30 % are zero; of all cells, 12 % have every other page zero.
	if mix(seed/4)%10 < 3 {
		clear(page)
		return
	}
	switch kind := mix(seed) % 100; {
	case kind < 40:
		noise(page, seed)
	case kind < 65:
		words(page, seed)
	default:
		noise(page, seed)
		for i := 0; i+8 <= len(page); i += 8 {
			binary.LittleEndian.PutUint32(page[i:], uint32(i/8))
		}
	}
	if mix(seed^1)%6 == 0 {
		for i := 0; i < len(page); i += 2 * 4096 {
			clear(page[i : i+4096])
		}
	}
}

// mix makes a number's neighbours look unlike it.
func mix(n uint64) uint64 {
	n = (n ^ n>>33) * 0xff51afd7ed558ccd
	n = (n ^ n>>33) * 0xc4ceb9fe1a85ec53
	return n ^ n>>33
}

func noise(page []byte, seed uint64) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	_, _ = rand.NewChaCha8(key).Read(page) // never fails
}

// words writes text of 256 words.
func words(page []byte, seed uint64) {
	var pick [cell / 4]byte
	noise(pick[:], seed)
	n := 0
	for _, p := range pick {
		if n >= len(page) {
			return
		}
		n += copy(page[n:], vocabulary[p])
	}
}

var vocabulary = func() (list [256]string) {
	for i := range list {
		letters := make([]byte, 4+i%9)
		for j := range letters {
			letters[j] = 'a' + byte(mix(uint64(100*i+j))%26)
		}
		list[i] = string(letters) + " "
	}
	return list
}()
