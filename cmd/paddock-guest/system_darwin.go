package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/runner/guest"
)

// addressTick is the time between two looks for an address that macOS brings.
const addressTick = 100 * time.Millisecond

// system is the machine as the agent changes it.
type system struct{}

var _ guest.System = (*system)(nil)

func newSystem(*slog.Logger) *system { return &system{} }

// run: macOS keeps its leases by itself.
func (s *system) run(context.Context) {}

// NetworkUp waits for the address that macOS brings.
func (s *system) NetworkUp(ctx context.Context) error {
	for {
		addresses, err := net.InterfaceAddrs()
		if err != nil {
			return fmt.Errorf("listing the network's addresses: %w", err)
		}
		for _, address := range addresses {
			if ip, _, err := net.ParseCIDR(address.String()); err == nil && ip.To4() != nil && ip.IsGlobalUnicast() {
				return nil
			}
		}
		select {
		case <-time.After(addressTick):
		case <-ctx.Done():
			return fmt.Errorf("waiting for an address: %w", ctx.Err())
		}
	}
}

// Shutdown asks macOS to, which takes its time; a host that cannot wait ends the machine.
func (s *system) Shutdown(ctx context.Context) error {
	return tryCommands(ctx, []string{"shutdown", "-h", "now"}, []string{"sudo", "-n", "shutdown", "-h", "now"})
}

// wake sets the clock and stirs the kernel's random pool.
func wake(now time.Time, entropy []byte) error {
	tv := unix.NsecToTimeval(now.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	if err := os.WriteFile("/dev/random", entropy, 0o600); err != nil {
		return fmt.Errorf("stirring the random pool: %w", err)
	}
	return nil
}

// plistPath starts the agent in the session of each user who logs in at the screen: jobs
// that test apps need that session. The second user's agent finds the port taken.
const plistPath = "/Library/LaunchAgents/org.paddock.guest.plist"

const plist = `<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
	<key>Label</key><string>org.paddock.guest</string>
	<key>ProgramArguments</key><array><string>%s</string></array>
	<key>LimitLoadToSessionType</key><string>Aqua</string>
	<key>RunAtLoad</key><true/>
	<key>KeepAlive</key><true/>
	<key>ThrottleInterval</key><integer>1</integer>
	<key>ProcessType</key><string>Interactive</string>
	<key>StandardErrorPath</key><string>/tmp/paddock-guest.log</string>
</dict>
</plist>
`

// install writes the property list; the next login reads it.
func install() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := os.WriteFile(plistPath, fmt.Appendf(nil, plist, self), 0o644); err != nil {
		return fmt.Errorf("installing: %w; run it with sudo", err)
	}
	fmt.Println(plistPath, "starts", self, "at the next login; let the user log in automatically")
	return nil
}
