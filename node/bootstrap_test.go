package node

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// TestWrongBootstraps: a VM whose guest is not what its pool says ends with a reason from
// which a person knows what to change.
func TestWrongBootstraps(t *testing.T) {
	login := []api.PoolLogin{{Pool: "q", User: "other"}, {Pool: "p", User: "admin", Password: "pass-word"}}
	for _, tt := range []struct {
		name      string
		bootstrap fleet.Bootstrap
		prepare   func(*stand)
		then      func(*testing.T, *stand)
		want      []string
		not       string // must not be in it
		within    time.Duration
	}{
		{name: "agent, and the image has none", bootstrap: fleet.BootstrapAgent, within: 11 * time.Minute,
			prepare: func(s *stand) {
				s.yard.silent, s.yard.console = true, strings.Repeat("x", 5000)+"\nlogin: \x1b[2J\xff"
			},
			want: []string{"its guest did not answer within 10m0s: this pool's bootstrap is agent, which needs an image with Paddock's guest agent; stock images want bootstrap: ssh",
				`console ends: "xxx`, `login: \x1b[2J`}, not: strings.Repeat("x", 2000)},
		{name: "no bootstrap said is agent", within: 11 * time.Minute, prepare: func(s *stand) { s.yard.silent = true },
			want: []string{"bootstrap is agent"}, not: "console"},
		{name: "the driver hangs", bootstrap: fleet.BootstrapAgent, within: 11 * time.Minute, prepare: func(s *stand) { s.yard.hang = true },
			want: []string{"within 10m0s: its machine was not up yet"}, not: "bootstrap"},
		{name: "the driver waits for an agent that the image lacks", bootstrap: fleet.BootstrapAgent, within: 11 * time.Minute,
			prepare: func(s *stand) { s.yard.hang, s.yard.console = true, "sshd listens" },
			want:    []string{`stock images want bootstrap: ssh; console ends: "sshd listens"`}, not: "not up yet"},
		{name: "the kernel panics", bootstrap: fleet.BootstrapAgent, within: time.Minute, prepare: func(s *stand) { s.yard.silent, s.yard.console = true, "Kernel panic - not syncing" },
			then: func(t *testing.T, s *stand) { s.dieIn(t, fleet.VMBooting) },
			want: []string{`the machine ended: kernel panic; console ends: "Kernel panic - not syncing"`}},
		{name: "ssh with a driver that has no ports", bootstrap: fleet.BootstrapSSH, within: time.Minute,
			prepare: func(s *stand) { s.office.logins = login },
			want:    []string{`bootstrap "ssh" needs a driver that reaches the guest's ports, and this node's ("yard") does not`}},
		{name: "ssh without a login", bootstrap: fleet.BootstrapSSH, within: 11 * time.Minute,
			prepare: func(s *stand) { s.office.logins, s.yard.port = login[:1], func(c net.Conn) { _ = c.Close() } },
			want:    []string{"this pool's bootstrap is ssh", "the controller has named no login for pool p"}},
		{name: "ssh, and something else answers", bootstrap: fleet.BootstrapSSH, within: 11 * time.Minute,
			prepare: func(s *stand) { s.office.logins, s.yard.port = login, webServer },
			want:    []string{"this pool's bootstrap is ssh", "last try: SSH login of admin", "HTTP/1.1 400"}, not: "pass-word"},
		{name: "ssh, and the login is wrong", bootstrap: fleet.BootstrapSSH, within: time.Minute,
			prepare: func(s *stand) { s.office.logins, s.yard.port = login, refuseLogins },
			want:    []string{"the guest refused the SSH login: the password is wrong; set the pool's ssh login to an account of this image"}, not: "pass-word"},
		{name: "self, and nobody reads the share", bootstrap: fleet.BootstrapSelf, within: 11 * time.Minute,
			want: []string{"this pool's bootstrap is self", "launcher writes ready"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStand(t)
				if tt.prepare != nil {
					tt.prepare(s)
				}
				order := s.order("aaaaaaaa", jobGood)
				order.Bootstrap = tt.bootstrap
				s.office.place(order)
				stop := s.agent(t)
				if tt.then != nil {
					tt.then(t, s)
				}
				begun := time.Now()
				s.office.awaitDone(t, order.ID)
				r := s.office.report(order.ID)
				for _, want := range tt.want {
					if !strings.Contains(r.Reason, want) {
						t.Errorf("%q does not say %q", r.Reason, want)
					}
				}
				if tt.not != "" && strings.Contains(r.Reason, tt.not) || !r.Failed || time.Since(begun) > tt.within {
					t.Errorf("after %v, failed %v: %q", time.Since(begun), r.Failed, r.Reason)
				}
				stop()
				s.checkEmpty(t)
			})
		})
	}
}

// refuseLogins is an SSH server that knows no account.
func refuseLogins(c net.Conn) {
	defer func() { _ = c.Close() }()
	key, err := ssh.NewSignerFromSigner(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
	if err != nil {
		panic(err)
	}
	config := &ssh.ServerConfig{PasswordCallback: func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) {
		return nil, errors.New("unknown account")
	}}
	config.AddHostKey(key)
	ended := make(chan struct{})
	defer close(ended)
	e := eager{Conn: c, out: make(chan []byte, 100), ended: ended}
	go e.send()
	_, _, _, _ = ssh.NewServerConn(e, config)
}

// eager is a connection whose writer need not wait for the reader: both sides of SSH
// begin by writing.
type eager struct {
	net.Conn
	out   chan []byte
	ended <-chan struct{}
}

func (e eager) Write(p []byte) (int, error) {
	select {
	case e.out <- bytes.Clone(p):
		return len(p), nil
	case <-e.ended:
		return 0, net.ErrClosed
	}
}

func (e eager) send() {
	for {
		select {
		case p := <-e.out:
			_, _ = e.Conn.Write(p) // a reader that has left is the server's to notice
		case <-e.ended:
			return
		}
	}
}

// webServer is what may listen on a port where nobody expects it.
func webServer(c net.Conn) {
	go func() { _, _ = io.Copy(io.Discard, c) }()
	_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
	_ = c.Close()
}
