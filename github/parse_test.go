package github

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
)

// examples are five real deliveries, as published.
func examples(t testing.TB) []json.RawMessage {
	t.Helper()
	raw, err := os.ReadFile("testdata/workflow_job-examples.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []json.RawMessage
	if err := json.Unmarshal(raw, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		panic(err)
	}
	return t
}

// v1 is a delivery id of 2014-04-25T12:52:24.582Z.
const v1 = "72d3162e-cc78-11e3-81ab-4c9367dc0958"

// What GitHub's own examples say, field by field.
func TestParseJobExamples(t *testing.T) {
	gate := uuidTime(v1)
	want := []fleet.Job{
		{ID: 289782451, RunID: 2202229078, RunAttempt: 1, Repository: "Codertocat/Hello-World", Public: true, Name: "update", Workflow: "CodeQL",
			Labels: fleet.Labels{"ubuntu-latest"}, Status: fleet.JobQueued, Gate: gate, Installation: 3456996, CreatedAt: at("2021-09-13T02:21:13Z")},
		{ID: 12877621891, RunID: 4747967848, RunAttempt: 1, Repository: "lineville/elastic-machines-testing", Public: true, Name: "test", Workflow: "Env Test",
			Labels: fleet.Labels{"k8s", "self-hosted"}, Status: fleet.JobWaiting, Gate: at("2023-04-19T21:12:14Z").UnixMilli(), Installation: 23154469, CreatedAt: at("2023-04-19T21:12:12Z")},
		{ID: 12877621891, RunID: 4747967848, RunAttempt: 1, Repository: "lineville/elastic-machines-testing", Public: true, Name: "test", Workflow: "Env Test",
			Labels: fleet.Labels{"k8s", "self-hosted"}, Status: fleet.JobWaiting, Gate: gate, Installation: 23154469, CreatedAt: at("2023-04-19T21:12:12Z")},
		{ID: 289782451, RunID: 2202229078, RunAttempt: 1, Repository: "Codertocat/Hello-World", Public: true, Name: "linters", Workflow: "CodeQL",
			Labels: fleet.Labels{"ubuntu-latest"}, Status: fleet.JobCompleted, Conclusion: "success", RunnerName: "GitHub Actions 5",
			CreatedAt: at("2021-08-05T10:33:58Z"), StartedAt: at("2021-08-05T10:34:58Z"), CompletedAt: at("2021-08-05T10:38:16Z")},
		{ID: 2832853555, RunID: 940463255, RunAttempt: 1, Repository: "octo-org/example-workflow", Name: "Test workflow",
			Labels: fleet.Labels{"db-app", "dc-03", "gpu"}, Status: fleet.JobInProgress, RunnerName: "my runner",
			CreatedAt: at("2021-06-15T19:22:27Z"), StartedAt: at("2021-06-15T19:22:27Z")},
	}
	for i, payload := range examples(t) {
		got, err := ParseJob(payload, v1)
		if err != nil {
			t.Fatalf("example %d: %v", i, err)
		}
		if diff := cmp.Diff(want[i], got); diff != "" {
			t.Errorf("example %d (-want +got):\n%s", i, diff)
		}
	}
}

// Action and status decide together.
func TestDecide(t *testing.T) {
	for _, c := range []struct {
		action, status string
		want           fleet.JobStatus
	}{
		{"queued", "queued", fleet.JobQueued},
		{"queued", "waiting", fleet.JobWaiting},
		{"waiting", "queued", fleet.JobWaiting},
		{"waiting", "waiting", fleet.JobWaiting},
		{"in_progress", "queued", fleet.JobInProgress},
		{"in_progress", "in_progress", fleet.JobInProgress},
		{"queued", "in_progress", fleet.JobInProgress},
		{"queued", "completed", fleet.JobCompleted},
		{"completed", "in_progress", fleet.JobCompleted},
		{"waiting", "requested", fleet.JobWaiting},
		{"queued", "pending", fleet.JobWaiting},
		{"invented", "queued", fleet.JobQueued},
		{"completed", "invented", fleet.JobCompleted},
		{"invented", "invented", ""},
	} {
		if got, ok := decide(c.action, c.status); got != c.want || ok != (c.want != "") {
			t.Errorf("action %s, status %s: %q %v, want %q", c.action, c.status, got, ok, c.want)
		}
	}
}

func TestUUIDTime(t *testing.T) {
	for guid, want := range map[string]string{
		v1:                                     "2014-04-25T12:52:24Z",
		"72D3162E-CC78-11E3-81AB-4C9367DC0958": "2014-04-25T12:52:24Z",
		"72d3162e-cc78-41e3-81ab-4c9367dc0958": "", // version 4: random
		"72d3162ecc7811e381ab4c9367dc0958":     "",
		"zzd3162e-cc78-11e3-81ab-4c9367dc0958": "",
		"00000000-0000-1000-8000-000000000000": "", // 1582: before 1970
		"":                                     "",
	} {
		got := uuidTime(guid)
		if want == "" && got != 0 || want != "" && time.UnixMilli(got).UTC().Truncate(time.Second) != at(want) {
			t.Errorf("%s: %d (%v), want %q", guid, got, time.UnixMilli(got).UTC(), want)
		}
	}
}

// Payloads that are not what GitHub sends: each is malformed and says how.
func TestMalformed(t *testing.T) {
	for _, c := range []struct{ payload, says string }{
		{``, "unexpected end"},
		{`[]`, "cannot unmarshal"},
		{`{}`, "no workflow_job"},
		{`{"workflow_job":null}`, "no workflow_job"},
		{`{"workflow_job":{"id":0}}`, "job id 0"},
		{`{"workflow_job":{"id":"1"}}`, "cannot unmarshal"},
		{`{"workflow_job":{"id":1}}`, "full_name"},
		{`{"workflow_job":{"id":1},"repository":{"full_name":"nothing"}}`, "full_name"},
		{`{"workflow_job":{"id":1},"repository":{"full_name":"a/b/c"}}`, "full_name"},
		{`{"workflow_job":{"id":1},"repository":{"full_name":"a/b"}}`, "neither action"},
		{`{"action":"queued","workflow_job":{"id":1,"created_at":"yesterday"},"repository":{"full_name":"a/b"}}`, "parsing time"},
		{`{"action":"queued","workflow_job":{"id":1,"labels":"macos"},"repository":{"full_name":"a/b"}}`, "cannot unmarshal"},
	} {
		_, err := ParseJob([]byte(c.payload), "")
		if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want ErrMalformed that says %q", c.payload, err, c.says)
		}
	}
}

// A payload that does not say private is of a public repository: the safe side.
func TestPublicUnlessPrivate(t *testing.T) {
	for repository, public := range map[string]bool{
		`{"full_name":"a/b"}`: true, `{"full_name":"a/b","private":null}`: true,
		`{"full_name":"a/b","private":false}`: true, `{"full_name":"a/b","private":true}`: false,
	} {
		job, err := ParseJob([]byte(`{"action":"queued","workflow_job":{"id":1,"labels":[" X ","x",""]},"repository":`+repository+`}`), "")
		if err != nil || job.Public != public || job.Labels.Key() != "x" || job.Gate != 0 {
			t.Errorf("%s: %v, job %+v", repository, err, job)
		}
	}
}

func FuzzParseJob(f *testing.F) {
	for _, payload := range examples(f) {
		f.Add([]byte(payload), v1)
	}
	f.Add([]byte(`{"action":"queued","workflow_job":{"id":1},"repository":{"full_name":"a/b"}}`), "")
	f.Fuzz(func(t *testing.T, payload []byte, guid string) {
		job, err := ParseJob(payload, guid)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%v is not ErrMalformed", err)
			}
			return
		}
		if fleet.StatusRanks[job.Status].Rank == 0 || job.ID <= 0 || job.Gate < 0 || !isRepository(job.Repository) {
			t.Errorf("job %+v", job)
		}
		if diff := cmp.Diff(fleet.NewLabels(job.Labels...), job.Labels); diff != "" {
			t.Errorf("labels are not normal: %s", diff)
		}
		if _, err := json.Marshal(job); err != nil {
			t.Errorf("it cannot be stored: %v", err)
		}
	})
}
