package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/runner/guest"
)

func explainCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "explain ID", Short: "Say why a job waits, or what serves it", Args: cobra.ExactArgs(1),
		Long: `Say why a job waits, or what serves it. The answer comes from the same functions that place
jobs; the table shows what each node would mean for this one: the time until a slot is free,
until the image is there, until the VM has started (tier saved: from a saved state; cold: by
a boot) and all of it, or why the node is refused. -o wide says where the seconds are from.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := strconv.ParseInt(args[0], 10, 64)
			if err != nil || id <= 0 {
				return usage("a number like 30000000001; paddock job list shows them", "%q is not a job's id", args[0])
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			e, err := client.Explain(cmd.Context(), fleet.JobID(id))
			if err != nil {
				return err
			}
			if g.output == "json" {
				return writeJSON(cmd.OutOrStdout(), e)
			}
			return writeExplanation(cmd, g, e)
		},
	}
}

// writeExplanation says the answer first and shows the table behind it after.
func writeExplanation(cmd *cobra.Command, g *globals, e api.Explanation) error {
	var b strings.Builder
	fmt.Fprintf(&b, "job %d, queued %s ago", e.Job, short(e.Age))
	if e.Pool != "" {
		fmt.Fprintf(&b, ", pool %s", e.Pool)
	}
	if e.Duration > 0 {
		fmt.Fprintf(&b, ", usually runs %s", short(e.Duration))
	}
	b.WriteString("\n")
	switch {
	case e.Refusal.Refused():
		fmt.Fprintf(&b, "it gets no VM: %s\n", e.Refusal)
	case e.Wait != "":
		fmt.Fprintf(&b, "%s\n", guest.Plain(e.Wait, maxCell))
	case e.Choice != nil:
		fmt.Fprintf(&b, "a VM is being placed on %s\n", e.Choice.Node)
	}
	if e.Ahead > 0 {
		fmt.Fprintf(&b, "ahead of it: %s\n", count(e.Ahead, "job"))
	}
	if _, err := fmt.Fprint(cmd.OutOrStdout(), b.String()); err != nil || len(e.Options) == 0 {
		return err
	}
	if _, err := fmt.Fprintln(cmd.OutOrStdout()); err != nil {
		return err
	}
	return show(cmd, g, e.Options, optionColumns)
}

var optionColumns = []column[placement.Option]{
	{"NODE", false, func(o placement.Option) string { return string(o.Node) }},
	{"SLOT", false, figure(func(o placement.Option) time.Duration { return o.Slot })},
	{"IMAGE", false, figure(func(o placement.Option) time.Duration { return o.Image })},
	{"BOOT", false, figure(func(o placement.Option) time.Duration { return o.Boot })},
	{"TIER", false, func(o placement.Option) string { return string(o.Tier) }},
	{"READY-IN", false, figure(func(o placement.Option) time.Duration { return o.Ready })},
	{"PULL", false, func(o placement.Option) string { return size(o.Pull) }},
	{"REFUSED", false, func(o placement.Option) string { return string(o.Refusal) }},
	{"COST", true, figure(func(o placement.Option) time.Duration { return o.Cost })},
	{"STARTS-BY", true, func(o placement.Option) string { return o.Start }},
}

// figure shows a time of an option that is one.
func figure(of func(placement.Option) time.Duration) func(placement.Option) string {
	return func(o placement.Option) string {
		switch d := of(o); {
		case o.Refusal != "":
			return ""
		case d == 0:
			return "now"
		default:
			return short(d)
		}
	}
}
