//go:build vzstandin

package vz

import (
	"testing"
	"time"
)

// Hasten makes the driver wait no longer than d for what nobody else bounds.
func Hasten(t *testing.T, d time.Duration) {
	end, wake := endTime, wakeTime
	endTime, wakeTime = d, d
	t.Cleanup(func() { endTime, wakeTime = end, wake })
}
