// Package storetest is the store's contract as a test: Run holds any way of opening a
// store to it, and StartRedis gives tests a real redis-server to open one on.
//
// It is no store and no double of one: whoever needs a store in a test opens the
// embedded one. The store's tests call it, and those of packages that want to see their
// part on a real Redis that stops, hangs or forgets everything.
package storetest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// patience is how long a server may take to start or stop on a busy machine.
const patience = 20 * time.Second

// Redis is a redis-server that a test started.
type Redis struct {
	args             []string
	socket, password string

	client *redis.Client
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
}

// StartRedis starts a redis-server with a password on a unix socket of its own and
// returns the URL for store.Config. It keeps its data over Stop and Start (append-only
// file, synced every second); args are further options of redis-server. It ends with the
// test. Without a redis-server on the machine the test is skipped, or fails if CI=true.
func StartRedis(t testing.TB, args ...string) (string, *Redis) {
	t.Helper()
	program, err := exec.LookPath("redis-server")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("no redis-server on this machine, and CI=true: install it (Debian: apt-get install redis-server)")
		}
		t.Skip("no redis-server on this machine (Debian: apt-get install redis-server)")
	}
	// Not t.TempDir: its path may be longer than the 104 bytes that a socket's may have.
	dir, err := os.MkdirTemp("", "paddock-redis-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket, password := filepath.Join(dir, "s"), rand.Text()
	r := &Redis{
		socket: socket, password: password,
		args: append([]string{program, "--port", "0", "--unixsocket", socket, "--requirepass", password,
			"--dir", dir, "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"}, args...),
		client: redis.NewClient(&redis.Options{Network: "unix", Addr: socket, Password: password}),
	}
	t.Cleanup(func() {
		r.kill()
		_ = r.client.Close()
	})
	r.Start(t)
	return (&url.URL{Scheme: "unix", User: url.UserPassword("", password), Path: socket}).String(), r
}

// Start starts a server that was stopped, and waits until it answers.
func (r *Redis) Start(t testing.TB) {
	t.Helper()
	r.cmd = exec.Command(r.args[0], r.args[1:]...) //nolint:noctx // ends with the test's cleanup, which waits for it
	r.exited = make(chan struct{})
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func(cmd *exec.Cmd, exited chan struct{}) {
		_ = cmd.Wait() // killed as often as not
		close(exited)
	}(r.cmd, r.exited)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for again := time.NewTicker(10 * time.Millisecond); ; {
		if err := r.client.Ping(ctx).Err(); err == nil {
			return
		} else if ctx.Err() != nil {
			t.Fatalf("redis-server does not answer: %v", err)
		}
		select {
		case <-again.C:
		case <-ctx.Done():
		case <-r.exited:
			t.Fatal("redis-server ended at its start")
		}
	}
}

// Stop stops the server as an operator would; what it holds is there after Start.
func (r *Redis) Stop(t testing.TB) {
	t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.exited:
	case <-time.After(patience):
		t.Fatal("redis-server does not stop")
	}
}

// kill ends the server at once.
func (r *Redis) kill() {
	if r.cmd == nil || r.cmd.Process == nil {
		return
	}
	_ = r.cmd.Process.Kill()
	<-r.exited
}

// Pause makes the server hang, with its connections open, until Continue.
func (r *Redis) Pause(t testing.TB) { r.signal(t, syscall.SIGSTOP) }

// Continue ends a Pause.
func (r *Redis) Continue(t testing.TB) { r.signal(t, syscall.SIGCONT) }

func (r *Redis) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// Flush empties the server: FLUSHALL.
func (r *Redis) Flush(t testing.TB) {
	t.Helper()
	if err := r.client.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
}

// Password and Socket are what the URL is made of, for tests of what must not leak and
// of wrong credentials.
func (r *Redis) Password() string { return r.password }

// Socket is the path of the unix socket.
func (r *Redis) Socket() string { return r.socket }

// Memory returns the bytes that the server's data takes (used_memory_dataset).
func (r *Redis) Memory(t testing.TB) int64 {
	t.Helper()
	info, err := r.client.InfoMap(t.Context(), "memory").Result()
	var n int64
	if err == nil {
		_, err = fmt.Sscan(info["Memory"]["used_memory_dataset"], &n)
	}
	if err != nil {
		t.Fatal(errors.Join(errors.New("read used_memory_dataset"), err))
	}
	return n
}

// CPU returns what the server's process has burned: of a Redis that answers scripts, the
// figure that does not depend on what else the machine does.
func (r *Redis) CPU(t testing.TB) time.Duration {
	t.Helper()
	info, err := r.client.InfoMap(t.Context(), "cpu").Result()
	var user, system float64
	if err == nil {
		_, err = fmt.Sscan(info["CPU"]["used_cpu_user"]+" "+info["CPU"]["used_cpu_sys"], &user, &system)
	}
	if err != nil {
		t.Fatal(errors.Join(errors.New("read used_cpu_user"), err))
	}
	return time.Duration((user + system) * float64(time.Second))
}
