package githubtest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// The objects of GitHub's JSON that carry no state of their own. They have all the
// fields of the real ones, so that payloads have the real size: about 7 KB.

const (
	apiURL = "https://api.github.com"
	webURL = "https://github.com"
)

// object is a JSON object.
type object = map[string]any

// stamp writes a time as GitHub does: UTC, whole seconds.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// stampOrNull is null for a time that has not come.
func stampOrNull(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return stamp(t)
}

// orNull is null for an empty string.
func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// nodeID is the opaque id of the GraphQL API.
func nodeID(kind string, id int64) string {
	return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%03d:%s%d", len(kind), kind, id))
}

// person is an account as a user object.
func person(login string, id int64, kind string) object {
	api := apiURL + "/users/" + login
	return object{
		"login": login, "id": id, "node_id": nodeID("User", id), "gravatar_id": "",
		"avatar_url": fmt.Sprintf("https://avatars.githubusercontent.com/u/%d?v=4", id),
		"url":        api, "html_url": webURL + "/" + login,
		"followers_url": api + "/followers", "following_url": api + "/following{/other_user}",
		"gists_url": api + "/gists{/gist_id}", "starred_url": api + "/starred{/owner}{/repo}",
		"subscriptions_url": api + "/subscriptions", "organizations_url": api + "/orgs",
		"repos_url": api + "/repos", "events_url": api + "/events{/privacy}",
		"received_events_url": api + "/received_events", "type": kind, "site_admin": false,
	}
}

// sender is who pushed: one person for all.
var sender = person("octocat", 583231, "User")

// senderRaw is the sender as JSON.
var senderRaw = func() json.RawMessage {
	raw, err := json.Marshal(sender)
	if err != nil {
		panic(err) // strings and numbers
	}
	return raw
}()

func (a *account) object() object { return person(a.login, a.id, a.kind) }

// organization is the account as webhooks carry it.
func (a *account) organization() object {
	api := apiURL + "/orgs/" + a.login
	return object{
		"login": a.login, "id": a.id, "node_id": nodeID("Organization", a.id), "url": api,
		"repos_url": api + "/repos", "events_url": api + "/events", "hooks_url": api + "/hooks",
		"issues_url": api + "/issues", "members_url": api + "/members{/member}",
		"public_members_url": api + "/public_members{/member}",
		"avatar_url":         fmt.Sprintf("https://avatars.githubusercontent.com/u/%d?v=4", a.id),
		"description":        "",
	}
}

// repositoryURLs are the URL templates of a repository: field name (without _url) and path.
var repositoryURLs = map[string]string{
	"forks": "forks", "keys": "keys{/key_id}", "collaborators": "collaborators{/collaborator}", "teams": "teams",
	"hooks": "hooks", "issue_events": "issues/events{/number}", "events": "events", "assignees": "assignees{/user}",
	"branches": "branches{/branch}", "tags": "tags", "blobs": "git/blobs{/sha}", "git_tags": "git/tags{/sha}",
	"git_refs": "git/refs{/sha}", "trees": "git/trees{/sha}", "statuses": "statuses/{sha}", "languages": "languages",
	"stargazers": "stargazers", "contributors": "contributors", "subscribers": "subscribers",
	"subscription": "subscription", "commits": "commits{/sha}", "git_commits": "git/commits{/sha}",
	"comments": "comments{/number}", "issue_comment": "issues/comments{/number}", "contents": "contents/{+path}",
	"compare": "compare/{base}...{head}", "merges": "merges", "archive": "{archive_format}{/ref}",
	"downloads": "downloads", "issues": "issues{/number}", "pulls": "pulls{/number}",
	"milestones": "milestones{/number}", "notifications": "notifications{?since,all,participating}",
	"labels": "labels{/name}", "releases": "releases{/id}", "deployments": "deployments",
}

// object is the repository as webhooks carry it, which REST's short form accepts too.
func (r *repository) object() object {
	api, web := apiURL+"/repos/"+r.Name, webURL+"/"+r.Name
	visibility := "private"
	if r.Public {
		visibility = "public"
	}
	o := object{
		"id": r.id, "node_id": nodeID("Repository", r.id), "name": r.short, "full_name": r.Name,
		"private": !r.Public, "owner": r.owner.object(), "html_url": web, "description": nil, "fork": false,
		"url": api, "created_at": stamp(r.owner.since), "updated_at": stamp(r.owner.since),
		"pushed_at": stamp(r.owner.since), "git_url": strings.Replace(web, "https", "git", 1) + ".git",
		"ssh_url": "git@github.com:" + r.Name + ".git", "clone_url": web + ".git", "svn_url": web,
		"homepage": nil, "size": 39, "stargazers_count": 0, "watchers_count": 0, "language": nil,
		"has_issues": true, "has_projects": true, "has_downloads": true, "has_wiki": true, "has_pages": false,
		"has_discussions": false, "forks_count": 0, "mirror_url": nil, "archived": false, "disabled": false,
		"open_issues_count": 0, "license": nil, "allow_forking": true, "is_template": false,
		"web_commit_signoff_required": false, "topics": []string{}, "visibility": visibility, "forks": 0,
		"open_issues": 0, "watchers": 0, "default_branch": "main", "custom_properties": object{},
	}
	for field, path := range repositoryURLs {
		o[field+"_url"] = api + "/" + path
	}
	return o
}

// full is the repository as GET /repos/{owner}/{repo} answers it.
func (r *repository) full() object {
	o := r.object()
	o["network_count"], o["subscribers_count"] = 0, 0
	return o
}

// permissions and events of the App: what Paddock asks for.
var (
	permissions = object{
		"actions": "read", "administration": "write", "metadata": "read", "organization_self_hosted_runners": "write",
	}
	subscribed = []string{"workflow_job"}
)

func (g *GitHub) installationObject(a *account) object {
	return object{
		"id": a.installation, "app_id": g.c.AppID, "app_slug": "paddock", "target_id": a.id, "target_type": a.kind,
		"single_file_name": nil, "repository_selection": "all",
		"access_tokens_url": fmt.Sprintf("%s/app/installations/%d/access_tokens", apiURL, a.installation),
		"html_url":          fmt.Sprintf("%s/settings/installations/%d", webURL, a.installation),
		"repositories_url":  apiURL + "/installation/repositories", "events": subscribed, "account": a.object(),
		"permissions": permissions, "created_at": stamp(a.since), "updated_at": stamp(a.since),
		"suspended_by": nil, "suspended_at": nil,
	}
}

// head is the commit of every run here: nothing is checked out.
const head = "16c5286e8d9a0629956a28938386b36608707a71"

// fields are what a job has in REST and in webhooks alike.
func (j *job) fields() object {
	api, web := apiURL+"/repos/"+j.run.repo.Name, webURL+"/"+j.run.repo.Name
	started := j.startedAt
	if started.IsZero() {
		started = j.createdAt // GitHub repeats created_at until the job starts
	}
	o := object{
		"id": j.id, "run_id": j.run.id, "run_url": fmt.Sprintf("%s/actions/runs/%d", api, j.run.id),
		"run_attempt": j.attempt, "node_id": nodeID("CheckRun", int64(j.id)), "head_sha": head, "head_branch": "main",
		"workflow_name": j.run.workflow, "url": fmt.Sprintf("%s/actions/jobs/%d", api, j.id),
		"html_url": fmt.Sprintf("%s/actions/runs/%d/job/%d", web, j.run.id, j.id), "status": string(j.status),
		"conclusion": orNull(j.conclusion), "created_at": stamp(j.createdAt), "started_at": stamp(started),
		"completed_at": stampOrNull(j.completedAt), "name": j.spec.Name, "steps": j.stepObjects(),
		"check_run_url": fmt.Sprintf("%s/check-runs/%d", api, j.id), "labels": nonNil(j.spec.Labels),
		"runner_id": nil, "runner_name": nil, "runner_group_id": nil, "runner_group_name": nil,
	}
	if j.runnerName != "" {
		o["runner_id"], o["runner_name"] = j.runnerID, j.runnerName
		o["runner_group_id"], o["runner_group_name"] = j.groupID, "Default"
	}
	return o
}

// stepRecord is a step as the runner reported it.
type stepRecord struct {
	name              string
	conclusion        string // "" while it runs
	started, finished time.Time
}

func (j *job) stepObjects() []object {
	steps := []object{}
	for i, s := range j.steps {
		o := object{
			"name": s.name, "number": i + 1, "status": "in_progress", "conclusion": nil,
			"started_at": stamp(s.started), "completed_at": nil,
		}
		if s.conclusion != "" {
			o["status"], o["conclusion"], o["completed_at"] = "completed", s.conclusion, stamp(s.finished)
		}
		steps = append(steps, o)
	}
	return steps
}

func (j *job) deploymentObject() object {
	d, repo := j.deployment, apiURL+"/repos/"+j.run.repo.Name
	api := fmt.Sprintf("%s/deployments/%d", repo, d.id)
	return object{
		"url": api, "id": d.id, "node_id": nodeID("Deployment", d.id), "sha": head, "ref": "main", "task": "deploy",
		"payload": object{}, "original_environment": j.spec.Environment, "environment": j.spec.Environment,
		"description": nil, "creator": sender, "created_at": stamp(d.createdAt), "updated_at": stamp(d.updatedAt),
		"statuses_url": api + "/statuses", "repository_url": repo,
	}
}

// nonNil makes an empty list of nil: GitHub writes [], not null.
func nonNil(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

func (r *run) object() object {
	api := fmt.Sprintf("%s/repos/%s/actions/runs/%d", apiURL, r.repo.Name, r.id)
	status, conclusion := r.state()
	author := object{"name": "Octocat", "email": "octocat@github.com"}
	repo := r.repo.object()
	return object{
		"id": r.id, "name": r.workflow, "node_id": nodeID("WorkflowRun", r.id), "head_branch": "main",
		"run_number": r.number, "run_attempt": r.attempt, "display_title": r.workflow, "event": "push",
		"status": status, "conclusion": orNull(conclusion), "head_sha": head, "path": ".github/workflows/ci.yml",
		"workflow_id": 1, "url": api, "html_url": fmt.Sprintf("%s/%s/actions/runs/%d", webURL, r.repo.Name, r.id),
		"created_at": stamp(r.createdAt), "updated_at": stamp(r.createdAt),
		"head_commit": object{
			"id": head, "tree_id": head, "message": "Change", "timestamp": stamp(r.createdAt),
			"author": author, "committer": author,
		},
		"head_repository": repo, "repository": repo, "jobs_url": api + "/jobs", "logs_url": api + "/logs",
		"check_suite_url": apiURL + "/repos/" + r.repo.Name + "/check-suites/1", "cancel_url": api + "/cancel",
		"rerun_url": api + "/rerun", "artifacts_url": api + "/artifacts",
		"workflow_url": apiURL + "/repos/" + r.repo.Name + "/actions/workflows/1", "pull_requests": []any{},
	}
}

func (r *runner) object() object {
	labels := []object{}
	for _, l := range r.labels {
		labels = append(labels, object{"name": l, "type": "custom"})
	}
	status := "offline"
	if r.online {
		status = "online"
	}
	return object{
		"id": r.id, "runner_group_id": r.group, "name": r.name, "os": "unknown", "status": status,
		"busy": r.job != nil, "ephemeral": true, "labels": labels,
	}
}
