package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

func tokenCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Who may speak to the controller"}
	cmd.AddCommand(tokenCreate(g), &cobra.Command{
		Use: "list", Short: "List the tokens in force", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			rows, err := client.Tokens(cmd.Context())
			if err != nil {
				return err
			}
			return show(cmd, g, rows, tokenColumns)
		},
	}, &cobra.Command{
		Use: "revoke ID", Short: "End a token at once", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			row, err := client.RevokeToken(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return show(cmd, g, []api.TokenRow{row}, tokenColumns)
		},
	})
	return cmd
}

func tokenCreate(g *globals) *cobra.Command {
	var role, node string
	var life time.Duration
	cmd := &cobra.Command{
		Use: "create [NAME]", Short: "Make a service token, or with --node a one-time join token", Args: cobra.MaximumNArgs(1),
		Example: `  paddock token create dashboard --role viewer
  paddock token create --node mac-7 | ssh mac-7 paddock node join -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := api.TokenRequest{Role: role, Life: life, Node: fleet.NodeID(node)}
			switch {
			case node != "" && (len(args) > 0 || role != ""):
				return usage("leave NAME and --role out", "--node makes a join token, which has no name and no role of its own")
			case node == "" && len(args) == 0:
				return usage("paddock token create NAME --role viewer", "a service token needs a name")
			case node == "" && role == "":
				return usage("--role viewer, operator, admin or pipeline", "a service token needs a role")
			case node == "":
				r.Name = args[0]
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			reply, err := client.CreateToken(cmd.Context(), r)
			if err != nil {
				return err
			}
			if g.output == "json" {
				return writeJSON(cmd.OutOrStdout(), reply)
			}
			// The token alone goes to standard output, so that it can be piped.
			_, err = fmt.Fprintf(cmd.ErrOrStderr(), "good until %s; it is shown this once:\n", reply.ExpiresAt.Local().Format(time.DateTime))
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), reply.Token)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&role, "role", "", "viewer, operator, admin or pipeline (which may list images, and nothing else yet)")
	cmd.Flags().StringVar(&node, "node", "", "make a one-time join token, good for 15 minutes, for a node of this name")
	cmd.Flags().DurationVar(&life, "life", 0, "how long it is good, like 720h; 90 days by default")
	complete(cmd, "role", "viewer", "operator", "admin", "pipeline")
	return cmd
}

var tokenColumns = []column[api.TokenRow]{
	{"ID", false, func(t api.TokenRow) string { return t.ID }},
	{"NAME", false, func(t api.TokenRow) string { return t.Name }},
	{"ROLE", false, func(t api.TokenRow) string { return t.Role }},
	{"CREATED", false, func(t api.TokenRow) string { return t.CreatedAt.Local().Format(time.DateTime) }},
	{"EXPIRES", false, func(t api.TokenRow) string { return t.ExpiresAt.Local().Format(time.DateTime) }},
	{"BY", false, func(t api.TokenRow) string { return t.CreatedBy }},
}
