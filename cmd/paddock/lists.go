package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

func nodesCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "nodes", Short: "The machines that run VMs"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the nodes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			rows, err := client.Nodes(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd, g, rows, nodeColumns)
		},
	})
	for _, c := range []struct {
		use, short string
		call       func(*api.Client) func(*cobra.Command, fleet.NodeID) (api.NodeRow, error)
	}{
		{"cordon NODE", "Give a node nothing new", func(c *api.Client) func(*cobra.Command, fleet.NodeID) (api.NodeRow, error) {
			return func(cmd *cobra.Command, id fleet.NodeID) (api.NodeRow, error) { return c.Cordon(cmd.Context(), id) }
		}},
		{"remove NODE", "Forget a node that is out of service, and end its credentials", func(c *api.Client) func(*cobra.Command, fleet.NodeID) (api.NodeRow, error) {
			return func(cmd *cobra.Command, id fleet.NodeID) (api.NodeRow, error) { return c.RemoveNode(cmd.Context(), id) }
		}},
		{"uncordon NODE", "Let a node have work again", func(c *api.Client) func(*cobra.Command, fleet.NodeID) (api.NodeRow, error) {
			return func(cmd *cobra.Command, id fleet.NodeID) (api.NodeRow, error) { return c.Uncordon(cmd.Context(), id) }
		}},
	} {
		cmd.AddCommand(&cobra.Command{
			Use: c.use, Short: c.short, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				client, err := g.client()
				if err != nil {
					return err
				}
				row, err := c.call(client)(cmd, fleet.NodeID(args[0]))
				if err != nil {
					return err
				}
				return show(cmd, g, []api.NodeRow{row}, nodeColumns)
			},
		})
	}
	return cmd
}

var nodeColumns = []column[api.NodeRow]{
	{"NAME", false, func(n api.NodeRow) string { return string(n.ID) }},
	{"AVAILABLE-CPU", false, func(n api.NodeRow) string { return strconv.Itoa(n.CPU) }},
	{"AVAILABLE-MEMORY", false, func(n api.NodeRow) string { return size(n.Memory) }},
	{"SLOTS", false, func(n api.NodeRow) string { return fmt.Sprintf("%d/%d", n.Used, n.Slots) }},
	{"CACHED", false, func(n api.NodeRow) string { return strconv.Itoa(n.Images) }},
	{"STATUS", false, func(n api.NodeRow) string { return string(n.Status) }},
	{"DISK-FREE", true, func(n api.NodeRow) string { return size(n.DiskFree) }},
	{"PULL-RATE", true, func(n api.NodeRow) string {
		if n.PullRate == 0 {
			return ""
		}
		return size(n.PullRate) + "/s"
	}},
	{"SITE", true, func(n api.NodeRow) string { return n.Site }},
	{"PEER", true, func(n api.NodeRow) string { return n.Peer }},
	{"DRIVER", true, func(n api.NodeRow) string { return n.Driver }},
	{"PLATFORM", true, func(n api.NodeRow) string { return n.OS + "/" + n.Arch }},
	{"SEEN", true, func(n api.NodeRow) string { return ago(n.SeenAt) }},
	{"VERSION", true, func(n api.NodeRow) string { return n.Version }},
}

var vmColumns = []column[api.VMRow]{
	{"NAME", false, func(v api.VMRow) string { return string(v.ID) }},
	{"NODE", false, func(v api.VMRow) string { return string(v.Node) }},
	{"POOL", false, func(v api.VMRow) string { return string(v.Pool) }},
	{"STATUS", false, func(v api.VMRow) string {
		if v.Ending {
			return string(v.State) + " (ending)"
		}
		return string(v.State)
	}},
	{"SINCE", false, func(v api.VMRow) string { return ago(v.Since) }},
	{"START", false, func(v api.VMRow) string { return startWord(v.Cold) }},
	{"JOB", false, func(v api.VMRow) string { return v.JobName }},
	{"TIER", true, func(v api.VMRow) string { return string(v.Tier) }},
	{"ADDRESS", true, func(v api.VMRow) string { return v.Address }},
	{"IMAGE-ID", true, func(v api.VMRow) string { return v.Image.Short() }},
	{"RUNNER", true, func(v api.VMRow) string { return v.Runner }},
	{"REASON", true, func(v api.VMRow) string { return v.Reason }},
}

func startWord(cold bool) string {
	if cold {
		return "cold"
	}
	return "warm"
}

func imageCacheCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "imagecache", Aliases: []string{"ic"}, Short: "Images on nodes"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the images that nodes hold", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			rows, err := client.Images(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd, g, rows, imageColumns)
		},
	}, evictionsCommand(g))
	return cmd
}

var imageColumns = []column[api.ImageRow]{
	{"NAME", false, func(i api.ImageRow) string { return i.Name }},
	{"TAG", false, func(i api.ImageRow) string { return i.Tag }},
	{"IMAGE-ID", false, func(i api.ImageRow) string { return i.Digest.Short() }},
	{"SPACE-USED", false, func(i api.ImageRow) string { return size(i.SpaceUsed) }},
	{"NODES-COUNT", false, func(i api.ImageRow) string { return strconv.Itoa(i.NodesCount) }},
	{"CURRENT", true, func(i api.ImageRow) string { return map[bool]string{true: "yes", false: "no"}[i.Current] }},
	{"PULL-SIZE", true, func(i api.ImageRow) string { return size(i.Bytes) }},
	{"NODES", true, func(i api.ImageRow) string {
		var words []string
		for _, n := range i.Nodes {
			words = append(words, fmt.Sprintf("%s:%s", n.Node, n.State))
		}
		return strings.Join(words, ",")
	}},
}

func jobCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "job", Short: "Workflow jobs"}
	status := ""
	list := &cobra.Command{
		Use: "list", Short: "List jobs, oldest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			known := []fleet.JobStatus{"", fleet.JobWaiting, fleet.JobQueued, fleet.JobInProgress, fleet.JobCompleted}
			if !slices.Contains(known, fleet.JobStatus(status)) {
				return usage("waiting, queued, in_progress or completed", "unknown status %q", status)
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			rows, err := client.Jobs(cmd.Context(), fleet.JobStatus(status))
			if err != nil {
				return err
			}
			return show(cmd, g, rows, jobColumns)
		},
	}
	list.Flags().StringVar(&status, "status", "", "waiting, queued, in_progress or completed; all by default")
	complete(list, "status", "waiting", "queued", "in_progress", "completed")
	cmd.AddCommand(list, explainCommand(g))
	return cmd
}

var jobColumns = []column[api.JobRow]{
	{"ID", false, func(j api.JobRow) string { return strconv.FormatInt(int64(j.ID), 10) }},
	{"REPOSITORY", false, func(j api.JobRow) string { return j.Repository }},
	{"JOB", false, func(j api.JobRow) string { return j.Name }},
	{"STATUS", false, func(j api.JobRow) string { return or(j.Conclusion, string(j.Status)) }},
	{"AGE", false, func(j api.JobRow) string { return ago(j.CreatedAt) }},
	{"NODE", false, func(j api.JobRow) string { return string(j.Node) }},
	{"START", false, func(j api.JobRow) string { return j.Start }},
	{"DELAY", false, func(j api.JobRow) string {
		if j.Phases == nil {
			return ""
		}
		return short(j.Phases.Total())
	}},
	{"POOL", true, func(j api.JobRow) string { return string(j.Pool) }},
	{"VM", true, func(j api.JobRow) string { return string(j.VM) }},
	{"LABELS", true, func(j api.JobRow) string { return j.Labels.Key() }},
	{"QUEUE", true, phase(func(p *api.Phases) time.Duration { return p.Queue })},
	{"PULL", true, phase(func(p *api.Phases) time.Duration { return p.Pull })},
	{"BOOT", true, phase(func(p *api.Phases) time.Duration { return p.Boot })},
	{"REGISTER", true, phase(func(p *api.Phases) time.Duration { return p.Register })},
	{"HEARD-BY", true, func(j api.JobRow) string { return string(j.Feed) }},
}

func phase(of func(*api.Phases) time.Duration) func(api.JobRow) string {
	return func(j api.JobRow) string {
		if j.Phases == nil {
			return ""
		}
		return short(of(j.Phases))
	}
}
