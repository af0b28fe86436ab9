package parts

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/paddock-ci/paddock/cmd/internal/config"
)

// What runs guests on this host is found out by the agent, once: a helper that was told
// "auto" would try it again at every boot.
func TestAccelerationIsFoundOutOnce(t *testing.T) {
	accel := func(driver, asked string) string {
		t.Helper()
		argv, err := helperCommand(t.Context(), NodeConfig{
			Self: []string{"paddock"}, Node: config.Node{Driver: driver, QEMU: config.QEMU{Accel: asked, Network: "none"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return argv[slices.Index(argv, "-accel")+1]
	}
	if got := accel(config.DriverQEMU, "auto"); got != "tcg" && got != "native" {
		t.Errorf("auto came to %q", got)
	}
	for _, asked := range []string{"tcg", "kvm"} {
		if got := accel(config.DriverQEMU, asked); got != asked {
			t.Errorf("%s came to %q", asked, got)
		}
	}
	if got := accel(config.DriverProcess, "auto"); got != "auto" {
		t.Errorf("a driver without came to %q", got)
	}
	if _, err := Driver(config.DriverQEMU, config.QEMU{Accel: "native"}, nil); err != nil {
		t.Errorf("what a helper is told: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := helperCommand(ended, NodeConfig{Node: config.Node{Driver: config.DriverQEMU, QEMU: config.QEMU{Accel: "auto"}}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}
