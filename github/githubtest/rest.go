package githubtest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// call is one REST request with who makes it.
type call struct {
	*http.Request
	body    []byte
	base    string   // URL under which the caller reached us
	account *account // whose installation token it carries; nil: an App's JWT
}

// answer is what a handler says: a status and an object to write as JSON (nil: no body).
type answer struct {
	status int
	body   any
	link   string // Link header; "": none
}

func ok(body any) answer { return answer{status: http.StatusOK, body: body} }

// refuse is an error's body.
func refuse(status int, message string) answer {
	return answer{status: status, body: object{"message": message, "documentation_url": "https://docs.github.com/rest"}}
}

var notFound = refuse(http.StatusNotFound, "Not Found")

// who says which kind of token a path takes.
type who int

const (
	app  who = iota // the App's JWT
	inst            // an installation's token
)

// routeREST is the table of the paths that are simulated.
func (g *GitHub) routeREST() {
	g.rest = http.NewServeMux()
	for _, r := range []struct {
		pattern string
		who     who
		handle  func(*call) answer
	}{
		{"GET /app", app, g.getApp},
		{"GET /app/hook/config", app, g.getHook},
		{"PATCH /app/hook/config", app, g.patchHook},
		{"GET /app/hook/deliveries", app, g.listDeliveries},
		{"GET /app/hook/deliveries/{delivery_id}", app, g.getDelivery},
		{"POST /app/hook/deliveries/{delivery_id}/attempts", app, g.postAttempt},
		{"GET /app/installations", app, g.listInstallations},
		{"GET /app/installations/{installation_id}", app, g.getInstallation},
		{"POST /app/installations/{installation_id}/access_tokens", app, g.postToken},
		{"GET /orgs/{org}/installation", app, g.ownerInstallation},
		{"GET /repos/{owner}/{repo}/installation", app, g.ownerInstallation},
		{"GET /installation/repositories", inst, g.listRepositories},
		{"GET /rate_limit", inst, g.getRateLimit},
		{"GET /orgs/{org}/actions/runner-groups", inst, g.listGroups},
		{"GET /repos/{owner}/{repo}", inst, g.getRepository},
		{"GET /repos/{owner}/{repo}/actions/jobs/{job_id}", inst, g.getJob},
		{"GET /repos/{owner}/{repo}/actions/runs", inst, g.listRuns},
		{"GET /repos/{owner}/{repo}/actions/runs/{run_id}", inst, g.getRun},
		{"GET /repos/{owner}/{repo}/actions/runs/{run_id}/jobs", inst, g.listRunJobs},
		{"GET /repos/{owner}/{repo}/actions/runs/{run_id}/attempts/{attempt_number}/jobs", inst, g.listRunJobs},
		{"POST /repos/{owner}/{repo}/actions/runs/{run_id}/cancel", inst, g.cancelRun},
		{"GET /orgs/{org}/actions/runners", inst, g.listRunners},
		{"GET /repos/{owner}/{repo}/actions/runners", inst, g.listRunners},
		{"GET /orgs/{org}/actions/runners/downloads", inst, g.listDownloads},
		{"GET /repos/{owner}/{repo}/actions/runners/downloads", inst, g.listDownloads},
		{"GET /orgs/{org}/actions/runners/{runner_id}", inst, g.getRunner},
		{"GET /repos/{owner}/{repo}/actions/runners/{runner_id}", inst, g.getRunner},
		{"DELETE /orgs/{org}/actions/runners/{runner_id}", inst, g.deleteRunner},
		{"DELETE /repos/{owner}/{repo}/actions/runners/{runner_id}", inst, g.deleteRunner},
		{"POST /orgs/{org}/actions/runners/generate-jitconfig", inst, g.postJIT},
		{"POST /repos/{owner}/{repo}/actions/runners/generate-jitconfig", inst, g.postJIT},
	} {
		g.rest.HandleFunc(r.pattern, func(w http.ResponseWriter, request *http.Request) {
			c := &call{Request: request, base: g.base(request)}
			c.body, _ = io.ReadAll(request.Body) // from memory: serveREST has read it
			g.mu.Lock()
			defer g.mu.Unlock()
			g.requests[r.pattern]++
			if refused := g.authenticate(c, r.who); refused != nil {
				refused.write(w)
				return
			}
			spent, limited := g.spend(c, w.Header())
			if response, ok := w.(*capture); ok {
				response.spent = spent
			}
			if limited != nil {
				limited.write(w)
				return
			}
			r.handle(c).write(w)
		})
	}
}

// base is the URL under which the caller reaches this handler.
func (g *GitHub) base(r *http.Request) string {
	if g.c.URL != "" {
		return strings.TrimSuffix(g.c.URL, "/")
	}
	if r.TLS != nil {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

func (a answer) write(w http.ResponseWriter) {
	if a.link != "" {
		w.Header().Set("Link", a.link)
	}
	if a.body == nil {
		w.WriteHeader(a.status)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(a.status)
	// A body that cannot be written shows as one that does not conform.
	_ = json.NewEncoder(w).Encode(a.body)
}

// capture holds a response until it has been validated.
type capture struct {
	header http.Header
	status int
	body   bytes.Buffer
	spent  *usage // what it was counted in; nil: not counted
}

func (c *capture) Header() http.Header { return c.header }
func (c *capture) WriteHeader(s int)   { c.status = s }
func (c *capture) Write(b []byte) (int, error) {
	if c.status == 0 {
		c.status = http.StatusOK
	}
	return c.body.Write(b)
}

// largest REST request that is read; the largest real one here is a few hundred bytes.
const maxRequest = 1 << 20

// serveREST answers one REST request: it validates the request, asks the weather, does
// the work, validates the response, and sends it.
func (g *GitHub) serveREST(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		return // the client is gone, or sends no GitHub request
	}
	input, err := g.schema.request(r, body)
	if err != nil {
		g.violate(err)
		refuse(http.StatusInternalServerError, err.Error()).write(w)
		return
	}
	var fault RequestFault
	g.mu.Lock()
	weather := g.weather.Request
	g.mu.Unlock()
	if weather != nil {
		fault = weather(r)
	}
	if fault.Status != 0 {
		g.fail(w, fault)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	response := &capture{header: http.Header{}}
	g.rest.ServeHTTP(response, r)
	err = g.schema.response(r.Context(), input, response.status, response.header, response.body.Bytes())
	if err != nil {
		g.violate(err)
		refuse(http.StatusInternalServerError, err.Error()).write(w)
		return
	}
	if fault.Lose {
		panic(http.ErrAbortHandler) // net/http cuts the connection
	}
	g.deliverREST(w, r, response)
}

// deliverREST sends the response, or 304 if the client has it already.
func (g *GitHub) deliverREST(w http.ResponseWriter, r *http.Request, response *capture) {
	h := w.Header()
	for key, values := range response.header {
		h[key] = values
	}
	h.Set("X-GitHub-Request-Id", newUUID(time.Now()))
	if r.Method == http.MethodGet && response.status == http.StatusOK {
		sum := sha256.Sum256(response.body.Bytes())
		tag := `W/"` + hex.EncodeToString(sum[:]) + `"`
		h.Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			h.Del("Content-Type")
			g.refund(response.spent, h)
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	w.WriteHeader(response.status)
	_, _ = w.Write(response.body.Bytes()) // the client is gone: nothing to be done
}

// refund makes a 304 free.
func (g *GitHub) refund(u *usage, h http.Header) {
	if u == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	u.used--
	u.report(h, g.c.Limit)
}

// report writes the headers that say how much is left.
func (u *usage) report(h http.Header, limit int) {
	h.Set("X-RateLimit-Limit", strconv.Itoa(limit))
	h.Set("X-RateLimit-Remaining", strconv.Itoa(max(0, limit-u.used)))
	h.Set("X-RateLimit-Used", strconv.Itoa(min(u.used, limit)))
	h.Set("X-RateLimit-Reset", strconv.FormatInt(u.reset.Unix(), 10))
}

// fail answers as the weather wants it.
func (g *GitHub) fail(w http.ResponseWriter, f RequestFault) {
	message := http.StatusText(f.Status)
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(f.RetryAfter/time.Second)))
		message = "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
	}
	if f.Exhausted {
		h := w.Header()
		h.Set("X-RateLimit-Limit", strconv.Itoa(g.c.Limit))
		h.Set("X-RateLimit-Remaining", "0")
		h.Set("X-RateLimit-Reset", strconv.FormatInt(f.Reset.Unix(), 10))
		h.Set("X-RateLimit-Resource", "core")
		message = "API rate limit exceeded for installation."
	}
	refuse(f.Status, message).write(w)
}

// token is an installation token.
type token struct {
	installation int64
	expires      time.Time
}

// tokenLife is how long installation tokens are good.
const tokenLife = time.Hour

// maxJWT is the longest that GitHub lets an App's JWT live.
const maxJWT = 10 * time.Minute

// skew is what clocks may differ by.
const skew = time.Minute

// authenticate checks the token and finds out whose it is.
func (g *GitHub) authenticate(c *call, kind who) *answer {
	kindOf, value, _ := strings.Cut(c.Header.Get("Authorization"), " ")
	refused := refuse(http.StatusUnauthorized, "Bad credentials")
	if value == "" || (!strings.EqualFold(kindOf, "bearer") && !strings.EqualFold(kindOf, "token")) {
		return &refused
	}
	if kind == app {
		if err := g.checkJWT(value); err != nil {
			refused = refuse(http.StatusUnauthorized, err.Error())
			return &refused
		}
		return nil
	}
	t, known := g.tokens[value]
	if !known || !g.c.Now().Before(t.expires) {
		return &refused
	}
	for _, a := range g.accounts {
		if a.installation == t.installation {
			c.account = a
			return nil
		}
	}
	return &refused
}

// checkJWT checks an App's JWT as GitHub does: RS256, our issuer, at most ten minutes.
func (g *GitHub) checkJWT(raw string) error {
	var claims jwt.RegisteredClaims
	_, err := jwt.ParseWithClaims(raw, &claims, func(*jwt.Token) (any, error) { return &g.appKey.PublicKey, nil },
		jwt.WithValidMethods([]string{"RS256"}), jwt.WithIssuer(strconv.FormatInt(g.c.AppID, 10)),
		jwt.WithIssuedAt(), jwt.WithExpirationRequired(), jwt.WithLeeway(skew), jwt.WithTimeFunc(g.c.Now))
	switch {
	case err != nil:
		return fmt.Errorf("a JSON web token could not be decoded: %w", err)
	case claims.IssuedAt == nil:
		return errors.New("missing 'issued at' claim ('iat') in assertion")
	case claims.ExpiresAt.Sub(g.c.Now()) > maxJWT:
		return errors.New("'Expiration time' claim ('exp') is too far in the future")
	}
	return nil
}

// bucket is what requests are counted by.
type bucket struct {
	installation int64
	resource     string
}

// usage is how much of its hour a bucket has spent.
type usage struct {
	used  int
	reset time.Time
}

// spend takes one request from the bucket's hour, and says so in the headers. An
// App's own requests are not counted here.
func (g *GitHub) spend(c *call, h http.Header) (*usage, *answer) {
	if c.account == nil {
		return nil, nil
	}
	now := g.c.Now()
	resource := "core"
	if strings.HasSuffix(c.URL.Path, "/generate-jitconfig") {
		resource = "actions_runner_registration" // counted apart, in the same headers
	}
	key := bucket{c.account.installation, resource}
	u := g.used[key]
	if u == nil || !now.Before(u.reset) {
		u = &usage{reset: now.Add(time.Hour)}
		g.used[key] = u
	}
	u.used++
	u.report(h, g.c.Limit)
	h.Set("X-RateLimit-Resource", resource)
	if u.used <= g.c.Limit {
		return u, nil
	}
	limited := refuse(http.StatusForbidden, "API rate limit exceeded for installation.")
	return u, &limited
}

// page cuts a list as per_page (30, at most 100) and page ask, and writes the Link header.
func page[T any](c *call, all []T) (part []T, link string) {
	size, number := c.number("per_page", 30), c.number("page", 1)
	size = min(max(size, 1), 100)
	from := min((max(number, 1)-1)*size, len(all))
	to := min(from+size, len(all))
	if to < len(all) {
		q := c.URL.Query()
		q.Set("page", strconv.Itoa(number+1))
		link = fmt.Sprintf(`<%s%s?%s>; rel="next"`, c.base, c.URL.Path, q.Encode())
	}
	return slices.Clip(all[from:to]), link
}

// number reads a number from the query.
func (c *call) number(name string, otherwise int) int {
	if n, err := strconv.Atoi(c.URL.Query().Get(name)); err == nil {
		return n
	}
	return otherwise
}

// pathID reads an id from the path; 0 if it is none.
func (c *call) pathID(name string) int64 {
	id, _ := strconv.ParseInt(c.PathValue(name), 10, 64)
	return id
}
