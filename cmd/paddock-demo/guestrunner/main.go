// Command guestrunner is the demo's runner as a program of its own, for guests that are
// real machines: there the demo itself is not at hand. It reads a JIT config from its
// standard input, runs one job of the simulated GitHub and ends with the job's status.
//
// It is no runner for GitHub. The demo builds it and puts it into its guests.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

func main() {
	code, err := testrunner.Run(context.Background(), os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "guestrunner:", err)
		code = 1
	}
	os.Exit(code)
}
