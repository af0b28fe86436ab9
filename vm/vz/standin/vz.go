// Package vz stands in for github.com/Code-Hex/vz/v3 where there is no Mac: the part of
// its API that Paddock's driver uses, with its rules and its traps, and no machine behind
// it. It is Paddock's own code, under Paddock's licence, and no copy of the real package.
//
// It knows the states of a machine and which verb is allowed in which, the limit of two
// macOS guests, what a configuration must have, what can be saved and what a saved state
// must match. Where the real package brings the process down by an exception, this one
// panics. What a guest does, and what goes wrong, comes from the test (standin_hooks.go).
//
// It is no proof that Apple's framework takes what this takes. The names are compared
// with the real package's by tools/apicheck. Called by the tests of vm/vz, by way of a
// replace directive and the tag vzstandin.
package vz

import (
	"errors"
	"fmt"

	"github.com/Code-Hex/vz/v3/internal/objc"
)

type pointer = objc.Pointer

// ErrUnsupportedOSVersion: the host's system is too old.
var ErrUnsupportedOSVersion = errors.New("unsupported macOS version")

// available says whether the host's system is at least of that version.
func available(version float64) error {
	if hooks().macOS() < version {
		return ErrUnsupportedOSVersion
	}
	return nil
}

// raise is what an Objective-C exception does to a process.
func raise(format string, args ...any) { panic("exception: " + fmt.Sprintf(format, args...)) }

// NSError is an error of the framework's.
type NSError struct {
	Domain               string
	Code                 int
	LocalizedDescription string
	UserInfo             string
}

func (n *NSError) Error() string {
	if n == nil {
		return "<nil>"
	}
	return fmt.Sprintf("Error Domain=%s Code=%d Description=%q UserInfo=%s", n.Domain, n.Code, n.LocalizedDescription, n.UserInfo)
}

// ErrorCode is a code of VZErrorDomain.
type ErrorCode int

// The codes that the driver or the stand-in use.
const (
	ErrorInternal                             ErrorCode = 1
	ErrorInvalidVirtualMachineConfiguration   ErrorCode = 2
	ErrorInvalidVirtualMachineState           ErrorCode = 3
	ErrorInvalidVirtualMachineStateTransition ErrorCode = 4
	ErrorVirtualMachineLimitExceeded          ErrorCode = 6
	ErrorOperationCancelled                   ErrorCode = 9
	ErrorNotSupported                         ErrorCode = 10
	ErrorSave                                 ErrorCode = 11
	ErrorRestore                              ErrorCode = 12
	ErrorInstallationFailed                   ErrorCode = 10007
)

func failure(code ErrorCode, format string, args ...any) error {
	return &NSError{Domain: "VZErrorDomain", Code: int(code), LocalizedDescription: fmt.Sprintf(format, args...), UserInfo: "{}"}
}
