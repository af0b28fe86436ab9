package placement

import "time"

// What is assumed where nothing was measured.
const (
	// DefaultBoot is clone and boot of a macOS guest on Apple Silicon until its agent
	// answers: 6 s is usual. It is the same everywhere, so it moves no choice.
	DefaultBoot = 6 * time.Second
	// DefaultWaitCap: nobody is overtaken for longer than half an hour.
	DefaultWaitCap = 30 * time.Minute
)
