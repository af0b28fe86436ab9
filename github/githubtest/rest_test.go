package githubtest_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// visitor calls the REST API by hand, without the client.
type visitor struct {
	gh  *githubtest.GitHub
	now time.Time
}

func newVisitor(t testing.TB, c githubtest.Config) *visitor {
	t.Helper()
	v := &visitor{now: time.Now()}
	c.Now = func() time.Time { return v.now }
	c.Secret = secret
	c.Repositories = []githubtest.Repository{{Name: "acme/app"}, {Name: "solo/tool", User: true}, {Name: "stranger/x", Uninstalled: true}}
	c.Groups = []githubtest.Group{{Org: "acme", ID: 2, Name: "two", Repositories: []string{}}}
	var err error
	if v.gh, err = githubtest.New(c); err != nil {
		t.Fatal(err)
	}
	return v
}

// call makes a request; its answer is decoded if it is a JSON object.
func (v *visitor) call(t testing.TB, token, request, body string) (status int, answer map[string]any, header http.Header) {
	t.Helper()
	method, path, _ := strings.Cut(request, " ")
	r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+token)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	v.gh.ServeHTTP(w, r)
	raw, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	_ = json.Unmarshal(raw, &answer) // lists and empty bodies stay nil
	return w.Code, answer, w.Header()
}

// login makes an App's JWT; change spoils it.
func (v *visitor) login(t testing.TB, change func(*jwt.RegisteredClaims)) string {
	t.Helper()
	key, err := jwt.ParseRSAPrivateKeyFromPEM(v.gh.PrivateKey())
	if err != nil {
		t.Fatal(err)
	}
	claims := jwt.RegisteredClaims{
		Issuer: "4711", IssuedAt: jwt.NewNumericDate(v.now), ExpiresAt: jwt.NewNumericDate(v.now.Add(5 * time.Minute)),
	}
	if change != nil {
		change(&claims)
	}
	signed, err := jwt.NewWithClaims(jwt.SigningMethodRS256, claims).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// installation gets an installation token for an organization, and the installation's id.
func (v *visitor) installation(t testing.TB, org string) (token string, id int64) {
	t.Helper()
	app := v.login(t, nil)
	_, found, _ := v.call(t, app, "GET /orgs/"+org+"/installation", "")
	id = int64(found["id"].(float64))
	status, granted, _ := v.call(t, app, fmt.Sprintf("POST /app/installations/%d/access_tokens", id), "")
	if status != http.StatusCreated {
		t.Fatalf("access token: %d %v", status, granted)
	}
	return granted["token"].(string), id
}

// Every path that is simulated answers as GitHub describes it, and so do the refusals.
func TestEveryPathConforms(t *testing.T) {
	v := newVisitor(t, githubtest.Config{})
	token, id := v.installation(t, "acme")
	app := v.login(t, nil)
	run, jobs, err := v.gh.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
		{Name: "a", Labels: macOS, Matrix: 3}, {Name: "b", Environment: "production"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	delivery := v.gh.Deliveries()[0].ID
	mint := `{"name":"r","runner_group_id":1,"labels":["macos"],"work_folder":"_work"}`
	for _, c := range []struct {
		who, request, body string
		status             int
	}{
		{app, "GET /app", "", 200},
		{app, "GET /app/hook/config", "", 200},
		{app, "PATCH /app/hook/config", `{"url":"https://example.com/hook"}`, 200},
		{app, "GET /app/hook/deliveries?per_page=2", "", 200},
		{app, "GET /app/hook/deliveries?status=failure", "", 200},
		{app, "GET /app/hook/deliveries?cursor=none", "", 400},
		{app, fmt.Sprintf("GET /app/hook/deliveries/%d", delivery), "", 200},
		{app, "GET /app/hook/deliveries/1", "", 404},
		{app, fmt.Sprintf("POST /app/hook/deliveries/%d/attempts", delivery), "", 202},
		{app, "POST /app/hook/deliveries/1/attempts", "", 404},
		{app, "GET /app/installations", "", 200},
		{app, fmt.Sprintf("GET /app/installations/%d", id), "", 200},
		{app, "GET /app/installations/1", "", 404},
		{app, "POST /app/installations/1/access_tokens", `{}`, 404},
		{app, "GET /orgs/acme/installation", "", 200},
		{app, "GET /orgs/solo/installation", "", 404},
		{app, "GET /orgs/stranger/installation", "", 404},
		{app, "GET /repos/solo/tool/installation", "", 200},
		{app, "GET /repos/solo/none/installation", "", 404},
		{token, "GET /installation/repositories", "", 200},
		{token, "GET /rate_limit", "", 200},
		{token, "GET /orgs/acme/actions/runner-groups", "", 200},
		{token, "GET /orgs/acme/actions/runners", "", 200},
		{token, "GET /orgs/acme/actions/runners/downloads", "", 200},
		{token, "GET /orgs/acme/actions/runners/1", "", 404},
		{token, "POST /orgs/acme/actions/runners/generate-jitconfig", mint, 201},
		{token, "POST /orgs/acme/actions/runners/generate-jitconfig", mint, 409},
		{token, "POST /orgs/acme/actions/runners/generate-jitconfig", strings.Replace(mint, `"r"`, `"a/b"`, 1), 422},
		{token, "GET /orgs/acme/actions/runners/1", "", 200},
		{token, "DELETE /orgs/acme/actions/runners/1", "", 204},
		{token, "DELETE /orgs/acme/actions/runners/1", "", 404},
		{token, "GET /orgs/solo/actions/runners", "", 404},
		{token, "GET /repos/acme/app", "", 200},
		{token, "GET /repos/solo/tool", "", 404},
		{token, "GET /repos/acme/app/actions/runners", "", 200},
		{token, "GET /repos/acme/app/actions/runners/downloads", "", 200},
		{token, "POST /repos/acme/app/actions/runners/generate-jitconfig", mint, 201},
		{token, "POST /repos/acme/app/actions/runners/generate-jitconfig", strings.Replace(mint, ":1", ":2", 1), 422},
		{token, "GET /repos/acme/app/actions/runners/1", "", 200},
		{token, "DELETE /repos/acme/app/actions/runners/1", "", 204},
		{token, fmt.Sprintf("GET /repos/acme/app/actions/jobs/%d", jobs[0]), "", 200},
		{token, "GET /repos/acme/app/actions/jobs/1", "", 404},
		{token, "GET /repos/acme/app/actions/runs?status=queued", "", 200},
		{token, fmt.Sprintf("GET /repos/acme/app/actions/runs/%d", run), "", 200},
		{token, "GET /repos/acme/app/actions/runs/1", "", 404},
		{token, fmt.Sprintf("GET /repos/acme/app/actions/runs/%d/jobs?filter=latest&per_page=2", run), "", 200},
		{token, fmt.Sprintf("GET /repos/acme/app/actions/runs/%d/jobs?filter=all", run), "", 200},
		{token, fmt.Sprintf("GET /repos/acme/app/actions/runs/%d/attempts/1/jobs", run), "", 200},
		{token, fmt.Sprintf("POST /repos/acme/app/actions/runs/%d/cancel", run), "", 202},
		{token, fmt.Sprintf("POST /repos/acme/app/actions/runs/%d/cancel", run), "", 409},
		{token, "POST /repos/acme/app/actions/runs/1/cancel", "", 404},
		{app, "GET /repos/acme/app", "", 401},
		{token, "GET /app", "", 401},
		{"", "GET /app", "", 401},
	} {
		if status, answer, _ := v.call(t, c.who, c.request, c.body); status != c.status {
			t.Errorf("%s: %d %v, want %d", c.request, status, answer, c.status)
		}
	}
	if violations := v.gh.Violations(); len(violations) != 0 {
		t.Errorf("violations: %q", violations)
	}
	for _, id := range jobs {
		if j, _ := v.gh.Job(id); j.Status != fleet.JobCompleted || j.Conclusion != "cancelled" {
			t.Errorf("after its run was cancelled: %+v", j)
		}
	}
}

// Which App's JWTs are good.
func TestAppTokens(t *testing.T) {
	v := newVisitor(t, githubtest.Config{})
	for _, c := range []struct {
		name   string
		spoil  func(*jwt.RegisteredClaims)
		status int
	}{
		{"as it should be", nil, 200},
		{"our clock is 30 s behind", func(c *jwt.RegisteredClaims) { c.IssuedAt = jwt.NewNumericDate(v.now.Add(30 * time.Second)) }, 200},
		{"another App's", func(c *jwt.RegisteredClaims) { c.Issuer = "1" }, 401},
		{"expired", func(c *jwt.RegisteredClaims) { c.ExpiresAt = jwt.NewNumericDate(v.now.Add(-2 * time.Minute)) }, 401},
		{"good for too long", func(c *jwt.RegisteredClaims) { c.ExpiresAt = jwt.NewNumericDate(v.now.Add(11 * time.Minute)) }, 401},
		{"good for ever", func(c *jwt.RegisteredClaims) { c.ExpiresAt = nil }, 401},
		{"never issued", func(c *jwt.RegisteredClaims) { c.IssuedAt = nil }, 401},
		{"issued in an hour", func(c *jwt.RegisteredClaims) { c.IssuedAt = jwt.NewNumericDate(v.now.Add(time.Hour)) }, 401},
	} {
		if status, answer, _ := v.call(t, v.login(t, c.spoil), "GET /app", ""); status != c.status {
			t.Errorf("%s: %d %v, want %d", c.name, status, answer, c.status)
		}
	}
	foreign, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	claims := jwt.RegisteredClaims{Issuer: "4711", IssuedAt: jwt.NewNumericDate(v.now), ExpiresAt: jwt.NewNumericDate(v.now.Add(time.Minute))}
	signed, err := jwt.NewWithClaims(jwt.SigningMethodRS256, claims).SignedString(foreign)
	if err != nil {
		t.Fatal(err)
	}
	if status, _, _ := v.call(t, signed, "GET /app", ""); status != 401 {
		t.Errorf("signed with another key: %d", status)
	}
}

// Installation tokens last an hour, and end when the App is installed anew.
func TestInstallationTokens(t *testing.T) {
	v := newVisitor(t, githubtest.Config{})
	token, _ := v.installation(t, "acme")
	read := func() int {
		status, _, _ := v.call(t, token, "GET /repos/acme/app", "")
		return status
	}
	v.now = v.now.Add(59 * time.Minute)
	if status := read(); status != 200 {
		t.Errorf("after 59 minutes: %d", status)
	}
	v.now = v.now.Add(time.Minute)
	if status := read(); status != 401 {
		t.Errorf("after an hour: %d", status)
	}
	token, _ = v.installation(t, "acme")
	v.gh.Reinstall("acme")
	if status := read(); status != 401 {
		t.Errorf("after the App was installed anew: %d", status)
	}
}

// The hour's requests are counted by resource, and come back.
func TestPrimaryLimit(t *testing.T) {
	v := newVisitor(t, githubtest.Config{Limit: 2})
	token, _ := v.installation(t, "acme")
	for i, want := range []int{200, 200, 403} {
		status, _, header := v.call(t, token, "GET /repos/acme/app", "")
		if status != want || header.Get("X-RateLimit-Remaining") != fmt.Sprint(max(0, 1-i)) || header.Get("X-RateLimit-Resource") != "core" {
			t.Errorf("request %d: %d %v, want %d", i, status, header, want)
		}
	}
	mint := `{"name":"r","runner_group_id":1,"labels":["macos"]}`
	if status, _, _ := v.call(t, token, "POST /orgs/acme/actions/runners/generate-jitconfig", mint); status != 201 {
		t.Errorf("a registration is counted with the rest: %d", status)
	}
	v.now = v.now.Add(time.Hour)
	token, _ = v.installation(t, "acme")
	if status, _, _ := v.call(t, token, "GET /repos/acme/app", ""); status != 200 {
		t.Errorf("an hour later: %d", status)
	}
}

// Whatever is sent, the answer is none of ours that panics, and what GitHub would not
// accept is a violation: never a silent success.
func FuzzServe(f *testing.F) {
	f.Add("POST", "/orgs/acme/actions/runners/generate-jitconfig", `{"name":"r","runner_group_id":1,"labels":["macos"]}`)
	f.Add("GET", "/app/hook/deliveries?cursor=v1_9&per_page=100", "")
	f.Add("PATCH", "/app/hook/config", `{"url":"https://example.com"}`)
	f.Add("DELETE", "/repos/acme/app/actions/runners/1", "")
	f.Add("POST", "/_services/token", "client_assertion=a.b.c")
	f.Add("POST", "/_services/broker/session", `{"agent":{}}`)
	f.Add("GET", "/_services/broker/message?sessionId=x", "")
	f.Add("POST", "/_services/run/p/acquirejob", `{"jobMessageId":"m"}`)
	v := newVisitor(f, githubtest.Config{})
	token, _ := v.installation(f, "acme")
	app := v.login(f, nil)
	f.Fuzz(func(t *testing.T, method, path, body string) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://github.test"+path, strings.NewReader(body))
		if err != nil || !strings.HasPrefix(path, "/") {
			return
		}
		for _, who := range []string{token, app} {
			before := len(v.gh.Violations())
			r.Body = io.NopCloser(strings.NewReader(body))
			r.Header.Set("Authorization", "Bearer "+who)
			w := httptest.NewRecorder()
			v.gh.ServeHTTP(w, r)
			if refused := len(v.gh.Violations()) > before; refused != (w.Code == http.StatusInternalServerError) {
				t.Errorf("%s %s answers %d, a violation: %v", method, path, w.Code, refused)
			}
		}
	})
}
