package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// imageChunk is the size of chunks in tests: small, and of several blocks.
const imageChunk = 256 << 10

// registry serves a registry on loopback, $REGISTRY, with images NAME:TAG=PATTERN; see
// registrytest.Source.
func (s *session) registry(ts *testscript.TestScript, neg bool, args []string) {
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	s.t.Cleanup(server.Close)
	for _, arg := range args {
		ref, pattern, _ := strings.Cut(arg, "=")
		name, tag, ok := strings.Cut(ref, ":")
		if !ok {
			ts.Fatalf("%q is not NAME:TAG=PATTERN", arg)
		}
		_, err := reg.Push(s.t.Context(), name, tag, registrytest.Source(pattern, imageChunk))
		ts.Check(err)
	}
	ts.Setenv("REGISTRY", strings.TrimPrefix(server.URL, "http://"))
}

// agent has a store open, as a node's agent has, until "agent stop"; with an image and
// holders it leases that to them.
func (s *session) agent(ts *testscript.TestScript, neg bool, args []string) {
	if args[0] == "stop" {
		ts.Check(s.store.Close())
		s.store = nil
		return
	}
	store, err := cache.Open(cache.Config{Dir: ts.MkAbs(args[0])})
	ts.Check(err)
	s.store = store
	s.t.Cleanup(func() {
		if s.store != nil {
			_ = s.store.Close()
		}
	})
	for _, holder := range args[min(2, len(args)):] {
		_, err := store.Lease(fleet.Digest(args[1]), holder)
		ts.Check(err)
	}
}

// spoil changes the byte at an offset of a file.
func (s *session) spoil(ts *testscript.TestScript, neg bool, args []string) {
	at, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer func() { ts.Check(f.Close()) }()
	b := make([]byte, 1)
	_, err = f.ReadAt(b, at)
	ts.Check(err)
	_, err = f.WriteAt([]byte{b[0] ^ 1}, at)
	ts.Check(err)
}

// capture sets an environment variable to a field of the last output, which is JSON.
func (s *session) capture(ts *testscript.TestScript, neg bool, args []string) {
	var fields map[string]any
	lines := strings.Split(strings.TrimSpace(ts.ReadFile("stdout")), "\n{")
	text := lines[len(lines)-1]
	if len(lines) > 1 {
		text = "{" + text
	}
	ts.Check(json.Unmarshal([]byte(text), &fields))
	value, ok := fields[args[1]].(string)
	if !ok {
		ts.Fatalf("no string %q in %s", args[1], text)
	}
	ts.Setenv(args[0], value)
}

// A person pulls from a slow registry and changes their mind: the status is 130, and what
// came is kept. The next pull asks for the rest, and tells its way in lines of JSON.
func TestImagePullInterrupted(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	t.Cleanup(server.Close)
	if _, err := reg.Push(t.Context(), "acme/base", "v1", registrytest.Source("abcdefghijkl", 1<<20)); err != nil {
		t.Fatal(err)
	}
	ref, store := strings.TrimPrefix(server.URL, "http://")+"/acme/base:v1", filepath.Join(t.TempDir(), "s")
	reg.Limit(1_000_000) // the image has 6 MB on the wire
	cmd := exec.CommandContext(t.Context(), self, "image", "pull", ref, "--store", store, "--json", "--streams", "2")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var last pulled
	var had step // when it was interrupted
	lines := bufio.NewScanner(out)
	for told := false; lines.Scan(); {
		var now step
		if err := json.Unmarshal(lines.Bytes(), &now); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		if now.Done > 1_000_000 && !told {
			told, had = true, now
			if now.Total < 6_000_000 || now.Done >= now.Total {
				t.Errorf("it says %s", lines.Text())
			}
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			t.Fatal(err)
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted {
		t.Errorf("it ended with %v; want status 130", err)
	}
	if text := stderr.String(); !strings.Contains(text, " are here and kept (hint: the same command goes on from there)\n") {
		t.Errorf("it says %q", text)
	}
	if last.State != "interrupted" || last.Disk != "" {
		t.Errorf("the last line is %+v", last)
	}
	_, before := reg.Counts().Total()
	reg.Limit(0)
	again := exec.CommandContext(t.Context(), self, "image", "pull", ref, "--store", store, "-o", "json")
	text, err := again.Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(lastLine(string(text))), &last); err != nil {
		t.Fatal(err)
	}
	var moved int64
	for _, n := range last.Bytes {
		moved += n
	}
	_, after := reg.Counts().Total()
	if info, err := os.Stat(last.Disk); last.State != "ready" || moved == 0 || err != nil || info.Size() != 12<<20 {
		t.Errorf("the last line is %+v", last)
	}
	// What is asked for again: the manifest, and of both streams what was read ahead and
	// the block that was not whole.
	if all := after - before; all > had.Total-had.Done+500_000 || moved > all {
		t.Errorf("after %d of %d bytes, %d were asked for, and %d reported", had.Done, had.Total, all, moved)
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// A log gets a line for every tenth part, and one when nothing else was due for a while;
// a rate and the time that is left are in it when they are known.
func TestProgressLines(t *testing.T) {
	var log bytes.Buffer
	p := newProgress(&log, "x", inBytes)
	p.begin("caching")
	for done := int64(0); done <= 1000; done++ {
		p.tell(done*1000, 1_000_000)
	}
	p.next = time.Now().Add(-time.Second)
	p.tell(1_000_000, 1_000_000)
	p.end()
	p.tell(1, 1_000_000)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 12 || lines[0] != "x: 0%, 0 B of 1.0 MB" || !strings.HasPrefix(lines[3], "x: 30%, 300 kB of 1.0 MB, ") || lines[11] != "x: 100%, 1.0 MB of 1.0 MB" {
		t.Errorf("the log is\n%s", log.String())
	}
	var out bytes.Buffer
	p = newSteps(&out, "x")
	p.begin("queued")
	p.begin("queued")
	p.tell(10, 100)
	var first step
	if err := json.Unmarshal([]byte(strings.Split(out.String(), "\n")[0]), &first); err != nil || first.State != "queued" || strings.Count(out.String(), "\n") != 2 {
		t.Errorf("as JSON it is %s (%v)", out.String(), err)
	}
}

// The rate follows what is measured, begins with what there is, and survives that bytes
// are taken back.
func TestRateMeter(t *testing.T) {
	var m rateMeter
	now := time.Unix(1000, 0)
	m.add(now, 500) // from an earlier pull: no rate
	if r := m.rate(now); r != 0 {
		t.Errorf("at first: %v", r)
	}
	m.add(now.Add(100*time.Millisecond), 600)
	if r := m.rate(now.Add(100 * time.Millisecond)); r < 999 || r > 1001 {
		t.Errorf("before a sample: %v, want 1000", r)
	}
	for i := 1; i <= 60; i++ {
		m.add(now.Add(time.Duration(i)*time.Second), 600+int64(i)*2000)
	}
	if r := m.rate(now); r < 1950 || r > 2050 {
		t.Errorf("after a minute at 2000: %v", r)
	}
	m.add(now.Add(61*time.Second), 100)
	if r := m.rate(now.Add(61 * time.Second)); r != 0 {
		t.Errorf("after bytes were taken back: %v", r)
	}
}

// Each class of failure has words of its own on what to do, and a failure that has them
// already keeps them.
func TestPullFailed(t *testing.T) {
	seen := map[string]cache.Class{}
	for _, class := range []cache.Class{cache.ClassAuth, cache.ClassNotFound, cache.ClassNetwork, cache.ClassDisk, cache.ClassDigest, cache.ClassFormat} {
		text := advise(pullFailed("ghcr.io", 1, &cache.Error{Class: class, Err: errors.New("so it is")}))
		what, hint, ok := strings.Cut(text, " (hint: ")
		if !ok || what != "so it is; class "+string(class) {
			t.Errorf("%s: %s", class, text)
		}
		if other, taken := seen[hint]; taken {
			t.Errorf("%s and %s have the same hint: %s", class, other, hint)
		}
		seen[hint] = class
	}
	for _, test := range []struct {
		what string
		kept int64
		err  error
		want string
	}{
		{"nothing came", 0, &cache.Error{Class: cache.ClassNetwork, Err: errors.New("refused")}, "refused; class network (hint: nothing was fetched; is ghcr.io the right host, and can this one reach it?)"},
		{"it broke off", 7, &cache.Error{Class: cache.ClassNetwork, Err: errors.New("reset")}, "reset; class network (hint: what was fetched is kept, and the same command goes on from there)"},
		{"a full disk", 7, &cache.Error{Class: cache.ClassDisk, Err: syscall.ENOSPC}, syscall.ENOSPC.Error() + "; class disk (hint: make room,"},
		{"a disk that fails", 7, &cache.Error{Class: cache.ClassDisk, Err: syscall.EIO}, syscall.EIO.Error() + "; class disk (hint: look at the disk"},
		{"no failure of a pull", 0, errors.New("so it is"), "so it is (hint: the same command begins anew)"},
		{"an image that is none", 0, image.ErrIndex, image.ErrIndex.Error() + "; class format (hint: docs/images.md"},
	} {
		if got := advise(pullFailed("ghcr.io", test.kept, test.err)); !strings.HasPrefix(got, test.want) {
			t.Errorf("%s: %s; want %s", test.what, got, test.want)
		}
	}
	known := errors.New("no such thing (hint: make one)")
	if err := pullFailed("ghcr.io", 0, known); !errors.Is(err, known) || strings.Count(err.Error(), "hint") != 1 {
		t.Errorf("a hint is added to a hint: %v", err)
	}
}

// A bar is drawn only where there is room for one.
func TestDrawable(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	null, err := os.OpenFile("/dev/null", os.O_WRONLY|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if drawable(f) || drawable(null) || drawable(&bytes.Buffer{}) {
		t.Error("a file is a terminal")
	}
}
