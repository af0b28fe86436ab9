package e2e

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// pushBare pushes an image of a disk of 8 MiB that nobody made for booting.
func (s *stable) pushBare(repository string, boot *tart.Boot) string {
	s.t.Helper()
	_, err := s.registry.Push(s.t.Context(), repository, "1", tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux", Arch: "arm64", CPUCount: 1, MemorySize: 64 << 20, Boot: boot},
		NVRAM:  []byte("no variables"), Disk: bytes.NewReader(make([]byte, 8<<20)), ChunkSize: 4 << 20,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	server := httptest.NewServer(s.registry)
	s.t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/" + repository + ":1"
}

// What people get wrong, each with a pool of its own on a node with one slot: the VM's
// reason says what it is, and the slot is free for the next. A pool that no node can ever
// hold is explained by its job. A node without QEMU names the package.
func TestBadInput(t *testing.T) {
	s := newStable(t)
	ours := "image: " + s.push("acme/ours", qemutest.Guest{})
	panics := "image: " + s.push("acme/panics", qemutest.Guest{CommandLine: "rdinit=/no/such/init"})
	zeros := "image: " + s.pushBare("acme/zeros", &tart.Boot{Kernel: tart.Extent{Offset: 0, Size: 1 << 20}})
	bootless := "image: " + s.pushBare("acme/bootless", nil)
	const here = ", nodes: [mac-1]"
	s.open(1, stockPools(
		[2]string{"panics", panics + here},
		[2]string{"zeros", zeros + here},
		[2]string{"bootless", bootless + here},
		[2]string{"shareless", ours + here + ", mounts: [{name: work, path: /no/such/directory}]"},
		[2]string{"bare", ours + ", nodes: [mac-2]"},
	)+fmt.Sprintf(`
  - {name: greedy, scopes: [acme], labels: [self-hosted, greedy], cpu: 1000, %[1]s}
  - {name: vast, scopes: [acme], labels: [self-hosted, vast], memory: 100TiB, %[1]s}
`, ours), "mac-1")
	s.env = []string{"PATH=" + t.TempDir()} // neither QEMU nor anything else
	s.join("mac-2")

	for _, c := range []struct {
		pool  string
		wants []string
	}{
		{"panics", []string{"Kernel panic"}},
		{"zeros", []string{"no Linux kernel for arm64"}},
		{"bootless", []string{"boot"}},
		{"shareless", []string{`share "work"`, "/no/such/directory"}},
		{"bare", []string{"qemu-system-aarch64", "qemu-system-arm"}},
	} {
		job := s.queueFor(c.pool, "echo never")[0]
		s.fails(c.pool, c.wants...)
		if err := s.github.Cancel(job); err != nil {
			t.Error(err)
		}
	}
	for _, pool := range []string{"greedy", "vast"} {
		const want = "2 × node too small for the pool's VMs"
		job := s.queueFor(pool, "echo never")[0]
		s.await("the explanation of pool "+pool, jobTime, func() error {
			said, err := s.try("job", "explain", fmt.Sprint(job))
			if err == nil && !strings.Contains(said, want) {
				err = fmt.Errorf("it says\n%s", said)
			}
			return err
		})
		if err := s.github.Cancel(job); err != nil {
			t.Error(err)
		}
	}
	s.cleanHouse()
}
