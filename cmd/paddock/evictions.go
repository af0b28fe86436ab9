package main

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
)

func evictionsCommand(g *globals) *cobra.Command {
	var (
		node string
		free config.Size
	)
	cmd := &cobra.Command{
		Use: "evictions", Short: "Say which images would leave which node, and why the others stay", Args: cobra.NoArgs,
		Long: `Say which images would leave which node, in which order, and why the others stay. Nothing is
done: it is a dry run of what the controller does by itself when an image that a job waits for
needs room, or the clones of VMs do. An image goes (the controller orders it now), is going (it was
ordered, or the node is at it), would be next, or stays. With --free, it is as if so much had to be
free on the node.`,
		Example: "paddock imagecache evictions --node mac-1 --free 150GB",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			nodes, err := client.Evictions(cmd.Context(), fleet.NodeID(node), int64(free))
			if err != nil {
				return err
			}
			if g.output == "json" {
				return writeJSON(cmd.OutOrStdout(), nodes)
			}
			return writeEvictions(cmd, g, nodes)
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "of this node only")
	cmd.Flags().Var(&free, "free", "so much is to be free on the node (default: what is kept for clones)")
	return cmd
}

// evictionRow is an image on a node in the table.
type evictionRow struct {
	node fleet.NodeID
	placement.ImageEviction
}

// writeEvictions shows a line for each node, and the table of the images behind it.
func writeEvictions(cmd *cobra.Command, g *globals, nodes []api.NodeEvictions) error {
	var rows []evictionRow
	for _, n := range nodes {
		goes, frees := 0, int64(0)
		for _, i := range n.Images {
			rows = append(rows, evictionRow{n.Node, i})
			if i.Fate == placement.FateGoes || i.Fate == placement.FateGoing {
				goes, frees = goes+1, frees+i.DiskBytes
			}
		}
		line := fmt.Sprintf("%s: nothing goes", n.Node)
		if goes > 0 {
			line = fmt.Sprintf("%s: %s of %s %s", n.Node, count(goes, "image"), or(size(frees), "0 B"), map[bool]string{true: "goes", false: "go"}[goes == 1])
		}
		line += fmt.Sprintf("; %s free now, %s then, %s kept for clones", or(size(n.DiskFree), "0 B"), or(size(n.Free), "0 B"), or(size(n.Growth), "0 B"))
		if n.Want > n.Free {
			line += fmt.Sprintf(", %s short of what is to be free", size(n.Want-n.Free))
		}
		if !n.Reachable {
			line += "; it is silent, so nothing is ordered"
		}
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), line); err != nil {
			return err
		}
	}
	if len(nodes) > 0 {
		if _, err := fmt.Fprintln(cmd.OutOrStdout()); err != nil {
			return err
		}
	}
	return show(cmd, g, rows, evictionColumns)
}

var evictionColumns = []column[evictionRow]{
	{"NODE", false, func(r evictionRow) string { return string(r.node) }},
	{"TURN", false, func(r evictionRow) string {
		if r.Turn == 0 {
			return ""
		}
		return strconv.Itoa(r.Turn)
	}},
	{"FATE", false, func(r evictionRow) string { return string(r.Fate) }},
	{"NAME", false, func(r evictionRow) string { return r.Ref }},
	{"IMAGE-ID", false, func(r evictionRow) string { return r.Digest.Short() }},
	{"STATUS", true, func(r evictionRow) string { return string(r.State) }},
	{"SPACE-USED", false, func(r evictionRow) string { return size(r.DiskBytes) }},
	{"WHY", false, func(r evictionRow) string { return r.Why }},
}
