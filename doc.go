// Package paddock is the front page of the module: it holds no code, and nothing
// imports it. The packages beside it are the architecture; each opens with a comment
// that says what it is, what it is not and who calls it.
//
// They stand on floors, and a package imports lower floors only:
//
//	5  cmd/paddock, cmd/paddock-demo
//	4  sim
//	3  webhook  feed  controller  server  node  web
//	2  store  github  cache  vm  api
//	1  runner  placement  demand  image  access
//	0  fleet
//
// The test beside this file holds every package to that table.
package paddock
