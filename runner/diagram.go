package runner

import (
	"fmt"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// Diagram renders the table as the page docs/runner-life.md: a Mermaid diagram for
// readers with pictures and the same as text for those without. A test compares the
// page with it.
func Diagram() string {
	var b strings.Builder
	b.WriteString("# The life of a runner\n\n" +
		"Generated from the table in `runner/life.go`; `go test ./runner -update` writes it again.\n\n" +
		"The leader writes *placed* and *given up*; the node that runs the machine does everything else.\n" +
		"*done* and *lost* are final: a VM in them never moves again.\n\n" +
		"```mermaid\nstateDiagram-v2\n    [*] --> placed\n")
	for _, row := range Table {
		fmt.Fprintf(&b, "    %s --> %s: %s\n", row.From, row.To, row.On)
	}
	for _, s := range States {
		if s.Final() {
			fmt.Fprintf(&b, "    %s --> [*]\n", s)
		}
	}
	b.WriteString("```\n\n| in state |")
	for _, e := range Events {
		fmt.Fprintf(&b, " %s |", e)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(Events)) + "\n")
	for _, s := range States {
		fmt.Fprintf(&b, "| %s |%s\n", s, cells(s))
	}
	return b.String()
}

// cells is one line of the text table: where each event leads from s.
func cells(s fleet.VMState) string {
	var b strings.Builder
	for _, e := range Events {
		if to, ok := Next(s, e); ok {
			fmt.Fprintf(&b, " → %s |", to)
		} else {
			b.WriteString(" |")
		}
	}
	return b.String()
}
