package peer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// A certificate lasts a year and is renewed a month before its end. It is known by its
// hash, so that its end frightens nobody; it is renewed so that a key that was copied
// once is not good for ever.
const (
	identityLife  = 365 * 24 * time.Hour
	identityRenew = 30 * 24 * time.Hour
)

// identityFile holds certificate and key, so that there is never one without the other.
const identityFile = "peer.pem"

// Identity is a node's certificate, which it shows as a server and as a client. It is
// safe for concurrent use.
type Identity struct {
	path string
	name fleet.NodeID
	now  func() time.Time

	mu   sync.Mutex
	pair tls.Certificate
	hash string
}

// OpenIdentity reads the certificate in a node's directory, or makes one there, readable
// by its owner only. now nil: time.Now.
func OpenIdentity(dir string, name fleet.NodeID, now func() time.Time) (*Identity, error) {
	if now == nil {
		now = time.Now
	}
	i := &Identity{path: filepath.Join(dir, identityFile), name: name, now: now}
	text, err := os.ReadFile(i.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("reading this node's certificate for its peers: %w", err)
	default:
		// One that cannot be read is replaced: nothing is lost but its hash, and the
		// controller hears of the new one with the next sync.
		if pair, err := parseIdentity(text); err == nil {
			i.use(pair)
		}
	}
	if _, _, err := i.current(); err != nil {
		return nil, err
	}
	return i, nil
}

func parseIdentity(text []byte) (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(text, text)
	if err == nil && pair.Leaf == nil {
		pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0])
	}
	return pair, err
}

func (i *Identity) use(pair tls.Certificate) {
	sum := sha256.Sum256(pair.Certificate[0])
	i.pair, i.hash = pair, hex.EncodeToString(sum[:])
}

// Hash is the hex SHA-256 of the certificate (DER), by which others know this node.
func (i *Identity) Hash() string {
	_, hash, _ := i.current() // renewing failed: the one there is still serves
	return hash
}

// current is the certificate, renewed if its end is near. If that fails, the error comes
// with the old one.
func (i *Identity) current() (*tls.Certificate, string, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if leaf := i.pair.Leaf; leaf != nil && i.now().Before(leaf.NotAfter.Add(-identityRenew)) && !i.now().Before(leaf.NotBefore) {
		pair := i.pair
		return &pair, i.hash, nil
	}
	text, err := makeIdentity(i.name, i.now())
	if err == nil {
		err = writeIdentity(i.path, text)
	}
	var made tls.Certificate
	if err == nil {
		made, err = parseIdentity(text)
	}
	if err != nil {
		pair := i.pair
		return &pair, i.hash, fmt.Errorf("making this node's certificate for its peers: %w", err)
	}
	i.use(made)
	return &made, i.hash, nil
}

// show is for TLS: the certificate, renewed or not.
func (i *Identity) show() (*tls.Certificate, error) {
	pair, _, err := i.current()
	if len(pair.Certificate) == 0 {
		return nil, err
	}
	return pair, nil
}

func makeIdentity(name fleet.NodeID, now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "paddock node " + string(name)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(identityLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...), nil
}

// writeIdentity replaces the file by one rename. CreateTemp's files are 0600.
func writeIdentity(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), identityFile+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // renamed, unless something failed
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
