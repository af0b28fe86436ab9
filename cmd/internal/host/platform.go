package host

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/vm/qemu"
)

// macOS releases that decide something.
const (
	macLeast    = 13 // the driver's configuration of machines
	macStates   = 14 // saved states
	macKeychain = 15 // machines want an unlocked login keychain; Local Network is asked for
)

// onMac is false for a system or a driver to which a check of vz's does not apply, with
// the finding that says so.
func onMac(s *Subject) (Finding, bool) {
	switch {
	case s.Machine.OS != "darwin":
		return skip("it concerns macOS only"), false
	case s.Node.Driver != config.DriverVZ:
		return skip("it concerns the driver vz only"), false
	}
	return Finding{}, true
}

// macVersion is macOS's, "15.1" and 15.
func macVersion(ctx context.Context, s *Subject) (string, int, error) {
	out, err := s.Machine.Run(ctx, "sw_vers", "-productVersion")
	if err != nil {
		return "", 0, fmt.Errorf("sw_vers: %s", said(out, err))
	}
	version := strings.TrimSpace(out)
	first, _, _ := strings.Cut(version, ".")
	major, err := strconv.Atoi(first)
	if err != nil {
		return "", 0, fmt.Errorf("sw_vers says %.40q", version)
	}
	return version, major, nil
}

// sinceKeychain is false before the release that brought in keychain and Local Network.
func sinceKeychain(ctx context.Context, s *Subject) (Finding, bool) {
	if f, mac := onMac(s); !mac {
		return f, false
	}
	version, major, err := macVersion(ctx, s)
	switch {
	case err != nil:
		return skip("macOS's version is not known: %v", err), false
	case major < macKeychain:
		return skip("macOS %s does not ask for it; %d and later do", version, macKeychain), false
	}
	return Finding{}, true
}

func checkDriver(ctx context.Context, s *Subject) Finding {
	switch s.Node.Driver {
	case config.DriverVZ:
		return checkVZ(ctx, s)
	case config.DriverQEMU:
		return checkQEMU(ctx)
	case config.DriverProcess:
		return warn("for runners of others' code, use driver vz (macOS) or qemu (Linux)",
			"process: jobs run as processes of this user, without isolation")
	}
	return fail("set node.driver to vz, qemu or process", "driver %q is not known", s.Node.Driver)
}

func checkVZ(ctx context.Context, s *Subject) Finding {
	if s.Machine.OS != "darwin" || s.Machine.Arch != "arm64" {
		return fail("use driver qemu or process here", "vz needs a Mac with Apple Silicon, this is %s/%s", s.Machine.OS, s.Machine.Arch)
	}
	version, major, err := macVersion(ctx, s)
	switch {
	case err != nil:
		return skip("macOS's version is not known: %v", err)
	case major < macLeast:
		return fail("update macOS", "macOS %s is too old for the driver, which needs %d", version, macLeast)
	case major < macStates && s.Node.States():
		return warn(fmt.Sprintf("update to macOS %d, or set node.saved_states to false", macStates),
			"macOS %s saves no states of machines: every start is a boot", version)
	}
	return found("vz on macOS %s", version)
}

func checkQEMU(ctx context.Context) Finding {
	driver, err := qemu.New(qemu.Config{})
	if err != nil {
		return fail("this is a fault in paddock", "%v", err)
	}
	about, err := driver.About(ctx, "")
	if err != nil {
		return fail("install QEMU for guests of this host's architecture", "%v", err)
	}
	if about.Firmware == "" {
		return warn("for images that boot by a boot loader: apt-get install "+about.Packages,
			"%s at %s; without firmware, only images with a kernel boot", about.Version, about.Path)
	}
	return found("%s at %s, firmware %s", about.Version, about.Path, about.Firmware)
}

// entitlement without which the framework refuses every machine.
const entitlement = "com.apple.security.virtualization"

func checkEntitlement(ctx context.Context, s *Subject) Finding {
	if f, mac := onMac(s); !mac {
		return f
	}
	fix := fmt.Sprintf("codesign --force --sign - --entitlements paddock.entitlements '%s', as the build does", s.Program)
	out, err := s.Machine.Run(ctx, "codesign", "-d", "--entitlements", "-", "--xml", s.Program)
	switch {
	case ctx.Err() != nil:
		return skip("codesign did not answer")
	case err != nil:
		return fail(fix, "the program's signature cannot be read: %s", said(out, err))
	}
	if !strings.Contains(strings.Join(strings.Fields(out), ""), "<key>"+entitlement+"</key><true/>") {
		return fail(fix, "the program is not signed with the entitlement %s", entitlement)
	}
	return found("the program is signed with %s", entitlement)
}

func checkUser(_ context.Context, s *Subject) Finding {
	switch {
	case s.Machine.UID != 0:
		return found("an ordinary user, %s", s.Machine.User)
	case s.Machine.OS == "darwin":
		return fail("run the agent as the user who is logged in: paddock node install, without sudo",
			"root: a daemon has neither a login keychain nor a display session")
	}
	return warn("run the agent as a user of its own", "root: what breaks out of a VM is root, too")
}

func checkKeychain(ctx context.Context, s *Subject) Finding {
	if f, needed := sinceKeychain(ctx, s); !needed {
		return f
	}
	// A shell over SSH has a security session of its own, in which the keychain is locked
	// whatever it is at the display.
	session, err := s.Machine.Run(ctx, "launchctl", "managername")
	if session = strings.TrimSpace(session); err != nil || session != "Aqua" {
		f := skip("this shell is not in the display session, which alone can tell (session %.40q)", session)
		f.Fix = fmt.Sprintf("run it there, or: sudo launchctl asuser %d sudo -u %s paddock node doctor", s.Machine.UID, s.Machine.User)
		return f
	}
	out, err := s.Machine.Run(ctx, "security", "show-keychain-info", filepath.Join(s.Machine.Home, "Library", "Keychains", "login.keychain-db"))
	switch {
	case ctx.Err() != nil:
		return fail("unlock it at the display; log in with the account's password, not by a key alone", "the login keychain asks to be unlocked")
	case err != nil:
		return fail("security unlock-keychain; with automatic login it is unlocked at every start", "the login keychain is locked or not there: %s", said(out, err))
	}
	return found("the login keychain is unlocked")
}

func checkDisplay(ctx context.Context, s *Subject) Finding {
	if f, mac := onMac(s); !mac {
		return f
	}
	out, err := s.Machine.Run(ctx, "stat", "-f", "%Su", "/dev/console")
	if err != nil {
		return skip("who is at the display is not known: %s", said(out, err))
	}
	if who := strings.TrimSpace(out); who != s.Machine.User {
		return fail(fmt.Sprintf("log %s in at the display (also by screen sharing), and turn on automatic login", s.Machine.User),
			"the display belongs to %s, not to %s", who, s.Machine.User)
	}
	return found("%s is logged in at the display", s.Machine.User)
}

// checkKVM only reports: whether KVM runs a guest is known after a guest's boot.
func checkKVM(_ context.Context, s *Subject) Finding {
	switch {
	case s.Machine.OS != "linux":
		return skip("it concerns Linux only")
	case s.Node.Driver != config.DriverQEMU:
		return skip("it concerns the driver qemu only")
	}
	err := s.Machine.KVM()
	state := "it answers"
	if err != nil {
		state = err.Error()
	}
	switch {
	case s.Node.QEMU.Accel != "kvm":
		return skip("accel is %s, which does not rely on it (%s)", s.Node.QEMU.Accel, state)
	case err != nil:
		return fail("set node.qemu.accel to auto; if this host has KVM, add the user to the group kvm", "KVM cannot be used: %v", err)
	}
	return warn("set node.qemu.accel to auto, which boots a guest before it relies on it",
		"KVM answers, but whether it runs a guest is not known before one has booted")
}
