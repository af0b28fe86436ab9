package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/host"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
)

func doctorCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "doctor", Short: "Say what on this machine stands in the way of VMs, and what to do", Args: cobra.NoArgs,
		Long: `Say what on this machine stands in the way of VMs, and what to do about it. It looks at this
host and asks the controller for its time; the agent need not run, and nothing is changed.

Each check is ok, warn (it works, but not well or not for long), fail (VMs do not start, stay
or get work) or skip (it cannot be known here, and why). The status is 1 if one fails.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.loadFor(cmd)
			if err != nil {
				return err
			}
			program, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			findings := host.Examine(cmd.Context(), subject(c, program))
			if err := show(cmd, g, findings, findingColumns); err != nil {
				return err
			}
			failed := 0
			for _, f := range findings {
				if f.Result == host.Fail {
					failed++
				}
			}
			if failed > 0 {
				return fmt.Errorf("%s failed (hint: the last column says what to do)", count(failed, "check"))
			}
			return nil
		},
	}
	addOverlays(cmd, agentOverlays...)
	return cmd
}

// subject is this node on this machine.
func subject(c *config.Config, program string) host.Subject {
	s := host.Subject{
		Node: c.Node, Pools: c.Pools, Program: program, Now: time.Now, Machine: host.This(),
		Credential: parts.CredentialPath(c.Node), Helpers: parts.HelpersDir(c.Node), HelperRole: parts.HelperRole,
	}
	s.Machine.Memory = parts.HostMemory()
	s.Joined = func() (host.Controller, error) {
		e, err := parts.ReadEndpoint(s.Credential)
		return host.Controller{URL: e.URL, Certificate: e.Certificate, Token: e.Token}, err
	}
	return s
}

var findingColumns = []column[host.Finding]{
	{"CHECK", false, func(f host.Finding) string { return f.Check }},
	{"RESULT", false, func(f host.Finding) string { return string(f.Result) }},
	{"FOUND", false, func(f host.Finding) string { return f.Text }},
	{"TO-DO", false, func(f host.Finding) string { return f.Fix }},
}
