package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/store"
)

// The exit statuses besides 0.
const (
	exitFailed      = 1
	exitUsage       = 2   // the command line itself is wrong
	exitInterrupted = 130 // by Ctrl-C, as shells have it: 128 and the signal's number
)

// usageError is a mistake on the command line.
type usageError struct {
	what, hint string
}

func (e *usageError) Error() string { return e.what + " (hint: " + e.hint + ")" }

// usage is where every command's own checks of its flags and arguments come from.
func usage(hint, format string, args ...any) error {
	return &usageError{what: fmt.Sprintf(format, args...), hint: hint}
}

// strict makes every mistake on the command line one line with a hint, for the whole
// tree: cobra's own are several lines, or silent for a word that is no subcommand.
func strict(cmd *cobra.Command) {
	cmd.DisableFlagsInUseLine = true
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		what, _, _ := strings.Cut(err.Error(), ": strconv.")
		return usage(cmd.CommandPath()+" --help lists the flags", "%s", what)
	})
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args, cmd.RunE = cobra.ArbitraryArgs, group
		cmd.Annotations = map[string]string{"group": "yes"}
	} else if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usage("use it as: "+cmd.UseLine(), "%s %s", cmd.CommandPath(), wanted(cmd, args))
			}
			return nil
		}
	}
	for _, child := range cmd.Commands() {
		strict(child)
	}
}

// wanted says what is wrong with the number of arguments.
func wanted(cmd *cobra.Command, args []string) string {
	names := strings.Fields(cmd.Use)[1:]
	if len(args) > len(names) {
		return fmt.Sprintf("does not take %q", args[len(names)])
	}
	return "needs " + strings.Join(names[len(args):], " ")
}

// group is a command that only has subcommands.
func group(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	hint := cmd.CommandPath() + " --help lists them"
	cmd.SuggestionsMinimumDistance = 2 // edits
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = "did you mean " + strings.Join(near, " or ") + "? " + hint
	}
	return usage(hint, "%s has no command %q", cmd.CommandPath(), args[0])
}

// exitStatus tells a service manager or a script whose mistake it was.
func exitStatus(err error) int {
	if u := (*usageError)(nil); errors.As(err, &u) {
		return exitUsage
	}
	if i := (*interruptedError)(nil); errors.As(err, &i) {
		return exitInterrupted
	}
	return exitFailed
}

// maxAdvice bounds an error's line, in bytes.
const maxAdvice = 8 << 10

// advise makes one line of an error, with a hint if it has none and one is known. What it
// repeats of a guest's words does nothing to a terminal.
func advise(err error) string {
	text := err.Error()
	if refused := (*access.Error)(nil); errors.As(err, &refused) && refused.Hint != "" {
		text = strings.Replace(text, refused.Error(), refused.Message+" (hint: "+refused.Hint+")", 1)
	}
	text = guest.Plain(strings.ReplaceAll(strings.TrimSpace(text), "\n", "; "), maxAdvice)
	if strings.Contains(text, "(hint: ") {
		return text
	}
	if hint := hintFor(err); hint != "" {
		text += " (hint: " + hint + ")"
	}
	return text
}

// hintFor knows what people can do about the errors of systems below.
func hintFor(err error) string {
	var (
		authority x509.UnknownAuthorityError
		name      x509.HostnameError
		lookup    *net.DNSError
	)
	switch {
	case errors.Is(err, store.ErrDown):
		return "is Redis running there? redis: or PADDOCK_REDIS says where it is; without it the store is embedded"
	case errors.As(err, &authority), errors.As(err, &name):
		return "a controller with its own certificate logs its hash at its start; give it in PADDOCK_CERTIFICATE"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there; is the controller running? paddock up or paddock controller starts it"
	case errors.As(err, &lookup):
		return "check the host's name and this machine's DNS"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "check the address, the network and any firewall in between"
	case errors.Is(err, fs.ErrPermission):
		return "run as the user whom it belongs to, or name another place in the configuration"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return "check the path in the configuration, or make it"
	}
	return ""
}
