package service

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// label is the agent's name at launchd.
const label = "org.paddock.node"

// launchd is a user's LaunchAgents on macOS.
type launchd struct{ c Config }

func (l *launchd) path() string {
	return filepath.Join(l.c.Home, "Library", "LaunchAgents", label+".plist")
}

// log is where the agent's output goes; launchd appends to it.
func (l *launchd) log() string {
	return filepath.Join(l.c.Home, "Library", "Logs", "Paddock", "node.log")
}

func (l *launchd) leftovers() []string {
	return []string{l.log(), filepath.Dir(l.log()), filepath.Dir(l.path())}
}

func (l *launchd) notes() []string {
	return []string{"its log: " + l.log(),
		"after an upgrade: launchctl kickstart -k " + l.target(),
		"it runs while its user is logged in at the display; for a Mac that nobody sits at, turn on automatic login"}
}

// text is the property list. AbandonProcessGroup is what lets VMs survive a restart: only
// the agent is signalled. Aqua is the session of a user at the display, without which
// there is no login keychain; Interactive keeps macOS from slowing VMs down as background
// work. It is restarted at most every 10 s, and has 60 s to end.
func (l *launchd) text() string {
	var b strings.Builder
	b.WriteString(xml.Header + `<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<!-- Written by "paddock node install"; "paddock node uninstall" removes it. -->
<plist version="1.0">
<dict>
`)
	b.WriteString("\t<key>Label</key>\n\t" + plistString(label) + "\n")
	b.WriteString("\t<key>ProgramArguments</key>\n\t<array>\n")
	for _, arg := range append([]string{l.c.Program}, l.c.Args...) {
		b.WriteString("\t\t" + plistString(arg) + "\n")
	}
	b.WriteString("\t</array>\n\t<key>EnvironmentVariables</key>\n\t<dict>\n")
	for _, v := range l.c.Env {
		b.WriteString("\t\t<key>" + escapeXML(v.Name) + "</key>\n\t\t" + plistString(v.Value) + "\n")
	}
	b.WriteString("\t</dict>\n")
	for _, key := range []string{"RunAtLoad", "KeepAlive", "AbandonProcessGroup"} {
		b.WriteString("\t<key>" + key + "</key>\n\t<true/>\n")
	}
	for _, pair := range [][2]string{
		{"LimitLoadToSessionType", "Aqua"}, {"ProcessType", "Interactive"},
		{"StandardOutPath", l.log()}, {"StandardErrorPath", l.log()},
	} {
		b.WriteString("\t<key>" + pair[0] + "</key>\n\t" + plistString(pair[1]) + "\n")
	}
	for _, pair := range [][2]string{{"ThrottleInterval", "10"}, {"ExitTimeOut", "60"}} {
		b.WriteString("\t<key>" + pair[0] + "</key>\n\t<integer>" + pair[1] + "</integer>\n")
	}
	b.WriteString("</dict>\n</plist>\n")
	return b.String()
}

func plistString(s string) string { return "<string>" + escapeXML(s) + "</string>" }

func escapeXML(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}

// domain is the user's session at the display, and target the agent in it.
func (l *launchd) domain() string { return fmt.Sprintf("gui/%d", l.c.UID) }
func (l *launchd) target() string { return l.domain() + "/" + label }

// loaded asks launchd, which fails for a name that it does not know.
func (l *launchd) loaded(ctx context.Context) (bool, error) {
	err := run(ctx, "launchctl", "print", l.target())
	var f *failure
	if errors.As(err, &f) && f.code > 0 {
		return false, nil
	}
	return err == nil, err
}

func (l *launchd) start(ctx context.Context, changed bool) error {
	loaded, err := l.loaded(ctx)
	if err != nil || loaded && !changed {
		return err
	}
	if err := l.stop(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(l.log()), 0o700); err != nil {
		return fmt.Errorf("make the log's directory: %w", err)
	}
	// An agent that was disabled once would be loaded and not run.
	if err := run(ctx, "launchctl", "enable", l.target()); err != nil {
		return err
	}
	if err := run(ctx, "launchctl", "bootstrap", l.domain(), l.path()); err != nil {
		return fmt.Errorf("%w (hint: the user must be logged in at the display, also when this is typed over SSH)", err)
	}
	return nil
}

// stop boots the agent out and waits until launchd has forgotten it, which is when the
// process has ended; loading it again before that fails.
func (l *launchd) stop(ctx context.Context) error {
	loaded, err := l.loaded(ctx)
	if err != nil || !loaded {
		return err
	}
	// 36 is EINPROGRESS: the agent is still ending.
	err = run(ctx, "launchctl", "bootout", l.target())
	if f := (*failure)(nil); err != nil && (!errors.As(err, &f) || f.code != 36) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		loaded, err := l.loaded(ctx)
		if err != nil || !loaded {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the agent to end: %w", ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}
