//go:build !((darwin && arm64 && cgo) || vzstandin)

package vz_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vz"
)

var _ vm.Driver = (*vz.Driver)(nil)

// On every other platform the driver says what to use instead.
func TestOtherPlatforms(t *testing.T) {
	if _, err := vz.New(vz.Config{}); !errors.Is(err, vz.ErrPlatform) || !strings.Contains(err.Error(), "qemu") {
		t.Errorf("New: %v", err)
	}
	if err := vz.Install(t.Context(), vz.InstallConfig{}); !errors.Is(err, vz.ErrPlatform) {
		t.Errorf("Install: %v", err)
	}
}
