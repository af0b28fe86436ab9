//go:build !linux

package host

import "errors"

func askKVM() error { return errors.New("KVM is Linux's") }
