package guest

import (
	"bytes"
	"crypto/sha256"
	"errors"
)

// Each session on a raw stream begins with a mark by the host, which the guest answers in
// kind. Whatever else is on the stream before belongs to a session that was cut.
//
// A mark is 48 bytes: 16 that say what it means, a nonce of 16 that names the session,
// and 16 of a hash over both, so that a file with the first 16 in it (this very program)
// may pass through. No mark begins like a message of the multiplexer, which is with 0.
const (
	wordSize = 16
	markSize = 3 * wordSize
)

// word is a part of a mark.
type word [wordSize]byte

// What a mark means.
var (
	wordBegin  = word{0xf5, 'p', 'd', 'k', 0x9b, 0x1e, 0xc4, 0x83, 0x6d, 0xf0, 0x2a, 0x57, 0xe9, 0x38, 0xb6, 0x01} // host: a session begins
	wordAnswer = word{0xf6, 'p', 'd', 'k', 0x47, 0xd2, 0x0c, 0xe1, 0x95, 0x3b, 0xfa, 0x68, 0x14, 0xad, 0x7e, 0x01} // guest: it has begun
	wordLost   = word{0xf7, 'p', 'd', 'k', 0x2e, 0x89, 0xf3, 0x50, 0xb7, 0x16, 0xcd, 0xa4, 0x7b, 0x61, 0xd8, 0x01} // guest: it is over
)

// errCut is why a session ended: the other side has begun anew, or says that it is over.
var errCut = errors.New("the session on the machine's stream was cut")

// mark makes one.
func mark(meaning, nonce word) []byte {
	b := append(meaning[:], nonce[:]...)
	sum := sha256.Sum256(b)
	return append(b, sum[:wordSize]...)
}

// scanner finds the marks of one meaning in a stream that it sees piece by piece.
type scanner struct {
	meaning word
	seen    []byte // the last bytes that may be a mark's beginning, less than markSize
}

// find returns the nonce of the first mark that ends in p, and the index in p behind it.
// It is then to be called with the rest; without a mark it has seen all of p.
func (s *scanner) find(p []byte) (nonce word, after int, ok bool) {
	all := append(s.seen, p...)
	old := len(s.seen)
	for at := 0; ; at++ {
		i := bytes.Index(all[at:], s.meaning[:])
		if i < 0 || at+i+markSize > len(all) {
			break
		}
		at += i
		copy(nonce[:], all[at+wordSize:])
		if end := at + markSize; bytes.Equal(all[at:end], mark(s.meaning, nonce)) {
			s.seen = s.seen[:0]
			return nonce, end - old, true // what was seen before held no whole mark
		}
	}
	s.seen = append(all[:0], all[max(0, len(all)-markSize+1):]...) // keeps the room
	return word{}, len(p), false
}
