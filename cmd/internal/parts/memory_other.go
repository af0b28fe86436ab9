//go:build !darwin

package parts

// darwinMemory is for hosts without /proc, which are darwin's.
func darwinMemory() int64 { return 0 }
