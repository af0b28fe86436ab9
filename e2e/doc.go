// Package e2e holds the tests that need a real runner: github-act-runner (MIT), which
// runs real steps without Docker, built from the version that actrunner/go.mod pins; and
// those that need a real registry: the distribution project's (Apache-2.0).
//
// It is a module of its own, as is the runner, so that their dependencies stay out of
// the product; nothing of it is shipped. The first run fetches and builds the runner,
// which takes half a minute.
//
// People and the continuous build call it with go test in this directory. After a change
// of the requirements above, go mod tidy here brings its own in line.
package e2e
