package service

import (
	"context"
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
)

// unitName is the unit's, in the user's own manager.
const unitName = "paddock-node.service"

// systemd is a user's manager on Linux.
type systemd struct{ c Config }

func (s *systemd) dir() string {
	home := s.c.ConfigHome
	if home == "" {
		home = filepath.Join(s.c.Home, ".config")
	}
	return filepath.Join(home, "systemd", "user")
}

func (s *systemd) path() string { return filepath.Join(s.dir(), unitName) }

func (s *systemd) leftovers() []string {
	wants := filepath.Join(s.dir(), "default.target.wants")
	return []string{filepath.Join(wants, unitName), wants, s.dir(), filepath.Dir(s.dir())}
}

// lingering holds a file for each user whose manager runs without a login.
const lingering = "/var/lib/systemd/linger"

func (s *systemd) notes() []string {
	notes := []string{"its log: journalctl --user -u " + unitName, "after an upgrade: systemctl --user restart " + unitName}
	who, err := user.LookupId(strconv.Itoa(s.c.UID))
	if err != nil {
		return notes
	}
	if !there(filepath.Join(lingering, who.Username)) {
		notes = append(notes, fmt.Sprintf("it ends, with its VMs, when %s logs out, and does not start at boot; to change that: sudo loginctl enable-linger %s", who.Username, who.Username))
	}
	return notes
}

// text is the unit. KillMode=process is what lets VMs survive a restart: only the agent is
// signalled. OOMPolicy keeps systemd from stopping the agent when the kernel ended one VM
// for want of memory. It never gives up restarting: nobody else would.
func (s *systemd) text() string {
	var b strings.Builder
	b.WriteString(`# Written by "paddock node install"; "paddock node uninstall" removes it.
[Unit]
Description=Paddock: this machine's agent
StartLimitIntervalSec=0

[Service]
Type=exec
`)
	// The colon: no variables are put in for $ in what follows.
	command := append([]string{s.c.Program}, s.c.Args...)
	if strings.ContainsAny(s.c.Program, `"'\`) {
		// systemd takes no program whose path has one of these, however it is quoted. The
		// shell makes way for the agent, which so is the process that is signalled.
		command = append([]string{"/bin/sh", "-c", `exec "$0" "$@"`}, command...)
	}
	b.WriteString("ExecStart=:" + quoteUnit(command[0]))
	for _, arg := range command[1:] {
		b.WriteString(" " + quoteUnit(arg))
	}
	b.WriteString("\n")
	for _, v := range s.c.Env {
		b.WriteString("Environment=" + quoteUnit(v.Name+"="+v.Value) + "\n")
	}
	b.WriteString(`KillMode=process
TimeoutStopSec=60
Restart=always
RestartSec=5
OOMPolicy=continue

[Install]
WantedBy=default.target
`)
	return b.String()
}

// unitQuotes escapes what means something within quotes: \ and " to the reader of the
// line, % to what fills in specifiers.
var unitQuotes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`)

func quoteUnit(word string) string { return `"` + unitQuotes.Replace(word) + `"` }

func (s *systemd) start(ctx context.Context, changed bool) error {
	if err := systemctl(ctx, "daemon-reload"); err != nil {
		return fmt.Errorf("%w (hint: a user's systemd runs in a login session; over sudo or su, use: machinectl shell USER@)", err)
	}
	if err := systemctl(ctx, "enable", unitName); err != nil {
		return err
	}
	if changed {
		return systemctl(ctx, "restart", unitName)
	}
	return systemctl(ctx, "start", unitName)
}

func (s *systemd) stop(ctx context.Context) error {
	if !there(s.path()) {
		return nil // a unit without a file is none; systemctl would fail
	}
	if err := systemctl(ctx, "disable", "--now", unitName); err != nil {
		return err
	}
	_ = systemctl(ctx, "reset-failed", unitName) // it fails if there is nothing to forget
	return nil
}

func systemctl(ctx context.Context, args ...string) error {
	return run(ctx, "systemctl", append([]string{"--user"}, args...)...)
}
