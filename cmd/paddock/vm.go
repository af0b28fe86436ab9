package main

import "github.com/spf13/cobra"

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
	})
	return cmd
}
