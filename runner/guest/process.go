package guest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// pipeGrace is how long, after the runner's own process has ended, its output is still
// read from what it left behind: a daemon started by a step may hold the pipe forever.
const pipeGrace = 500 * time.Millisecond

// process is the runner's process and the leader of its own process group.
type process struct {
	cmd  *exec.Cmd
	out  *output
	gone chan struct{} // closed when it is reaped and its end is in the status
}

// startProcess starts the runner; busy is called when its output names a job. The
// process outlives ctx, which is the request's.
func startProcess(ctx context.Context, r Run, busy func(job string)) (*process, error) {
	out := &output{busy: busy}
	cmd := newCommand(ctx, r.Argv, r.Env, r.Dir, r.Input)
	cmd.Stdout, cmd.Stderr = out, out // one pipe, so the two keep their order
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &process{cmd: cmd, out: out, gone: make(chan struct{})}, nil
}

// newCommand is a program in a process group of its own, which outlives ctx.
func newCommand(ctx context.Context, argv []string, env map[string]string, dir string, input []byte) *exec.Cmd {
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = os.Environ()
	for key, value := range env {
		cmd.Env = append(cmd.Env, key+"="+value)
	}
	cmd.Stdin = bytes.NewReader(input) // a pipe that os/exec writes and closes
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = pipeGrace
	return cmd
}

// wait reaps the process, kills what is left of its group, and returns its exit status,
// 128 + n if signal n ended it, as a shell says it.
func (p *process) wait() int {
	_ = p.cmd.Wait() // what it can say beyond the state is a pipe that was held open
	p.kill()
	state, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && state.Signaled() {
		return 128 + int(state.Signal())
	}
	return p.cmd.ProcessState.ExitCode()
}

// kill ends the process group; a group that is gone is fine. It must not be called long
// after the leader was reaped: its number may then name a stranger's group.
func (p *process) kill() { _ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }
