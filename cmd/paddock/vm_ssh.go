package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
)

func sshCommand(g *globals) *cobra.Command {
	user, port, onlyPrint := "admin", 22, false
	cmd := &cobra.Command{
		Use: "ssh VM [-- ARGS]", Short: "Log into a VM by SSH", Args: cobra.MinimumNArgs(1),
		Long: `Run this host's ssh with a connection to the VM's own SSH server; ARGS are added to ssh's
arguments: a command, or options. The VM has to have a server and a login that you know: stock
macOS images have admin with the password admin.

The VM's host key is not checked, for it is as new as the VM: that is right here only because
the connection comes through the controller, which has checked who you are and which node
answers. Your SSH agent and X11 are not forwarded into the VM unless ARGS say so, and nothing is
written into your known_hosts.

` + aboutVM,
		Example: "paddock vm ssh 3k8x\npaddock vm ssh 3k8x -- sw_vers\npaddock vm ssh 3k8x -- -L 8080:localhost:80 -N",
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.streamClient()
			if err != nil {
				return err
			}
			if port < 1 || port > 65535 {
				return usage("1 to 65535", "%d is no port", port)
			}
			vm, err := findVM(cmd.Context(), client, args[0])
			if err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			argv := g.sshArgv(self, vm, port, user, args[1:])
			if onlyPrint {
				_, err := fmt.Fprintln(cmd.OutOrStdout(), quoteAll(argv))
				return err
			}
			return replaceBy(argv)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "l", user, "who to log in as")
	cmd.Flags().IntVar(&port, "port", port, "the SSH server's port in the VM")
	cmd.Flags().BoolVar(&onlyPrint, "print", false, "print the command instead of running it")
	return cmd
}

// sshArgv is the command line of ssh for a VM.
func (g *globals) sshArgv(self string, vm fleet.VMID, port int, user string, more []string) []string {
	proxy := []string{self}
	if g.config != "" {
		path := g.config
		if absolute, err := filepath.Abs(path); err == nil {
			path = absolute
		}
		proxy = append(proxy, "--config", path)
	}
	if g.url != "" {
		proxy = append(proxy, "--url", g.url)
	}
	proxy = append(proxy, "vm", "forward", "--stdio", string(vm), fmt.Sprint(port))
	argv := []string{
		"ssh",
		"-o", "ProxyCommand=" + strings.ReplaceAll(quoteAll(proxy), "%", "%%"), // ssh has tokens that begin with %
		"-o", "HostKeyAlias=paddock-" + string(vm),
		"-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR",
		"-o", "ForwardAgent=no", "-o", "ForwardX11=no", "-o", "ControlMaster=no", "-o", "ControlPath=none",
		"-l", user, "paddock-" + string(vm),
	}
	return append(argv, more...)
}

// replaceBy makes this process another program, which has the terminal and the signals.
func replaceBy(argv []string) error {
	path, err := exec.LookPath(argv[0])
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("no %s on this host (hint: install OpenSSH's client, or use paddock vm forward VM 22 with another)", argv[0])
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("run %s: %w", path, syscall.Exec(path, argv, os.Environ()))
}

// quoteAll makes one line of words for a shell.
func quoteAll(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = quoteWord(w)
	}
	return strings.Join(quoted, " ")
}

// plainBytes need no quotes in any shell.
const plainBytes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=./:,@%+"

func quoteWord(w string) string {
	if w != "" && strings.Trim(w, plainBytes) == "" {
		return w
	}
	return guest.Quote(w)
}
