package registrytest

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
)

// auth is who may read; the zero value is everyone.
type auth struct {
	user, password string
	bearer         bool              // tokens from /token, rather than Basic
	uses           int               // requests that one token is good for; 0: no limit
	tokens         map[string]int    // uses left; unlimited ones count down from 0
	scopes         map[string]string // that they were bought for
	issued         int
	life           int // seconds that the token server says; 0: it says none
	anonymous      bool
}

// RequireBasic lets in only who has these credentials.
func (r *Registry) RequireBasic(user, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth = auth{user: user, password: password}
}

// RequireToken lets in only tokens that the credentials buy at /token; each is good for
// uses requests (0: for ever), within the repositories and actions it was bought for.
func (r *Registry) RequireToken(user, password string, uses int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth = auth{user: user, password: password, bearer: true, uses: uses, life: 300, tokens: make(map[string]int), scopes: make(map[string]string)}
}

// RequireAnyToken lets in only tokens, which /token sells to anyone, as public registries do.
func (r *Registry) RequireAnyToken() {
	r.RequireToken("anyone", "", 0)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth.anonymous = true
}

// TokenLife is what /token says about how long a token is good, in seconds; 0: nothing.
func (r *Registry) TokenLife(seconds int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth.life = seconds
}

// ExpireTokens makes every token that was bought invalid.
func (r *Registry) ExpireTokens() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.auth.tokens)
}

// Tokens is how many tokens have been bought since RequireToken.
func (r *Registry) Tokens() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.auth.issued
}

// admit checks credentials, and answers for itself if they do not do.
func (r *Registry) admit(w http.ResponseWriter, req *http.Request, repository string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.auth.user == "" {
		return true
	}
	if !r.auth.bearer {
		if user, password, _ := req.BasicAuth(); user == r.auth.user && password == r.auth.password {
			return true
		}
		unauthorized(w, `Basic realm="registrytest"`)
		return false
	}
	action := "pull"
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		action = "push"
	}
	token, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	left, known := r.auth.tokens[token]
	if known && (r.auth.uses == 0 || left > 0) && (repository == "" || within(r.auth.scopes[token], repository, action)) {
		if req.URL.Path != "/v2/" {
			r.auth.tokens[token]--
		}
		return true
	}
	challenge := fmt.Sprintf(`Bearer realm="http://%s/token",service="registrytest"`, req.Host)
	if repository != "" {
		scope := "pull"
		if action == "push" {
			scope = "pull,push"
		}
		challenge += fmt.Sprintf(`,scope="repository:%s:%s"`, repository, scope)
	}
	unauthorized(w, challenge)
	return false
}

// within reports whether one of the scopes, which are separated by blanks, allows it.
func within(scopes, repository, action string) bool {
	for scope := range strings.FieldsSeq(scopes) {
		actions, ok := strings.CutPrefix(scope, "repository:"+repository+":")
		if ok && strings.Contains(","+actions+",", ","+action+",") {
			return true
		}
	}
	return false
}

func unauthorized(w http.ResponseWriter, challenge string) {
	w.Header().Set("WWW-Authenticate", challenge)
	refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
}

// expire takes the token of a request back and refuses it.
func (r *Registry) expire(w http.ResponseWriter, req *http.Request, repository string) {
	token, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	r.mu.Lock()
	delete(r.auth.tokens, token)
	bearer := r.auth.bearer
	r.mu.Unlock()
	if bearer {
		r.admit(w, req, repository)
		return
	}
	unauthorized(w, `Basic realm="registrytest"`)
}

// token sells a token for credentials.
func (r *Registry) token(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	user, password, _ := req.BasicAuth()
	if !r.auth.bearer || !r.auth.anonymous && (user != r.auth.user || password != r.auth.password) {
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong credentials")
		return
	}
	r.auth.issued++
	token := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "token %d", r.auth.issued))
	r.auth.tokens[token] = r.auth.uses
	r.auth.scopes[token] = strings.Join(req.URL.Query()["scope"], " ")
	w.Header().Set("Content-Type", "application/json")
	if r.auth.life == 0 {
		_, _ = fmt.Fprintf(w, `{"token":%q}`, token)
		return
	}
	_, _ = fmt.Fprintf(w, `{"token":%q,"expires_in":%d}`, token, r.auth.life)
}
