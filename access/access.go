// Package access says who someone is and what they may do: roles, the signed tokens
// that carry them, and the fleet key from which every secret of a fleet is derived.
//
// It is pure: it is told the time, opens no file, keeps no list. Which tokens are
// revoked is asked of the caller, who keeps them in the ledger. It is not about GitHub's
// tokens (package github) nor about registries.
//
// The controller's HTTP interface (server) verifies and issues here, controller seals
// JIT configs, the node reads its join token, and the command line makes the key.
package access

import "fmt"

// Role is what a token's holder is.
type Role string

// The roles.
const (
	Viewer   Role = "viewer"   // people who look
	Operator Role = "operator" // people who run the fleet
	Admin    Role = "admin"    // people who let others in
	Pipeline Role = "pipeline" // a workflow that announces an image; no route takes that yet
	Node     Role = "node"     // one Mac; speaks only for itself
)

// Action is what someone wants to do.
type Action string

// The actions; each route of the HTTP interface needs one.
const (
	Read       Action = "read"        // jobs, VMs, nodes, events
	ReadImages Action = "read-images" // what is cached where
	Cache      Action = "cache"       // ask for an image to be held; no route needs it yet
	Operate    Action = "operate"     // cordon, drain, retire
	Tokens     Action = "tokens"      // make, list and revoke tokens
	Sync       Action = "sync"        // a node's report and orders
)

// Actions are all actions.
var Actions = []Action{Read, ReadImages, Cache, Operate, Tokens, Sync}

// Roles are all roles.
var Roles = []Role{Viewer, Operator, Admin, Pipeline, Node}

// allowed is the whole policy. A node reads nothing but its orders, so a stolen
// credential shows nothing of others; an admin cannot speak for a node.
var allowed = map[Role]map[Action]bool{
	Viewer:   {Read: true, ReadImages: true},
	Operator: {Read: true, ReadImages: true, Cache: true, Operate: true},
	Admin:    {Read: true, ReadImages: true, Cache: true, Operate: true, Tokens: true},
	Pipeline: {ReadImages: true, Cache: true},
	Node:     {Sync: true},
}

// Allows reports whether role may do action; unknown ones may not.
func Allows(role Role, action Action) bool { return allowed[role][action] }

// WhoMay lists the roles that may do action, for people.
func WhoMay(action Action) []string {
	var roles []string
	for _, role := range Roles {
		if Allows(role, action) {
			roles = append(roles, string(role))
		}
	}
	return roles
}

// ParseRole reads a role that people may hand out; nodes get theirs by joining.
func ParseRole(text string) (Role, error) {
	switch role := Role(text); role {
	case Viewer, Operator, Admin, Pipeline:
		return role, nil
	case Node:
		return "", &Error{Message: "a node's credential is not handed out",
			Hint: "make a one-time join token for the node instead (paddock token create --node NAME)"}
	}
	return "", &Error{Message: fmt.Sprintf("unknown role %q", text), Hint: "use viewer, operator, admin or pipeline"}
}

// Error is a refusal with what to do about it. The sentinels of this package are such
// errors; compare with errors.Is.
type Error struct {
	Message string
	Hint    string
}

func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + ": " + e.Hint
}

// Why a token, a key or a sealed text is refused.
var (
	ErrMalformed = &Error{"not a Paddock token", "it begins with pdk_ and is one line; copy it whole"}
	ErrSignature = &Error{"the token was not signed by this fleet's key",
		"it belongs to another fleet, or the fleet key was replaced; make a new one"}
	ErrExpired = &Error{"the token has expired", "make a new one (paddock token create, or paddock node join for a node)"}
	ErrRevoked = &Error{"the token was revoked", "ask whoever runs the fleet for a new one"}
	ErrKey     = &Error{"not a fleet key", "the key file holds 32 random bytes as 64 hex digits or in base64; paddock makes one"}
	ErrSealed  = &Error{"a sealed text cannot be opened", "it was sealed by another fleet key, or for another VM or runner"}
)
