package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
)

func consoleCommand(g *globals) *cobra.Command {
	follow, raw := true, false
	cmd := &cobra.Command{
		Use: "console VM", Short: "Show what a VM's machine prints, from its beginning", Args: cobra.ExactArgs(1),
		Long: "Show what a VM's machine prints, from its beginning, until it ends or Ctrl-C; with --follow=false\nonly what is there.\n\n" + aboutVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			return printSession(cmd, g, args[0], api.SessionOrder{Kind: api.SessionConsole, Once: !follow}, raw)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", true, "go on with what comes")
	addRaw(cmd, &raw)
	return cmd
}

func logsCommand(g *globals) *cobra.Command {
	follow, raw := false, false
	cmd := &cobra.Command{
		Use: "logs VM", Short: "Show what a VM's runner prints", Args: cobra.ExactArgs(1),
		Long: "Show what is kept of a VM's runner's output, its last 64 KiB or more; with -f also what comes,\nuntil the runner ends or Ctrl-C. What a job's steps print is GitHub's to show.\n\n" + aboutVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			return printSession(cmd, g, args[0], api.SessionOrder{Kind: api.SessionLogs, Once: !follow}, raw)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	addRaw(cmd, &raw)
	return cmd
}

func addRaw(cmd *cobra.Command, raw *bool) {
	cmd.Flags().BoolVar(raw, "raw", false, "pass control characters on to the terminal; a guest can do much with them")
}

// printSession prints what a session has to say.
func printSession(cmd *cobra.Command, g *globals, word string, order api.SessionOrder, raw bool) error {
	client, err := g.streamClient()
	if err != nil {
		return err
	}
	if order.VM, err = findVM(cmd.Context(), client, word); err != nil {
		return err
	}
	stream, err := client.Session(cmd.Context(), order)
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	out := cmd.OutOrStdout()
	if !raw && isTerminal(out) {
		out = &tamer{to: out}
	}
	if _, err := io.Copy(out, stream); err != nil {
		return fmt.Errorf("the session broke off: %w (hint: paddock vm list shows whether the VM runs)", broken(err))
	}
	return nil
}

// broken makes words of how a stream ends whose other side was cut.
func broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the connection to the controller was cut")
	}
	return err
}

// isTerminal reports whether somebody looks at w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// tamer shows control characters, by which a guest could change what a terminal does or
// shows, as ^X; lines, tabs and returns pass.
type tamer struct {
	to   io.Writer
	half bool // the last byte began a character that may be a control (U+0080 to U+009F)
}

// c1 is the first byte of U+0080 to U+00BF in UTF-8.
const c1 = 0xc2

func (t *tamer) Write(p []byte) (int, error) {
	out := make([]byte, 0, len(p)+len(p)/8)
	for _, b := range p {
		if t.half {
			t.half = false
			if b >= 0x80 && b < 0xa0 {
				out = append(out, '^', '[', b-0x40) // as the two bytes that it stands for
				continue
			}
			out = append(out, c1)
		}
		switch {
		case b == c1:
			t.half = true
		case b == '\n' || b == '\t' || b == '\r' || b >= ' ' && b != 0x7f:
			out = append(out, b)
		default:
			out = append(out, '^', b^0x40)
		}
	}
	if _, err := t.to.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}
