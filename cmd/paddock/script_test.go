package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

var update = flag.Bool("update", false, "write what was found as what is wanted")

// TestScripts plays the sessions of testdata/script: what a person types and reads. Each
// may open a town of its own. Besides testscript's commands they have:
//
//	town SLOTS [NODE…]            a controller on Redis, the simulated GitHub, and nodes that joined
//	join NODE [FILE]              makes a join token, into the file or used at once
//	queue N SECONDS LABELS [gate] queues jobs; $JOB1, $JOB2 … are their ids. Instead of
//	                              seconds a name: they run until there is $TOWN/NAME
//	until PATTERN ARGS…           repeats paddock ARGS until its output matches
//	plain ARGS…                   runs paddock ARGS, and writes the output to the file plain
//	                              with everything that differs from run to run replaced
//	status N ARGS…                runs paddock ARGS, which must end with that status
//	registry NAME:TAG=PATTERN…    a registry on loopback, $REGISTRY, with these images
//	spoil FILE OFFSET             changes one byte of a file
//	agent STORE [DIGEST HOLDER…]  has a store open, and leases to the holders; agent stop
//	capture VAR FIELD             sets VAR to a field of the last output's last object
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			s := &session{t: t}
			testscript.Run(t, testscript.Params{
				Files: []string{file}, UpdateScripts: *update, RequireUniqueNames: true,
				Setup: func(e *testscript.Env) error {
					s.work = e.WorkDir
					e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"town": s.open, "join": s.join, "queue": s.queue, "until": s.until, "plain": s.plain, "status": s.status,
					"registry": s.registry, "spoil": s.spoil, "capture": s.capture, "agent": s.agent,
				},
			})
		})
	}
}

// session is one script with its town, if it opens one.
type session struct {
	t     *testing.T
	work  string // the script's directory
	town  *town
	store *cache.Store // that an agent has open; nil: none
}

func (s *session) open(ts *testscript.TestScript, neg bool, args []string) {
	slots, err := strconv.Atoi(args[0])
	ts.Check(err)
	s.town = openTown(s.t, slots, args[1:]...)
	endpoint, err := parts.ReadEndpoint(filepath.Join(s.town.dir, "data", parts.CLIFile))
	ts.Check(err)
	ts.Setenv("PADDOCK_CONFIG", s.town.config)
	ts.Setenv("URL", endpoint.URL)
	ts.Setenv("HASH", endpoint.Certificate)
	ts.Setenv("TOWN", s.town.dir)
}

func (s *session) join(ts *testscript.TestScript, neg bool, args []string) {
	token := s.town.run("token", "create", "--node", args[0])
	if len(args) > 1 {
		ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(token), 0o600))
		return
	}
	s.town.run("node", "join", strings.TrimSpace(token), "--name", args[0], "--dir", filepath.Join(s.town.dir, args[0]))
	s.town.startNode(args[0])
}

func (s *session) queue(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	job := githubtest.JobSpec{Name: "build", Labels: strings.Split(args[2], ","), Steps: []string{"echo hello"}, Matrix: n}
	if job.Seconds, err = strconv.ParseFloat(args[1], 64); err != nil {
		job.Steps = append(job.Steps, "until [ -e "+filepath.Join(s.town.dir, args[1])+" ]; do sleep 0.1; done")
	}
	if len(args) > 3 {
		job.Environment = args[3]
	}
	_, ids, err := s.town.github.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{job}})
	ts.Check(err)
	for i, id := range ids {
		ts.Setenv("JOB"+strconv.Itoa(i+1), strconv.FormatInt(int64(id), 10))
		want := fleet.JobQueued
		if job.Environment != "" {
			want = fleet.JobWaiting
		}
		s.repeat(ts, func() error {
			if list := s.town.run("job", "list", "--status", string(want)); !strings.Contains(list, fmt.Sprint(id)) && job.Environment != "" {
				return fmt.Errorf("job %d is not listed as %s", id, want)
			}
			return nil
		})
	}
}

func (s *session) until(ts *testscript.TestScript, neg bool, args []string) {
	want := regexp.MustCompile(args[0])
	s.repeat(ts, func() error {
		if err := ts.Exec("paddock", args[1:]...); err != nil {
			return err
		}
		if text := ts.ReadFile("stdout"); !want.MatchString(text) {
			return fmt.Errorf("no %s in:\n%s", want, text)
		}
		return nil
	})
}

// repeat repeats a check for a minute, which is long for all that scripts wait for.
func (s *session) repeat(ts *testscript.TestScript, check func() error) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-again.C {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not within a minute: %v", err)
		}
	}
}

// varying is what differs from run to run, in this order, and what is shown instead.
var varying = []struct {
	pattern *regexp.Regexp
	shown   string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z?`), "DATE"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "HOST"},
	{regexp.MustCompile(`\b[0-9a-f]{16}\b`), "ID"},
	{regexp.MustCompile(`\b\d+(\.\d+)? ([kMGT]?B)\b`), "SIZE"},
	{regexp.MustCompile(`\b(\d+m)?\d+(ms|s|m)\b`), "TIME"},
	{regexp.MustCompile(`linux/\w+|darwin/\w+`), "OS/ARCH"},
	{regexp.MustCompile(`devel(-\w+)?`), "VERSION"},
	{regexp.MustCompile(`VM [a-z0-9]{8}\b`), "VM ID"},
	{regexp.MustCompile(`(?m)^[a-z0-9]{8}(\s+mac-)`), "ID$1"},
	{regexp.MustCompile(`(paddock-town-)[a-z0-9]{8}`), "${1}ID"},
	{regexp.MustCompile(`\b300000\d{5}\b`), "JOB"},
	{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "DIGEST"},
	{regexp.MustCompile(`((?:cold|saved)\s+)\S+(\s+DIGEST)`), "${1}ADDRESS$2"}, // this host's, or none yet
	{regexp.MustCompile(`(?m)^(mac-\d+\s+)\d+(\s+SIZE)`), "${1}CPUS$2"},
	{regexp.MustCompile(`[ \t]{2,}`), "  "}, // columns are as wide as what was replaced
	{regexp.MustCompile(`(?m)[ \t]+$`), ""},
}

func (s *session) plain(ts *testscript.TestScript, neg bool, args []string) {
	ts.Check(ts.Exec("paddock", args...))
	text := ts.ReadFile("stdout")
	if s.town != nil {
		text = strings.ReplaceAll(text, s.town.dir, "$TOWN")
	}
	for _, v := range varying {
		text = v.pattern.ReplaceAllString(text, v.shown)
	}
	ts.Check(os.WriteFile(ts.MkAbs("plain"), []byte(text), 0o600))
}

func (s *session) status(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(ts.Exec("paddock", args[1:]...), &exit) {
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("paddock %s ended with status %d, want %d", strings.Join(args[1:], " "), got, want)
	}
	if text := ts.ReadFile("stderr"); got != 0 && (strings.Count(text, "\n") != 1 || !strings.Contains(text, "(hint: ")) {
		ts.Fatalf("not one line with a hint: %q", text)
	}
}
