package e2e

import (
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// stockPassword lets admin into stock guests, which know it by stockShadow.
const (
	stockPassword = "open sesame"
	stockShadow   = "$6$paddock$p99S.pTb8qQdENEFNnndCRCdzrlK/Z8DbDvAMkWSwkZcIkY6gm3dtSItJZ0ulWFMSKJlBDUwaWkTHPaf67BGE1" // openssl passwd -6 -salt paddock
)

// The two halves of a stock guest's boot: what mounts its disk, and what its disk has. It
// knows nothing of Paddock, but that QEMU's network is 10.0.2.0/24.
const (
	stockInitrd = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1
while read -r module; do insmod "/modules/$module"; done </modules/order
mount -t ext4 /dev/vda /mnt || poweroff -f
for each in proc sys dev; do mount -o move /$each /mnt/$each; done
exec switch_root -c /dev/console /mnt /sbin/init
`
	stockInit = `#!/bin/busybox sh
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
/bin/busybox --install -s /bin
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
chown -R 0:0 /etc /run
chown -R admin:admin /home/admin
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
test -e /etc/ssh/host || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/host
/usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
echo "sshd ended: $?"
poweroff -f
`
	stockSSHD = `HostKey /etc/ssh/host
UsePAM no
UseDNS no
`
)

// stockGuest is a Linux with OpenSSH's server and without Paddock's agent. Its host key is
// part of the image, or each clone makes its own at its first boot.
func stockGuest(t *testing.T, hostKey bool) qemutest.Guest {
	t.Helper()
	parts, err := qemutest.Parts(t.Context(), "arm64")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.CopyFS(root, os.DirFS(filepath.Join(parts, "sshd"))); err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(filepath.Join(parts, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	_, authorized := stockKey(t, "admin")
	files := map[string]string{
		"bin/busybox": string(busybox), "sbin/init": stockInit, "etc/ssh/sshd_config": stockSSHD,
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:100::/run/sshd:/bin/false\nadmin:x:1000:1000::/home/admin:/bin/sh\n",
		"etc/group":  "root:x:0:\nsshd:x:100:\nadmin:x:1000:\n",
		"etc/shadow": "root:*:20000::::::\nsshd:*:20000::::::\nadmin:" + stockShadow + ":20000::::::\n",
		"etc/hosts":  "127.0.0.1 localhost\n", "etc/resolv.conf": "nameserver 10.0.2.3\n",
		"home/admin/.ssh/authorized_keys": authorized,
	}
	if hostKey {
		files["etc/ssh/host"], _ = stockKey(t, "host")
	}
	for name, content := range files {
		mode := fs.FileMode(0o600)
		switch {
		case strings.Contains(name, "bin/"):
			mode = 0o755
		case !strings.HasSuffix(name, "/shadow") && !strings.HasSuffix(name, "/host"):
			mode = 0o644
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "root"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return qemutest.Guest{
		Root: root, RootSize: 128 << 20, // 20 MB, the runner, and the archive it comes in
		Files: map[string]qemutest.File{"init": {Data: []byte(stockInitrd)}},
	}
}

// stockKey is a key pair made of a word, so that the same image comes out each time: the
// private half in PEM, the public half as a line of authorized_keys.
func stockKey(t *testing.T, word string) (private, public string) {
	t.Helper()
	seed := sha256.Sum256([]byte("paddock's tests: " + word))
	key, err := ecdh.P256().NewPrivateKey(seed[:])
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var wire []byte
	for _, part := range [][]byte{[]byte("ecdsa-sha2-nistp256"), []byte("nistp256"), key.PublicKey().Bytes()} {
		wire = append(binary.BigEndian.AppendUint32(wire, uint32(len(part))), part...)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"ecdsa-sha2-nistp256 " + base64.StdEncoding.EncodeToString(wire) + "\n"
}

// pools writes a pool for each line of name and further keys.
func stockPools(lines ...[2]string) string {
	var text strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&text, "\n  - {name: %[1]s, scopes: [acme], labels: [self-hosted, %[1]s], cpu: 1, memory: 256MiB, growth: 1MiB, %[2]s}", l[0], l[1])
	}
	return text.String() + "\n"
}

// Images that nobody prepared for Paddock, on one node: its agent logs into a real OpenSSH
// server by password or by key, puts GitHub's runner there, and a shell step runs in the
// guest. A guest whose host key is another than that of the image's first clone is
// refused, and so is a login that the guest does not know; a pool with the wrong bootstrap
// for its image is told which one it wants.
func TestStockImages(t *testing.T) {
	s := newStable(t)
	stock, unkeyed, ours := s.push("acme/stock", stockGuest(t, true)), s.push("acme/unkeyed", stockGuest(t, false)), s.push("acme/ours", qemutest.Guest{})
	key, _ := stockKey(t, "admin")
	byPassword := fmt.Sprintf("bootstrap: ssh, ssh: {user: admin, password_file: %s}", s.write("password", stockPassword))
	s.open(3, stockPools(
		[2]string{"password", "image: " + stock + ", " + byPassword},
		[2]string{"key", fmt.Sprintf("image: %s, bootstrap: ssh, ssh: {user: admin, key_file: %s}", stock, s.write("key", key))},
		[2]string{"unkeyed", "image: " + unkeyed + ", " + byPassword},
		[2]string{"refused", fmt.Sprintf("image: %s, bootstrap: ssh, ssh: {user: admin, password_file: %s}", stock, s.write("wrong", "open barley"))},
		[2]string{"agentless", "image: " + stock + ", bootstrap: agent, deadlines: {boot: 25s}"},
		[2]string{"sshless", "image: " + ours + ", deadlines: {boot: 25s}, " + byPassword},
	), "mac-1")

	good := append(s.queueFor("password", "echo as $(whoami) on $(uname -m)"), s.queueFor("key", "echo as $(whoami) on $(uname -m)")...)
	for _, job := range good {
		s.firstOutput(job)
	}
	for _, job := range good {
		s.succeeds(job, "as admin on aarch64")
	}
	twins := s.queueFor("unkeyed", "echo first", "echo second")
	bad := map[string]fleet.JobID{}
	for _, pool := range []string{"refused", "agentless", "sshless"} {
		bad[pool] = s.queueFor(pool, "echo never")[0]
	}
	s.fails("unkeyed", "SSH host key is not the one pinned", "makes its host keys at its first boot")
	s.oneSucceeds(twins)
	for _, f := range []struct {
		pool  string
		wants []string
	}{
		{"refused", []string{"refused the SSH login: the password is wrong", "account of this image"}},
		{"sshless", []string{"bootstrap is ssh", "images with Paddock's guest agent want bootstrap: agent"}},
		{"agentless", []string{"did not answer within 25s", "bootstrap is agent", "stock images want bootstrap: ssh", "console ends", "Server listening on 0.0.0.0 port 22"}},
	} {
		s.fails(f.pool, f.wants...)
		if err := s.github.Cancel(bad[f.pool]); err != nil {
			t.Error(err)
		}
	}
	s.cleanHouse()
}

// firstOutput waits for a job's first line and logs how long each part of the way took.
func (s *stable) firstOutput(job fleet.JobID) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), jobTime)
	defer cancel()
	for {
		changed := s.github.Changed()
		if now, ok := s.github.Job(job); ok && now.Log != "" {
			s.logTimes(now, time.Now())
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			s.t.Fatalf("job %d says nothing within %v: %+v", job, jobTime, s.vms())
		}
	}
}

// logTimes logs, from the job's being queued, when its VM came into each state.
func (s *stable) logTimes(job githubtest.Job, output time.Time) {
	s.t.Helper()
	for _, row := range s.vms() {
		if row.Job != job.ID {
			continue
		}
		after := func(t time.Time) time.Duration { return t.Sub(job.QueuedAt).Round(10 * time.Millisecond) }
		s.t.Logf("pool %s: placed after %v, booting %v, guest answered %v, runner started %v, job begun %v, its output here %v",
			row.Pool, after(row.PlacedAt), after(row.BootingAt), after(row.WarmAt), after(row.RegisteredAt), after(job.StartedAt), after(output))
	}
}

// fails waits for a VM of a pool that has failed with all these words as its reason.
func (s *stable) fails(pool string, wants ...string) {
	s.t.Helper()
	s.await("the failure of a VM of pool "+pool, jobTime, func() error {
		var reasons []string
		for _, row := range s.vms() {
			if row.Pool != pool || row.State != "done" {
				continue
			}
			missing := ""
			for _, want := range wants {
				if !strings.Contains(row.Reason, want) {
					missing = want
				}
			}
			if missing == "" {
				s.t.Logf("pool %s: %s", pool, row.Reason)
				return nil
			}
			reasons = append(reasons, row.Reason)
		}
		return fmt.Errorf("its VMs ended as %q; want %q", reasons, wants)
	})
}

// oneSucceeds waits for one of two jobs' good end, and cancels the other.
func (s *stable) oneSucceeds(jobs []fleet.JobID) {
	s.t.Helper()
	s.await("the first clone's job", jobTime, func() error {
		for i, id := range jobs {
			if job, _ := s.github.Job(id); job.Status == fleet.JobCompleted && job.Conclusion == "success" {
				return s.github.Cancel(jobs[1-i])
			}
		}
		return fmt.Errorf("none of jobs %v has succeeded", jobs)
	})
}
