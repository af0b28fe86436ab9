package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"strings"
	"sync"
)

// key is one secret as a pool of keyed hashes: keying one costs two blocks of SHA-256
// and some garbage, resetting it almost nothing.
type key struct{ hashes sync.Pool }

func newKey(secret []byte) *key {
	k := &key{}
	k.hashes.New = func() any { return hmac.New(sha256.New, secret) }
	return k
}

// signed reports whether sum is the key's signature of body, in constant time.
func (k *key) signed(body []byte, sum *[sha256.Size]byte) bool {
	h := k.hashes.Get().(hash.Hash)
	defer k.hashes.Put(h)
	h.Reset()
	h.Write(body) // never fails, says package hash
	var own [sha256.Size]byte
	return hmac.Equal(h.Sum(own[:0]), sum[:])
}

// authentic reports whether header ("sha256=" and 64 hex digits) is the signature of
// body by any of the keys. The older X-Hub-Signature is not looked at: it is SHA-1.
func authentic(keys []*key, header string, body []byte) bool {
	digits, ok := strings.CutPrefix(header, "sha256=")
	var sum [sha256.Size]byte
	if !ok || len(digits) != hex.EncodedLen(len(sum)) {
		return false
	}
	if _, err := hex.Decode(sum[:], []byte(digits)); err != nil {
		return false
	}
	for _, k := range keys {
		if k.signed(body, &sum) {
			return true
		}
	}
	return false
}
