package main

import (
	"context"
	"log/slog"

	"github.com/paddock-ci/paddock/runner/guest"
)

// portPath: a Mac has no virtio-serial ports with names.
func portPath() string { return "" }

func servePort(context.Context, string, *guest.Gate, *slog.Logger) error { return nil }

// haveVsock: every Mac in a machine has it.
func haveVsock() bool { return true }
