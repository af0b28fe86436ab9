package githubtest

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// The paths of repositories and organizations: runs, jobs, runners.

// repo finds the repository of the path, if the token may see it.
func (g *GitHub) repo(c *call) *repository {
	r := g.repositories[strings.ToLower(c.PathValue("owner")+"/"+c.PathValue("repo"))]
	if r == nil || r.owner != c.account {
		return nil
	}
	return r
}

func (g *GitHub) getRepository(c *call) answer {
	r := g.repo(c)
	if r == nil {
		return notFound
	}
	return ok(r.full())
}

// rest is a job as REST answers it.
func (j *job) rest() object { return j.fields() }

func (g *GitHub) getJob(c *call) answer {
	r, j := g.repo(c), g.jobs[fleet.JobID(c.pathID("job_id"))]
	if r == nil || j == nil || j.run.repo != r {
		return notFound
	}
	return ok(j.rest())
}

func (g *GitHub) listRuns(c *call) answer {
	r := g.repo(c)
	if r == nil {
		return notFound
	}
	status := c.URL.Query().Get("status")
	all := []object{}
	for _, id := range slices.Backward(slices.Sorted(maps.Keys(g.runs))) {
		found := g.runs[id]
		is, conclusion := found.state()
		if found.repo == r && (status == "" || status == is || status == conclusion) {
			all = append(all, found.object())
		}
	}
	part, link := page(c, all)
	return answer{status: http.StatusOK, link: link, body: object{"total_count": len(all), "workflow_runs": part}}
}

// run finds the run of the path.
func (g *GitHub) run(c *call) *run {
	r, found := g.repo(c), g.runs[c.pathID("run_id")]
	if r == nil || found == nil || found.repo != r {
		return nil
	}
	return found
}

func (g *GitHub) getRun(c *call) answer {
	r := g.run(c)
	if r == nil {
		return notFound
	}
	return ok(r.object())
}

// listRunJobs lists the jobs of the latest attempt (filter=latest, the default), of one
// attempt (in the path), or of all (filter=all).
func (g *GitHub) listRunJobs(c *call) answer {
	r := g.run(c)
	if r == nil {
		return notFound
	}
	attempt := int(c.pathID("attempt_number"))
	if attempt == 0 && c.URL.Query().Get("filter") != "all" {
		attempt = r.attempt
	}
	all := []object{}
	for _, j := range r.jobs {
		if attempt == 0 || j.attempt == attempt {
			all = append(all, j.rest())
		}
	}
	part, link := page(c, all)
	return answer{status: http.StatusOK, link: link, body: object{"total_count": len(all), "jobs": part}}
}

func (g *GitHub) cancelRun(c *call) answer {
	r := g.run(c)
	if r == nil {
		return notFound
	}
	if status, _ := r.state(); status == "completed" {
		return refuse(http.StatusConflict, "Cannot cancel a workflow run that is completed")
	}
	for _, j := range r.latest() {
		if j.status != fleet.JobCompleted {
			g.cancel(j)
		}
	}
	g.touch()
	return answer{status: http.StatusAccepted, body: object{}}
}

// scope is the scope of the path, if the token may register runners there.
func (g *GitHub) scope(c *call) (fleet.Scope, bool) {
	if org := c.PathValue("org"); org != "" {
		a := g.accounts[strings.ToLower(org)]
		if a == nil || a != c.account || a.kind != "Organization" {
			return "", false
		}
		return fleet.Scope(a.login), true
	}
	r := g.repo(c)
	if r == nil {
		return "", false
	}
	return fleet.Scope(r.Name), true
}

func (g *GitHub) listGroups(c *call) answer {
	scope, known := g.scope(c)
	if !known {
		return notFound
	}
	all := []object{}
	for _, group := range append([]Group{{Org: string(scope), ID: 1, Name: "Default"}}, g.c.Groups...) {
		if !strings.EqualFold(group.Org, string(scope)) {
			continue
		}
		visibility := "all"
		if group.Repositories != nil {
			visibility = "selected"
		}
		all = append(all, object{
			"id": group.ID, "name": group.Name, "visibility": visibility, "default": group.ID == 1, "inherited": false,
			"allows_public_repositories": true,
			"runners_url":                fmt.Sprintf("%s/orgs/%s/actions/runner-groups/%d/runners", apiURL, scope, group.ID),
		})
	}
	part, link := page(c, all)
	return answer{status: http.StatusOK, link: link, body: object{"total_count": len(all), "runner_groups": part}}
}

func (g *GitHub) listRunners(c *call) answer {
	scope, known := g.scope(c)
	if !known {
		return notFound
	}
	name := c.URL.Query().Get("name")
	all := []object{}
	for _, r := range g.sortedRunners() {
		if r.scope == scope && (name == "" || r.name == name) {
			all = append(all, r.object())
		}
	}
	part, link := page(c, all)
	return answer{status: http.StatusOK, link: link, body: object{"total_count": len(all), "runners": part}}
}

// runner finds the runner of the path.
func (g *GitHub) runner(c *call) *runner {
	scope, known := g.scope(c)
	if !known {
		return nil
	}
	return g.runners[runnerKey{strings.ToLower(string(scope)), c.pathID("runner_id")}]
}

func (g *GitHub) getRunner(c *call) answer {
	r := g.runner(c)
	if r == nil {
		return notFound
	}
	return ok(r.object())
}

func (g *GitHub) deleteRunner(c *call) answer {
	r := g.runner(c)
	if r == nil {
		return notFound
	}
	if r.job != nil {
		return refuse(http.StatusUnprocessableEntity,
			fmt.Sprintf("Bad request - Runner %q is currently running a job and cannot be deleted.", r.name))
	}
	g.removeRunner(r)
	g.touch()
	return answer{status: http.StatusNoContent}
}

// Application is a runner that GitHub offers for download, in its words.
type Application struct {
	OS, Arch  string // osx or linux; arm64 or x64
	File, URL string
	SHA256    string // hex; "": none, as GitHub allows
}

// listDownloads names runner archives: those of the configuration, or such as GitHub has,
// which cannot be fetched.
func (g *GitHub) listDownloads(c *call) answer {
	if _, known := g.scope(c); !known {
		return notFound
	}
	offered := g.c.Applications
	for _, platform := range []string{"osx-arm64", "osx-x64", "linux-x64", "linux-arm64"} {
		if g.c.Applications != nil {
			break
		}
		system, architecture, _ := strings.Cut(platform, "-")
		file := "actions-runner-" + platform + "-2.330.0.tar.gz"
		offered = append(offered, Application{
			OS: system, Arch: architecture, File: file,
			URL: "https://github.com/actions/runner/releases/download/v2.330.0/" + file, SHA256: strings.Repeat("0", 64),
		})
	}
	list := []object{}
	for _, a := range offered {
		entry := object{"os": a.OS, "architecture": a.Arch, "filename": a.File, "download_url": a.URL}
		if a.SHA256 != "" {
			entry["sha256_checksum"] = a.SHA256
		}
		list = append(list, entry)
	}
	return ok(list)
}

// runnerName is what GitHub lets a runner be called.
var runnerName = regexp.MustCompile(`^[A-Za-z0-9._ ()@-]{1,64}$`)

// postJIT registers a just-in-time runner and answers with its configuration.
func (g *GitHub) postJIT(c *call) answer {
	scope, known := g.scope(c)
	if !known {
		return notFound
	}
	var asked struct {
		Name   string   `json:"name"`
		Group  int64    `json:"runner_group_id"`
		Labels []string `json:"labels"`
	}
	if err := json.Unmarshal(c.body, &asked); err != nil {
		return refuse(http.StatusUnprocessableEntity, "Problems parsing JSON")
	}
	labels := fleet.NewLabels(asked.Labels...)
	_, hasGroup := g.group(scope.Owner(), asked.Group)
	if !hasGroup || (scope.IsRepository() && asked.Group != 1) || !runnerName.MatchString(asked.Name) || len(labels) == 0 {
		return refuse(http.StatusUnprocessableEntity, "Validation Failed: the runner group, the name or the labels")
	}
	if g.taken(scope, asked.Name) {
		return refuse(http.StatusConflict, "Already exists - A runner with the name *** already exists.")
	}
	r := g.register(scope, asked.Name, asked.Group, labels)
	encoded, err := g.jitConfig(r, c.base)
	if err != nil {
		return refuse(http.StatusInternalServerError, err.Error())
	}
	return answer{status: http.StatusCreated, body: object{"runner": r.object(), "encoded_jit_config": encoded}}
}
