package parts

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cmd/internal/config"
)

// A join token carries the hash of the self-made certificate only: a configured one is
// renewed by its authority, and nodes that pinned it would all be cut off that day.
func TestPinOfJoinTokens(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := makeCertificate(&config.Config{Fleet: "own"}, cert, key); err != nil {
		t.Fatal(err)
	}
	for name, tls := range map[string]config.TLS{"self-made": {}, "configured": {Cert: cert, Key: key}} {
		t.Run(name, func(t *testing.T) {
			control := runControl(t, tls)
			token, err := control.JoinToken(t.Context(), "mac-1")
			if err != nil {
				t.Fatal(err)
			}
			join, err := access.ReadJoin(token)
			if err != nil {
				t.Fatal(err)
			}
			if pinned := join.Certificate != ""; pinned != (name == "self-made") {
				t.Errorf("the token pins %q", join.Certificate)
			}
			// A node in the same process pins either, and dials this host.
			own := config.Node{Name: "mac-1", Dir: t.TempDir()}
			if err := control.JoinOwn(t.Context(), own); err != nil {
				t.Fatal(err)
			}
			e, err := ReadEndpoint(filepath.Join(own.Dir, credentialFile))
			if err != nil || e.Certificate != control.hash || e.URL != control.local {
				t.Errorf("its endpoint is %s, pinned %q, %v", e.URL, e.Certificate, err)
			}
		})
	}
}

// runControl runs a controller on the embedded store; its GitHub is never reached.
func runControl(t *testing.T, tls config.TLS) *Control {
	t.Helper()
	dir := t.TempDir()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	app := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)})
	for file, content := range map[string][]byte{"app.pem": app, "hook": []byte("hush")} {
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	control, err := NewControl(ControlConfig{Config: &config.Config{
		Fleet: "town", Listen: "127.0.0.1:0", URL: "https://paddock.invalid:8443", Data: filepath.Join(dir, "data"), TLS: tls,
		GitHub: config.GitHub{AppID: 1, PrivateKeyFile: filepath.Join(dir, "app.pem"), WebhookSecretFiles: []string{filepath.Join(dir, "hook")}, API: "http://127.0.0.1:1/"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	if err := control.Open(ctx); err != nil {
		stop()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- control.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return control
}

func TestLocalURL(t *testing.T) {
	for at, want := range map[string]string{
		"0.0.0.0:8443": "https://127.0.0.1:8443", "[::]:8443": "https://127.0.0.1:8443",
		"10.1.2.3:8443": "https://10.1.2.3:8443", "[::1]:8443": "https://[::1]:8443",
	} {
		address, err := net.ResolveTCPAddr("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		if got := localURL(address); got != want {
			t.Errorf("%s: %s, want %s", at, got, want)
		}
	}
}
