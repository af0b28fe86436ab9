// Package conformance holds the whole of Paddock to what GitHub does to its users: each
// test is one scenario (doubled, lost and late webhooks, stolen jobs, gates, limits, lost
// answers) played against the simulated GitHub, with nodes whose VMs are child processes.
//
// It has no code of its own beside its tests and is not about one package: what a single
// package can show is tested there. Nobody calls it; "make test" runs it.
package conformance
