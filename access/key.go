package access

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// keySize is in bytes: AES-256's, and an Ed25519 seed's.
const keySize = 32

// redacted stands for a secret wherever it is printed.
const redacted = "[redacted]"

// Key is the fleet key: the one secret from which tokens are signed and JIT configs
// sealed, each with a subkey of its own. Every replica of a controller has the same; no
// node has it. The zero Key refuses everything with ErrKey.
type Key struct{ secret [keySize]byte }

// NewKey draws a key.
func NewKey() Key {
	var k Key
	rand.Read(k.secret[:]) // never fails: crypto/rand aborts the program instead
	return k
}

// ParseKey reads a key file's content: 64 hex digits or base64 of 32 bytes, with white
// space around it. It fails with ErrKey.
func ParseKey(text string) (Key, error) {
	line := strings.TrimSpace(text)
	secret, err := hex.DecodeString(line)
	if err != nil {
		secret, err = base64.StdEncoding.DecodeString(line)
	}
	if err != nil || len(secret) != keySize {
		return Key{}, ErrKey
	}
	k := Key{[keySize]byte(secret)}
	if k.IsZero() {
		return Key{}, ErrKey
	}
	return k, nil
}

// Text is what a key file holds: 64 hex digits and a line end. The file is the caller's
// to write, readable by its owner only (0600).
func (k Key) Text() string { return hex.EncodeToString(k.secret[:]) + "\n" }

// IsZero reports whether there is no key.
func (k Key) IsZero() bool { return k.secret == [keySize]byte{} }

// Format, LogValue and MarshalText keep the key out of logs and errors.
func (k Key) Format(f fmt.State, _ rune)   { _, _ = f.Write([]byte(redacted)) }
func (k Key) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (k Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Purposes of subkeys; changing one makes everything made with it void.
const (
	purposeToken = "paddock token v1"
	purposeJoin  = "paddock join v1"
	purposeSeal  = "paddock seal v1"
	purposePeer  = "paddock peer v1"
)

// subkey derives 32 bytes for one purpose.
func (k Key) subkey(purpose string) ([]byte, error) {
	if k.IsZero() {
		return nil, ErrKey
	}
	sub, err := hkdf.Key(sha256.New, k.secret[:], nil, purpose, keySize)
	if err != nil {
		return nil, fmt.Errorf("derive a subkey: %w", err)
	}
	return sub, nil
}

// signer is the Ed25519 key of one purpose. Tokens are signed with a key pair, not with
// a shared secret, so that nodes can be given what verifies them and nothing more.
func (k Key) signer(purpose string) (ed25519.PrivateKey, error) {
	seed, err := k.subkey(purpose)
	if err != nil {
		return nil, err
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// Seal encrypts a JIT config (AES-256-GCM, random nonce) so that only the same key
// opens it, and only for the same VM and runner name. The result is base64.
func (k Key) Seal(plain string, vm fleet.VMID, runner string) (string, error) {
	box, err := k.box()
	if err != nil {
		return "", err
	}
	nonce := make([]byte, box.NonceSize(), box.NonceSize()+len(plain)+box.Overhead())
	rand.Read(nonce)
	return base64.StdEncoding.EncodeToString(box.Seal(nonce, nonce, []byte(plain), boundTo(vm, runner))), nil
}

// Open is the inverse of Seal; it fails with ErrSealed, or ErrKey on the zero key.
func (k Key) Open(sealed string, vm fleet.VMID, runner string) (string, error) {
	box, err := k.box()
	if err != nil {
		return "", err
	}
	raw, err := base64.StdEncoding.DecodeString(sealed)
	if err != nil || len(raw) < box.NonceSize() {
		return "", ErrSealed
	}
	nonce, text := raw[:box.NonceSize()], raw[box.NonceSize():]
	plain, err := box.Open(nil, nonce, text, boundTo(vm, runner))
	if err != nil {
		return "", ErrSealed
	}
	return string(plain), nil
}

func (k Key) box() (cipher.AEAD, error) {
	sub, err := k.subkey(purposeSeal)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(sub)
	if err != nil {
		return nil, fmt.Errorf("make a cipher: %w", err)
	}
	return cipher.NewGCM(block)
}

// boundTo is the associated data; a VM's id has no zero byte, so the pair is unambiguous.
func boundTo(vm fleet.VMID, runner string) []byte { return []byte(string(vm) + "\x00" + runner) }
