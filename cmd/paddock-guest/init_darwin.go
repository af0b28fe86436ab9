package main

import "log/slog"

// beInit is for Linux: process 1 of a Mac is launchd.
func beInit(*slog.Logger) {}
