package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// compare holds a page to what was generated for it; -update writes it.
func compare(t *testing.T, path, generated string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(generated), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(page), generated); diff != "" {
		t.Errorf("%s is not up to date (go test ./cmd/paddock -run %s -update writes it):\n%s", filepath.Base(path), t.Name(), diff)
	}
}

// docs/cli.md is made of the commands themselves.
func TestCLIReference(t *testing.T) {
	root := newRoot()
	var b strings.Builder
	b.WriteString("# The command line\n\nGenerated from the commands; `paddock COMMAND --help` shows the same.\n\n")
	b.WriteString(strings.ReplaceAll(root.Long, "\n  ", "\n    ") + "\n\nEvery command takes:\n" + flagText(root.PersistentFlags().FlagUsages()))
	b.WriteString(`
Lists ask the controller on this host, whose data directory they find by the configuration. For one
elsewhere, set ` + "`PADDOCK_URL`" + `, ` + "`PADDOCK_TOKEN`" + ` and, if its certificate is self-made, ` + "`PADDOCK_CERTIFICATE`" + `
(the hash that it logs at its start).

Exit status: 0 done, 1 it failed, 2 the command line is wrong, 130 interrupted. An error is one line, with a hint.
`)
	describe(&b, root)
	compare(t, "../../docs/cli.md", b.String())
}

// describe writes the commands below cmd, in the order of their names.
func describe(b *strings.Builder, cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		if c.Hidden || c.Name() == "help" {
			continue
		}
		leaf := !c.HasSubCommands()
		if leaf || c.RunE != nil && c.Annotations["group"] == "" {
			fmt.Fprintf(b, "\n## %s\n\n%s\n", c.UseLine(), or(c.Long, c.Short+"."))
			if alias := c.Parent().Aliases; len(alias) > 0 {
				fmt.Fprintf(b, "\n`paddock %s` is `paddock %s`, too.\n", alias[0], c.Parent().Name())
			}
			if c.Example != "" {
				fmt.Fprintf(b, "\n```\n%s\n```\n", c.Example)
			}
			b.WriteString(flagText(c.LocalNonPersistentFlags().FlagUsages()))
		}
		if c.Name() == "completion" {
			b.WriteString("\n## paddock completion bash|zsh|fish|powershell\n\nPrint the shell's completion script; `--help` of each says where it belongs.\n")
			continue
		}
		describe(b, c)
	}
}

// flagText is what --help shows of flags, without --help itself.
func flagText(usages string) string {
	var b strings.Builder
	for line := range strings.Lines(usages) {
		if !strings.Contains(line, "--help") && !strings.Contains(line, "--version") {
			b.WriteString(strings.TrimPrefix(line, "  "))
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return "\n```\n" + b.String() + "```\n"
}

// The metrics of docs/operations.md are those that a controller serves when jobs have
// run, one of them heard of by the sweep.
func TestMetricsReference(t *testing.T) {
	tw := openTown(t, 2, "mac-1")
	tw.queue(1, 0.1)
	tw.waitDone(1, time.Minute)
	tw.github.SetFaults(githubtest.Faults{Delivery: func(githubtest.Delivery) githubtest.Fate { return githubtest.Fate{Drop: true} }})
	tw.queue(1, 0.1)
	tw.waitDone(2, time.Minute)

	const begin, end = "<!-- metrics: generated -->\n", "<!-- end -->\n"
	page, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(page), begin)
	_, after, found := strings.Cut(rest, end)
	if !found {
		t.Fatalf("docs/operations.md has no place between %q and %q", begin, end)
	}
	var table string
	tw.eventually(20*time.Second, func() error {
		table = metricTable(t, tw.scrape())
		for _, late := range []string{"paddock_vms_ended_total", "paddock_starts_total", "paddock_feed_recovered_jobs_total"} {
			if !strings.Contains(table, "`"+late) {
				return fmt.Errorf("%s is not served", late)
			}
		}
		return nil
	})
	compare(t, "../../docs/operations.md", before+begin+table+end+after)
}

// scrape reads /metrics as Prometheus does.
func (tw *town) scrape() string {
	tw.t.Helper()
	e, err := parts.ReadEndpoint(filepath.Join(tw.dir, "data", parts.CLIFile))
	if err != nil {
		tw.t.Fatal(err)
	}
	request, err := http.NewRequestWithContext(tw.t.Context(), http.MethodGet, e.URL+"/metrics", nil)
	if err != nil {
		tw.t.Fatal(err)
	}
	response, err := (&http.Client{Transport: parts.Trusting()}).Do(request)
	if err != nil {
		tw.t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		tw.t.Fatalf("%s: %v", response.Status, err)
	}
	return string(text)
}

var (
	metricHelp  = regexp.MustCompile(`(?m)^# HELP (paddock_\w+) (.*)$`)
	metricType  = regexp.MustCompile(`(?m)^# TYPE (paddock_\w+) (\w+)$`)
	metricUse   = regexp.MustCompile(`(?m)^(paddock_\w+?)(?:_bucket)?\{(.*)\} `)
	metricLabel = regexp.MustCompile(`(\w+)="`)
)

// metricTable lists our metrics with their labels, by name.
func metricTable(t *testing.T, text string) string {
	t.Helper()
	labels, types := map[string]map[string]bool{}, map[string]string{}
	for _, m := range metricType.FindAllStringSubmatch(text, -1) {
		types[m[1]], labels[m[1]] = m[2], map[string]bool{}
	}
	for _, m := range metricUse.FindAllStringSubmatch(text, -1) {
		for _, l := range metricLabel.FindAllStringSubmatch(m[2], -1) {
			if of := labels[m[1]]; of != nil && l[1] != "le" {
				of[l[1]] = true
			}
		}
	}
	rows := []string{}
	for _, m := range metricHelp.FindAllStringSubmatch(text, -1) {
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s | %s |\n", m[1], types[m[1]], strings.Join(slices.Sorted(maps.Keys(labels[m[1]])), ", "), m[2]))
	}
	if len(rows) < 10 {
		t.Fatalf("only %d metrics", len(rows))
	}
	slices.Sort(rows)
	return "| metric | type | labels | |\n|---|---|---|---|\n" + strings.Join(rows, "")
}
