package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cmd/internal/parts"
)

// Two controllers share a Redis, a fleet key and a certificate, behind a balancer that
// gives them connections in turn. Wherever a person's call and the node's sync are, the
// two meet: the node tries until it reaches the replica that holds the person.
func TestVMSessionsOverReplicas(t *testing.T) {
	tw := openTown(t, 2)
	second := tw.replica()
	first, err := parts.ReadEndpoint(filepath.Join(tw.dir, "data", parts.CLIFile))
	if err != nil {
		t.Fatal(err)
	}
	front := balancer(t, strings.TrimPrefix(first.URL, "https://"), second)
	token := tw.run("token", "create", "--node", "mac-1")
	tw.run("node", "join", strings.TrimSpace(token), "--name", "mac-1", "--dir", filepath.Join(tw.dir, "mac-1"), "--controller", "https://"+front)
	tw.startNode("mac-1")
	vm, release := tw.busyVM()
	port := guestService(t, echo)
	operator := strings.TrimSpace(tw.run("token", "create", "ann", "--role", "operator"))
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			cmd := exec.CommandContext(t.Context(), tw.self, "--url", "https://"+front, "vm", "forward", "--stdio", string(vm.ID), port)
			cmd.Env = append(os.Environ(), "PADDOCK_TOKEN="+operator, "PADDOCK_CERTIFICATE="+first.Certificate)
			said := fmt.Sprint("hello ", i)
			var errOut bytes.Buffer
			cmd.Stdin, cmd.Stderr = strings.NewReader(said), &errOut
			if out, err := cmd.Output(); err != nil || string(out) != said {
				t.Errorf("%q, %v: %s", out, err, errOut.String())
			}
		})
	}
	all.Wait()
	release()
	tw.waitDone(1, time.Minute)
	tw.cleanHouse()
}

// replica starts a second controller and returns its address.
func (tw *town) replica() (address string) {
	t := tw.t
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = l.Addr().String()
	_ = l.Close()
	data := filepath.Join(tw.dir, "data2")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fleet.key", "tls.pem", "tls.key"} {
		text, err := os.ReadFile(filepath.Join(tw.dir, "data", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(data, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tw.start("controller2", "controller", "--listen", address, "--data", data)
	tw.eventually(30*time.Second, func() error {
		_, err := parts.ReadEndpoint(filepath.Join(data, parts.CLIFile))
		return err
	})
	return address
}

// balancer passes connections on to addresses in turn, as they are.
func balancer(t *testing.T, addresses ...string) (address string) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var turn atomic.Int64
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				to, err := new(net.Dialer).DialContext(t.Context(), "tcp", addresses[int(turn.Add(1))%len(addresses)])
				if err != nil {
					return // the replica is away
				}
				defer func() { _ = to.Close() }()
				go func() { _, _ = io.Copy(to, conn); _ = to.(*net.TCPConn).CloseWrite() }()
				_, _ = io.Copy(conn, to)
			}()
		}
	}()
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}
