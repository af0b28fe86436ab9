//go:build !((darwin && arm64 && cgo) || vzstandin)

package vz

import (
	"context"

	"github.com/paddock-ci/paddock/vm"
)

// Driver boots nothing here.
type Driver struct{}

// New says that there is no such driver here.
func New(Config) (*Driver, error) { return nil, ErrPlatform }

// Boot says the same.
func (*Driver) Boot(context.Context, vm.Spec) (vm.Machine, error) { return nil, ErrPlatform }

// Install says the same.
func Install(context.Context, InstallConfig) error { return ErrPlatform }
