//go:build vzstandin && !darwin

package vz

// hostBuild stands in for the build of a Mac's system.
func hostBuild() string { return "standin" }
