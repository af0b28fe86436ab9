package qemu

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxComplaint is how much of QEMU's standard error is kept, in bytes.
const maxComplaint = 4 << 10

// owner is the goroutine that starts QEMU and waits for it.
//
// The kernel's word "kill it when its parent dies" (PR_SET_PDEATHSIG) means the thread
// that started it, not the process: the Go runtime ends idle threads at will, and a
// QEMU would die of that in the middle of its job. So the goroutine that starts it keeps
// its thread to itself until QEMU has ended.
type owner struct {
	cmd    *exec.Cmd
	said   *complaint
	exited chan struct{} // closed when QEMU has ended and was reaped
}

// own starts cmd.
func own(cmd *exec.Cmd) (*owner, error) {
	o := &owner{cmd: cmd, said: &complaint{}, exited: make(chan struct{})}
	cmd.Stderr = o.said
	cmd.SysProcAttr = attributes()
	cmd.WaitDelay = time.Second // if somebody else holds its standard error
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // says no more than ProcessState
		close(o.exited)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", filepath.Base(cmd.Path), err)
	}
	return o, nil
}

// complaint keeps the beginning of what QEMU prints on its standard error.
type complaint struct {
	mu   sync.Mutex
	text []byte
}

func (c *complaint) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, p[:min(len(p), maxComplaint-len(c.text))]...)
	return len(p), nil
}

func (c *complaint) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}

// pair makes two connected streams: ours, and the end that QEMU inherits.
func pair(what string) (*net.UnixConn, *os.File, error) {
	syscall.ForkLock.RLock() // no fork between the making and the close-on-exec
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, fmt.Errorf("making the stream for %s: %w", what, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), what), os.NewFile(uintptr(fds[1]), what)
	conn, err := net.FileConn(ours)
	_ = ours.Close() // FileConn has its own
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("making the stream for %s: %w", what, err)
	}
	return conn.(*net.UnixConn), theirs, nil
}
