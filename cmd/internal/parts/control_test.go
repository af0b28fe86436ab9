package parts

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
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

// A node says that the runner in its VM is another one of the same organization, which
// is none of Paddock's. When the VM is done, the leader deletes the VM's own runner, by
// its name, and not the one that the node named.
func TestForeignRunnerDeletedOverTheWire(t *testing.T) {
	gh, err := githubtest.New(githubtest.Config{AppID: 1, Secret: []byte("hush"), Repositories: []githubtest.Repository{{Name: "acme/app"}}})
	if err != nil {
		t.Fatal(err)
	}
	site := httptest.NewServer(gh)
	t.Cleanup(site.Close)
	app, err := github.New(github.Config{AppID: gh.AppID(), PrivateKey: gh.PrivateKey(), BaseURL: site.URL + "/"})
	if err != nil {
		t.Fatal(err)
	}
	own := fleet.RunnerName("town", "evilevil", 1)
	minted := map[string]int64{}
	for _, name := range []string{"production", own} {
		m, err := app.MintRunner(t.Context(), "acme", name, 1, fleet.NewLabels("self-hosted"))
		if err != nil {
			t.Fatal(err)
		}
		minted[name] = m.RunnerID
	}
	control := runControlFor(t, config.TLS{}, gh.PrivateKey(), site.URL+"/", config.Pool{
		Name: "mac", Scopes: []string{"acme"}, Labels: []string{"self-hosted", "macOS"}, Image: "127.0.0.1:1/acme/mac:1",
	})
	credential, err := control.key.Sign(access.Identity{ID: access.NewID(), Role: access.Node, Subject: "mac-1", ExpiresAt: time.Now().Add(access.NodeLife)})
	if err != nil {
		t.Fatal(err)
	}
	node, err := Endpoint{URL: control.local, Certificate: control.hash, Token: string(credential)}.Client()
	if err != nil {
		t.Fatal(err)
	}
	report := api.VMReport{
		ID: "evilevil", Order: api.VMOrder{Pool: "mac", Image: fleet.Digest("sha256:" + strings.Repeat("1", 64))},
		Runner: &api.RunnerReport{Name: own, RunnerID: minted["production"], Scope: "acme", Attempt: 1},
	}
	for i, state := range []fleet.VMState{fleet.VMRegistered, fleet.VMDone} {
		report.State = state
		if _, err := node.Sync(t.Context(), api.SyncRequest{
			Protocol: api.Protocol, Session: "s", Sequence: int64(i + 1), VMs: []api.VMReport{report},
			Node: fleet.Node{ID: "mac-1", Arch: "arm64", OS: "darwin", Driver: "process", Slots: 2},
		}); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (names []string) {
		for _, r := range gh.Runners() {
			names = append(names, r.Name)
		}
		return names
	}
	deadline := time.After(20 * time.Second)
	for changed := gh.Changed(); slices.Contains(left(), own); changed = gh.Changed() {
		select {
		case <-changed:
		case <-time.After(100 * time.Millisecond): // it may have changed in between
		case <-deadline:
			t.Fatalf("the finished VM's runner is still at GitHub: %v", left())
		}
	}
	if got := left(); !slices.Equal(got, []string{"production"}) {
		t.Errorf("left at GitHub: %v", got)
	}
}

// runControl runs a controller on the embedded store; its GitHub is never reached.
func runControl(t *testing.T, tls config.TLS) *Control {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	app := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)})
	return runControlFor(t, tls, app, "http://127.0.0.1:1/")
}

func runControlFor(t *testing.T, tls config.TLS, app []byte, at string, pools ...config.Pool) *Control {
	t.Helper()
	dir := t.TempDir()
	for file, content := range map[string][]byte{"app.pem": app, "hook": []byte("hush")} {
		if err := os.WriteFile(filepath.Join(dir, file), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	control, err := NewControl(ControlConfig{Config: &config.Config{
		Fleet: "town", Listen: "127.0.0.1:0", URL: "https://paddock.invalid:8443", Data: filepath.Join(dir, "data"), TLS: tls, Pools: pools,
		GitHub: config.GitHub{AppID: 1, PrivateKeyFile: filepath.Join(dir, "app.pem"), WebhookSecretFiles: []string{filepath.Join(dir, "hook")}, API: at},
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

// The admin token that a controller leaves for the command line on its host could neither
// be listed nor revoked, and ended while the controller ran.
func TestLocalAdminTokenOutOfControl(t *testing.T) {
	control := runControl(t, config.TLS{})
	ctx, path := t.Context(), filepath.Join(control.c.Config.Data, CLIFile)
	use := func() (Endpoint, []api.TokenRow, error) {
		t.Helper()
		e, err := ReadEndpoint(path)
		if err != nil {
			t.Fatal(err)
		}
		client, err := e.Client()
		if err != nil {
			t.Fatal(err)
		}
		rows, err := client.Tokens(ctx)
		return e, rows, err
	}
	first, rows, err := use()
	if err != nil || len(rows) != 1 || rows[0].Role != "admin" || rows[0].CreatedBy != cliMaker {
		t.Fatalf("%+v, %v", rows, err)
	}
	// A restart uses it again, until it is about to end; then it is replaced and revoked.
	now := time.Now()
	for _, after := range []time.Duration{time.Hour, cliLife - access.RenewBefore + time.Hour} {
		again := after == time.Hour
		if err := control.leaveTokenForCLI(ctx, now.Add(after)); err != nil {
			t.Fatal(err)
		}
		if e, _, err := use(); err != nil || (e.Token == first.Token) != again {
			t.Errorf("after %s: used again %t, %v", after, e.Token == first.Token, err)
		}
		if again {
			continue
		}
		ledger, err := control.store.ReadLedger(ctx)
		if _, revoked := ledger.Revoked[rows[0].ID]; err != nil || !revoked || len(ledger.Tokens) != 1 {
			t.Errorf("the former one is still in force: %+v, %v", ledger, err)
		}
		// Revoked by an admin, it is good for nothing; the next start makes another.
		client, err := control.Client(access.Admin)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.RevokeToken(ctx, ledger.Tokens[0].ID); err != nil {
			t.Fatal(err)
		}
		if _, _, err := use(); err == nil {
			t.Error("revoked, and yet it works")
		}
		if err := control.leaveTokenForCLI(ctx, now.Add(after)); err != nil {
			t.Fatal(err)
		}
		if _, rows, err := use(); err != nil || len(rows) != 1 {
			t.Errorf("%+v, %v", rows, err)
		}
		return
	}
}
