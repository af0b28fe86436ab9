// Package api is the controller's HTTP interface as types, routes and a client.
//
// It holds no handlers (those are in server) and no rules about who may do what
// (those are in access). Called by server, node and the command line.
package api
