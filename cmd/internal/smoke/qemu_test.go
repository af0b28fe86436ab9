package smoke

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/qemu"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// talker is a guest that is heard of: QEMU's own network knows an address by what was
// sent from it, where a Mac's gives it away.
type talker struct {
	*guest.Client
	port string // of a server on this host
}

func (t *talker) NetworkUp(ctx context.Context) (guest.Network, error) {
	n, err := t.Client.NetworkUp(ctx)
	if err != nil {
		return n, err
	}
	_, err = t.Exec(ctx, guest.Command{Argv: []string{"wget", "-q", "-O", "-", "http://10.0.2.2:" + t.port}}, nil)
	return n, err
}

// A real machine with Paddock's agent: all that a Mac is tried for but the limit of its
// machines, which is Apple's.
func TestRealMachine(t *testing.T) {
	image, err := qemutest.Build(t.Context(), qemutest.Guest{})
	if err != nil {
		t.Fatal(err)
	}
	driver, err := qemu.New(qemu.Config{CloneFile: cache.CloneFile})
	if err != nil {
		t.Fatal(err)
	}
	parent, err := os.MkdirTemp("/tmp", "smoke") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(parent) })
	dir := filepath.Join(parent, "m")
	server := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(server.Close)
	_, port, _ := strings.Cut(strings.TrimPrefix(server.URL, "http://"), ":")
	by := try(t, t.Context(), Config{
		Driver: driver, Image: image.Dir, Dir: dir, Clone: cache.CloneFile, Agent: true, CPU: 1, Memory: 96 << 20,
		Open: func(ctx context.Context, m vm.Machine) (Guest, error) {
			conn, err := m.Dial(ctx)
			if err != nil {
				return nil, err
			}
			return &talker{guest.New(conn), port}, nil
		},
		Left: func(context.Context) ([]string, error) { return processtest.Leftovers(t, dir), nil },
	})
	for _, s := range steps {
		want := OK
		switch s.name {
		case "fill the host", "one too many", "destroy the others", // no limit
			"port 22": // nobody listens there
			want = Skipped
		}
		if r := by[s.name]; r.Outcome != want {
			t.Errorf("%+v, want %s", r, want)
		} else {
			t.Logf("%-20s %6.2f s  %s", r.Step, r.Seconds, r.Detail)
		}
	}
	if said := by["command"].Detail; !strings.HasPrefix(said, "Linux ") || !strings.HasSuffix(said, " aarch64") {
		t.Errorf("the guest says %q", said)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left over: %v", errors.Join(err, errors.New("files")))
	}
}
