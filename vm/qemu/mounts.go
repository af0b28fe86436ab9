package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// shareDaemons are the places of virtiofsd, which serves a directory of the host to a
// guest; it is in no PATH. A Linux guest mounts it by "mount -t virtiofs NAME DIR".
var shareDaemons = []string{"/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"}

// maxTag is how long a share's name may be, in bytes: virtiofs has a field of that size.
const maxTag = 36

// checkMounts refuses shares that cannot be, before anything starts, and finds what
// serves the others; "" without shares.
func checkMounts(mounts []fleet.Mount) (daemon string, err error) {
	names := map[string]bool{}
	for _, m := range mounts {
		info, err := os.Stat(m.Path)
		switch {
		case names[m.Name]:
			return "", fmt.Errorf("two shares are called %q", m.Name)
		case err != nil:
			return "", fmt.Errorf("the share %q: %w", m.Name, err)
		case !info.IsDir():
			return "", fmt.Errorf("the share %q: %s is no directory", m.Name, m.Path)
		case m.Name == "" || len(m.Name) > maxTag || strings.ContainsRune(m.Name, ','):
			return "", fmt.Errorf("the share %q: its name must have 1 to %d bytes and no comma", m.Name, maxTag)
		case m.ReadOnly:
			return "", fmt.Errorf("the share %q: %w: QEMU's guests write to what they share with their host (hint: share a copy without read_only; the bootstrap self, whose orders are such a share, is for the driver vz: use agent or ssh)", m.Name, vm.ErrUnsupported)
		}
		names[m.Name] = true
	}
	if len(mounts) == 0 {
		return "", nil
	}
	if runtime.GOOS != "linux" {
		return "", fmt.Errorf("the share %q: %w: QEMU shares directories on Linux only", mounts[0].Name, vm.ErrUnsupported)
	}
	for _, path := range shareDaemons {
		if isFile(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("the share %q: virtiofsd is not installed (Debian 12: apt-get install qemu-system-common; later and Ubuntu: virtiofsd)", mounts[0].Name)
}

// share is one virtiofsd.
type share struct {
	name  string
	owner *owner
	conn  *os.File // QEMU's end of their stream
}

// errShare: virtiofsd failed, and so did QEMU, which only knows that nobody answers.
var errShare = errors.New("virtiofsd failed")

// end waits a moment for virtiofsd, which ends with QEMU and then has no child of its own
// any more, and kills it if it does not. The error is errShare if it had failed by itself.
func (s *share) end() error {
	_ = s.conn.Close()
	select {
	case <-s.owner.exited:
		return s.failure()
	case <-time.After(quitLimit):
	}
	_ = s.owner.cmd.Process.Kill()
	<-s.owner.exited
	return nil
}

// failure is why virtiofsd, which has ended, did so; nil if it ended with QEMU.
func (s *share) failure() error {
	state := s.owner.cmd.ProcessState
	if state.Success() {
		return nil
	}
	lines := strings.Split(strings.TrimSpace(s.owner.said.String()), "\n")
	why := lines[len(lines)-1] // it says before what it is about to do
	if strings.Contains(why, "not permitted") {
		why += " (hint: virtiofsd needs root: run the agent as a service of the system, not of a user)"
	}
	return fmt.Errorf("the share %q: %w: %s: %s", s.name, errShare, state, why)
}

// openShare starts virtiofsd for one directory, with a stream that is connected already.
func openShare(ctx context.Context, daemon string, m fleet.Mount, dir string) (*share, error) {
	listening, conn, err := rendezvous()
	if err != nil {
		return nil, fmt.Errorf("the share %q: %w", m.Name, err)
	}
	defer func() { _ = listening.Close() }()                                                                 // the child has its own
	cmd := exec.CommandContext(context.WithoutCancel(ctx), daemon, "--fd=3", "-o", "source="+escape(m.Path)) // 3: where ExtraFiles begin
	cmd.Dir = dir
	cmd.Env = append(vm.ChildEnv(), markEnv+"="+dir)
	cmd.ExtraFiles = []*os.File{listening}
	o, err := own(cmd)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("the share %q: %w", m.Name, err)
	}
	return &share{name: m.Name, owner: o, conn: conn}, nil
}

// escape is a path as an option's value.
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(path)
}

// rendezvous makes a stream for two programs of which one wants to accept: what listens,
// with our connection in its queue before anybody else can have found it.
func rendezvous() (listening, conn *os.File, err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			if err != nil {
				_ = unix.Close(fd)
			}
		}
	}()
	for range 2 {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|closeOnExec, 0)
		if err != nil {
			return nil, nil, err
		}
		fds = append(fds, fd)
	}
	// Without a name: the kernel gives it one, in no directory.
	if err := unix.Bind(fds[0], &unix.SockaddrUnix{}); err != nil {
		return nil, nil, err
	}
	name, err := unix.Getsockname(fds[0])
	if err := errors.Join(err, unix.Listen(fds[0], 1)); err != nil {
		return nil, nil, err
	}
	if err := unix.Connect(fds[1], name); err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "virtiofsd's listener"), os.NewFile(uintptr(fds[1]), "QEMU's share"), nil
}

// shareArgs are QEMU's arguments for the shares, whose streams it inherits from the
// number first on. Shared memory is what virtiofsd reads and writes the guest's in.
func (p *plan) shareArgs(first int) []string {
	if len(p.spec.Mounts) == 0 {
		return nil
	}
	args := []string{"-object", fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", p.memory>>20)}
	for i, m := range p.spec.Mounts {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=share%d,fd=%d", i, first+i),
			"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=share%d,tag=%s", i, m.Name))
	}
	return args
}
