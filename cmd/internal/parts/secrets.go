package parts

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
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cmd/internal/config"
)

// fleetKey reads the fleet's key, or makes one at the first start. Whoever has it can
// act as anybody, so its file is the owner's alone.
func fleetKey(dir string) (access.Key, error) {
	path := filepath.Join(dir, "fleet.key")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key := access.NewKey()
		return key, writeSecret(path, []byte(key.Text()))
	}
	if err != nil {
		return access.Key{}, fmt.Errorf("read the fleet key: %w", err)
	}
	key, err := access.ParseKey(string(text))
	if err != nil {
		return access.Key{}, fmt.Errorf("the fleet key in %s: %w", path, err)
	}
	return key, nil
}

// writeSecret makes a file that must not exist yet, for the owner alone.
func writeSecret(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("keep a secret: %w", err)
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

// certificate is the configured one, or the self-made one of this fleet. Its hash is
// what nodes and the command line pin: sha256 over the leaf in DER, in hex.
func certificate(c *config.Config) (tls.Certificate, string, error) {
	certFile, keyFile := c.TLS.Cert, c.TLS.Key
	if certFile == "" {
		certFile, keyFile = filepath.Join(c.Data, "tls.pem"), filepath.Join(c.Data, "tls.key")
		if _, err := os.Stat(certFile); errors.Is(err, fs.ErrNotExist) {
			if err := makeCertificate(c, certFile, keyFile); err != nil {
				return tls.Certificate{}, "", fmt.Errorf("make a certificate: %w", err)
			}
		}
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return tls.Certificate{}, "", fmt.Errorf("load the certificate: %w", err)
	}
	hash := sha256.Sum256(pair.Certificate[0])
	return pair, hex.EncodeToString(hash[:]), nil
}

// makeCertificate writes a self-signed certificate, good for ten years: it is pinned by
// its hash, so there is no authority whose word would end sooner.
func makeCertificate(c *config.Config, certFile, keyFile string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "paddock " + c.Fleet},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if at, err := url.Parse(c.URL); err == nil {
		if ip := net.ParseIP(at.Hostname()); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, at.Hostname())
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	// The key first: a certificate without its key would be found at the next start. A key
	// without its certificate is left from a crash between the two.
	if err := os.Remove(keyFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeSecret(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})); err != nil {
		return err
	}
	return writeSecret(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// Trusting is a transport that takes any certificate, as GitHub's webhooks do where an
// App's settings switch verification off. For the simulated GitHub of the demo.
func Trusting() http.RoundTripper {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	return t
}
