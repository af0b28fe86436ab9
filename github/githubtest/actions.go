package githubtest

import (
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/paddock-ci/paddock/fleet"
)

// The Actions service, which a runner talks to after it was configured. Facts are from
// observing github-act-runner v0.13.0 (MIT): a runner trades its key for a token, opens
// a session, polls for a message, acquires the job that the message refers to, reports
// steps and log lines while it renews the job's lock, and completes the job.

// Where the parts of the service are; a JIT config and a job's message carry the URLs.
const (
	servicesPath = "/_services/"
	tokenPath    = servicesPath + "token"
	tenantPath   = servicesPath + "pipelines"
	brokerPath   = servicesPath + "broker"
	runPath      = servicesPath + "run"
)

// bearer is a token of the Actions service: a runner's, or with job a running job's.
type bearer struct {
	runner *runner
	job    *job
}

// places are the parts of the service that are found by id in connectionData, with
// their paths below the service's URL.
var places = map[string]string{
	"134e239e-2df3-4794-a6f6-24f1f19ec8dc": "_apis/distributedtask/pools/{poolId}/sessions/{sessionId}",
	"8893bc5b-35b2-4be7-83cb-99e683551db4": "_apis/distributedtask/plans/{planId}/timelines/{timelineId}/records",
	"858983e4-19bd-4c5e-864c-507b59b58b12": "_apis/distributedtask/plans/{planId}/timelines/{timelineId}/records/{recordId}/feed",
	"46f5667d-263a-4684-91b1-dff7fdcf64e2": "_apis/distributedtask/plans/{planId}/logs/{logId}",
}

// routeActions is the table of the service.
func (g *GitHub) routeActions() {
	g.serve = http.NewServeMux()
	handle := func(pattern string, h func(*call, bearer) answer) {
		method, path, _ := strings.Cut(pattern, " ")
		g.serve.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) { g.serveActions(w, r, h) })
	}
	g.serve.HandleFunc("POST "+tokenPath, g.postRunnerToken)
	handle("GET "+tenantPath+"/_apis/connectionData", g.connectionData)
	handle("POST "+tenantPath+"/_apis/distributedtask/pools/{pool}/sessions", g.migrateSession)
	handle("POST "+brokerPath+"/session", g.postSession)
	handle("DELETE "+brokerPath+"/session", g.deleteSession)
	handle("POST "+brokerPath+"/acknowledge", g.acknowledge)
	g.serve.HandleFunc("GET "+brokerPath+"/message", g.getMessage)
	handle("POST "+runPath+"/{plan}/acquirejob", g.acquireJob)
	handle("POST "+runPath+"/{plan}/renewjob", g.renewJob)
	handle("POST "+runPath+"/{plan}/completejob", g.completeJob)
	handle("GET "+runPath+"/{plan}/_apis/connectionData", g.connectionData)
	plan := runPath + "/{plan}/_apis/distributedtask/plans/{plan2}"
	handle("PATCH "+plan+"/timelines/{timeline}/records", g.patchTimeline)
	handle("POST "+plan+"/timelines/{timeline}/records/{record}/feed", g.postLines)
	handle("POST "+plan+"/logs", g.createLog)
	handle("POST "+plan+"/logs/{log}", g.postLog)
}

// maxUpload bounds what a runner may post at once; the real runner cuts logs at 2 MB.
const maxUpload = 32 << 20

// serveActions reads the body, finds out whose token it is, and answers.
func (g *GitHub) serveActions(w http.ResponseWriter, r *http.Request, h func(*call, bearer) answer) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxUpload))
	if err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	who, known := g.bearerOf(r)
	if !known {
		refuse(http.StatusUnauthorized, "the token is not known").write(w)
		return
	}
	h(&call{Request: r, body: body, base: g.base(r)}, who).write(w)
}

func (g *GitHub) bearerOf(r *http.Request) (bearer, bool) {
	kind, value, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	who, known := g.bearers[value]
	return who, known && strings.EqualFold(kind, "bearer")
}

// postRunnerToken trades a client assertion, signed with the key in the JIT config, for
// a token: OAuth 2 client credentials, PS256.
func (g *GitHub) postRunnerToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		refuse(http.StatusBadRequest, err.Error()).write(w)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	owner, err := g.checkAssertion(r.PostForm.Get("client_assertion"))
	if err != nil {
		answer{status: http.StatusBadRequest, body: object{"error": "invalid_client", "error_description": err.Error()}}.write(w)
		return
	}
	value := secret("act_")
	g.bearers[value] = bearer{runner: owner}
	owner.tokens = append(owner.tokens, value)
	ok(object{"access_token": value, "expires_in": int(tokenLife.Seconds()), "token_type": "access_token"}).write(w)
}

func (g *GitHub) checkAssertion(raw string) (*runner, error) {
	key, err := runnerRSA()
	if err != nil {
		return nil, err
	}
	var claims jwt.RegisteredClaims
	_, err = jwt.ParseWithClaims(raw, &claims, func(*jwt.Token) (any, error) {
		return &rsa.PublicKey{N: key.N, E: key.E}, nil
	}, jwt.WithValidMethods([]string{"PS256"}), jwt.WithExpirationRequired(), jwt.WithLeeway(skew), jwt.WithTimeFunc(g.c.Now))
	if err != nil {
		return nil, fmt.Errorf("client assertion: %w", err)
	}
	owner := g.byClient[claims.Subject]
	if owner == nil || claims.Issuer != claims.Subject {
		return nil, errors.New("client assertion: no such runner; it may have been removed")
	}
	if len(claims.Audience) != 1 || !strings.HasSuffix(claims.Audience[0], tokenPath) {
		return nil, errors.New("client assertion: made for another service")
	}
	return owner, nil
}

func (g *GitHub) connectionData(*call, bearer) answer {
	services := []object{}
	for _, id := range slices.Sorted(maps.Keys(places)) {
		services = append(services, object{
			"identifier": id, "serviceType": "distributedtask", "displayName": id, "relativeToSetting": "fullyQualified",
			"relativePath": "/" + places[id], "resourceVersion": 1, "minVersion": "1.0", "maxVersion": "12.0",
		})
	}
	return ok(object{"locationServiceData": object{"serviceDefinitions": services}})
}

// migrateSession sends a runner of the first protocol on to the broker.
func (g *GitHub) migrateSession(c *call, _ bearer) answer {
	return ok(object{
		"sessionId": newUUID(g.c.Now()), "ownerName": "RUNNER",
		"brokerMigrationMessage": object{"brokerBaseUrl": c.base + brokerPath},
	})
}

// postSession opens the one session that a runner may have: it is online from here on.
func (g *GitHub) postSession(c *call, who bearer) answer {
	r := who.runner
	if r.session != "" && r.online {
		return refuse(http.StatusConflict, "TaskAgentSessionConflictException: the runner has a session already")
	}
	r.session = newUUID(g.c.Now())
	g.online(r)
	return ok(object{
		"sessionId": r.session, "ownerName": "RUNNER",
		"agent": object{"id": r.id, "name": r.name, "version": "2.330.0", "ephemeral": true},
	})
}

// online makes a runner available to jobs.
func (g *GitHub) online(r *runner) {
	if !r.online {
		r.online = true
		g.match()
		g.touch()
	}
}

func (g *GitHub) deleteSession(_ *call, who bearer) answer {
	who.runner.session, who.runner.online = "", false
	g.touch()
	return answer{status: http.StatusNoContent}
}

// getMessage waits for a message to the runner: a reference to the job that it was
// given, until that is acknowledged, or the wish that it stops. 202 means: none yet.
func (g *GitHub) getMessage(w http.ResponseWriter, r *http.Request) {
	held := time.NewTimer(g.c.Poll)
	defer held.Stop()
	for {
		reply, wake := g.nextMessage(r)
		if wake == nil {
			reply.write(w)
			return
		}
		select {
		case <-r.Context().Done():
			g.hangUp(r)
			return
		case <-held.C:
			w.WriteHeader(http.StatusAccepted)
			return
		case <-wake:
		}
	}
}

// nextMessage is the answer to a poll, or a channel to wait on.
func (g *GitHub) nextMessage(request *http.Request) (answer, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	who, known := g.bearerOf(request)
	if !known {
		return refuse(http.StatusUnauthorized, "the token is not known"), nil
	}
	r := who.runner
	if r.session == "" || request.URL.Query().Get("sessionId") != r.session {
		return refuse(http.StatusNotFound, "TaskAgentSessionExpiredException: there is no such session"), nil
	}
	g.online(r)
	switch j := r.job; {
	case j == nil:
	case j.status == fleet.JobQueued && !r.delivered:
		return message("RunnerJobRequest", object{
			"id": j.message, "runner_request_id": j.message, "billing_owner_id": "",
			"run_service_url": g.base(request) + runPath + "/" + j.planID,
		}), nil
	case j.status == fleet.JobInProgress && j.stop && !r.told:
		r.told = true
		return message("JobCancellation", object{"jobId": j.backend, "timeout": "00:05:00"}), nil
	}
	return answer{}, r.wake
}

// message wraps a body as the broker does: JSON within JSON.
func message(kind string, body object) answer {
	inner, err := json.Marshal(body)
	if err != nil {
		return refuse(http.StatusInternalServerError, err.Error())
	}
	return ok(object{"messageId": 1, "messageType": kind, "iv": "", "body": string(inner)})
}

// hangUp notes that a runner's connection broke: it is offline until it polls again.
func (g *GitHub) hangUp(request *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if who, known := g.bearerOf(request); known && who.runner.online {
		who.runner.online = false
		g.touch()
	}
}

func (g *GitHub) acknowledge(_ *call, who bearer) answer {
	who.runner.delivered = true
	return answer{status: http.StatusNoContent}
}
