package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

func vmCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "vm", Short: "Virtual machines"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the VMs", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			rows, err := client.VMs(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd, g, rows, vmColumns)
		},
	}, sshCommand(g), forwardCommand(g), consoleCommand(g), logsCommand(g))
	return cmd
}

// aboutVM is what every command that takes a VM says of it.
const aboutVM = `VM is its name, a beginning of it that no other VM has, or the id of the job that it serves.
The way into it is the connection that its node holds to the controller: no port is opened on
the node or in the network. It needs the role operator, and is noted in the events. -o does not
apply: what comes out are the VM's own bytes.`

// streamClient is client for a command whose output is the VM's.
func (g *globals) streamClient() (*api.Client, error) {
	if g.output == "json" {
		return nil, usage("leave it out", "-o json is for lists: this command's output is a stream of the VM's bytes")
	}
	return g.client()
}

// findVM finds the one VM that is meant by what a person typed.
func findVM(ctx context.Context, client *api.Client, word string) (fleet.VMID, error) {
	rows, err := client.VMs(ctx)
	if err != nil {
		return "", err
	}
	var over, running []api.VMRow
	for _, row := range rows {
		switch {
		case string(row.ID) == word:
			return row.ID, nil
		case !strings.HasPrefix(string(row.ID), word) && (row.Job == 0 || strconv.FormatInt(int64(row.Job), 10) != word):
		case row.State.Final():
			over = append(over, row)
		default:
			running = append(running, row)
		}
	}
	// One that runs is meant rather than one that is over.
	found := running
	if len(found) == 0 {
		found = over
	}
	if len(found) == 1 && word != "" {
		return found[0].ID, nil
	}
	if len(found) == 0 {
		return "", fmt.Errorf("no VM %q (hint: paddock vm list shows them; paddock job list -o wide which job has which)", word)
	}
	var names []string
	for _, row := range found {
		names = append(names, string(row.ID))
	}
	slices.Sort(names)
	return "", fmt.Errorf("%q is the beginning of %d VMs (hint: say more of one of %s)", word, len(names), strings.Join(names[:min(len(names), 8)], ", "))
}
