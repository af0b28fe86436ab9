// Package imagebench measures what moving images costs, beside other ways to move them:
// pulls, next tags, rollouts over many nodes, clones.
//
// It holds benchmarks only. What is compared runs in one benchmark, in turns, each in a
// process of its own, whose time, memory and disk traffic the kernel counts; the registry
// is a process too, and serves a large image from files. Called by make bench; its one
// test runs the whole on a small image, so that the benchmarks cannot rot.
package imagebench
