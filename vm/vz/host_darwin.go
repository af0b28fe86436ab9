//go:build darwin && ((arm64 && cgo) || vzstandin)

package vz

import "golang.org/x/sys/unix"

// hostBuild is the build of the host's system, e.g. 24G84; "" if it is not known, which
// then binds nothing.
func hostBuild() string {
	build, err := unix.Sysctl("kern.osversion")
	if err != nil {
		return ""
	}
	return build
}
