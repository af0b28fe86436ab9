package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/store"
)

// call is what an endpoint knows of its caller besides the body.
type call struct {
	who   access.Identity // zero on routes that anyone may call
	id    string          // the {id} of the path
	query url.Values
	now   time.Time
	// parked is told how long the call waited for news, which is no latency.
	parked *time.Duration
}

// endpoint makes a handler of a method: identity, right, body, the method itself,
// answer or refusal, and metrics, the same for every route.
func endpoint[REQ, RESP any](do func(*Server, context.Context, call, REQ) (RESP, error)) func(*Server, route) gin.HandlerFunc {
	return func(s *Server, r route) gin.HandlerFunc {
		return func(c *gin.Context) {
			began := time.Now()
			var parked time.Duration
			// A body that nobody reads, since its sender is refused, net/http reads: that ends, too.
			control := http.NewResponseController(c.Writer)
			_ = control.SetReadDeadline(began.Add(s.bodyTime))
			answer, err := func() (answer RESP, err error) {
				to := call{id: c.Param("id"), query: c.Request.URL.Query(), now: s.c.Now(), parked: &parked}
				if r.needs != "" {
					if to.who, err = s.identify(c.Request, r.needs, to.now); err != nil {
						return answer, err
					}
				}
				var request REQ
				if r.method == http.MethodPost {
					if err := decode(http.MaxBytesReader(c.Writer, c.Request.Body, bodyLimit(r.path)), &request); err != nil {
						return answer, err
					}
				}
				_ = control.SetReadDeadline(time.Time{}) // else it would end a parked call
				return do(s, c.Request.Context(), to, request)
			}()
			if err != nil {
				s.refuse(c, r.path, err)
			} else {
				c.Header("Cache-Control", "no-store") // some answers are secrets
				c.JSON(http.StatusOK, answer)
			}
			s.metrics.requests.WithLabelValues(r.path, fmt.Sprint(c.Writer.Status())).Observe((time.Since(began) - parked).Seconds())
		}
	}
}

// identify tells who sent r and whether they may do what it needs.
func (s *Server) identify(r *http.Request, needs access.Action, now time.Time) (access.Identity, error) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return access.Identity{}, refusal(http.StatusUnauthorized, "no token", "send it as: Authorization: Bearer pdk_…")
	}
	who, err := s.verifier.Verify(token, now, nil)
	if err != nil {
		return access.Identity{}, err
	}
	// The ledger is read only for tokens that are genuine otherwise.
	ledger, err := s.ledger.get(r.Context(), now)
	if err != nil {
		return access.Identity{}, err
	}
	if _, revoked := ledger.Revoked[who.ID]; revoked {
		return access.Identity{}, access.ErrRevoked
	}
	if !access.Allows(who.Role, needs) {
		return access.Identity{}, refusal(http.StatusForbidden, fmt.Sprintf("the role %s may not do this", who.Role), "it needs a token of the role "+strings.Join(access.WhoMay(needs), " or "))
	}
	return who, nil
}

// decode reads exactly one JSON value; an empty body is the zero value.
func decode(body io.Reader, into any) error {
	decoder := json.NewDecoder(body)
	err := decoder.Decode(into)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err == nil {
		if _, err = decoder.Token(); errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = errors.New("there is more after the JSON value")
		}
	}
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return refusal(http.StatusRequestEntityTooLarge, "the body is too large", fmt.Sprintf("at most %d bytes", large.Limit))
	}
	return refusal(http.StatusBadRequest, "the body cannot be read: "+err.Error(), "send one JSON object")
}

// refusal is an error that is said to the caller as it is.
func refusal(status int, message, hint string) error {
	return &api.Error{Status: status, Message: message, Hint: hint}
}

// told turns an error into what the caller is told: the one place where errors become
// statuses. What is not meant for callers becomes a 500 without its words.
func told(err error) *api.Error {
	var ours *api.Error
	var token *access.Error
	switch {
	case errors.As(err, &ours):
		return ours
	case errors.As(err, &token):
		return &api.Error{Status: http.StatusUnauthorized, Message: token.Message, Hint: token.Hint}
	case errors.Is(err, store.ErrStale):
		return &api.Error{Status: http.StatusConflict, Message: "a later report of this node was taken already",
			Hint: "if two agents run under one name, stop one of them"}
	case errors.Is(err, store.ErrDown):
		return &api.Error{Status: http.StatusServiceUnavailable, Message: "the store cannot be reached", Hint: "try again; see /readyz"}
	case errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrFenced):
		return &api.Error{Status: http.StatusServiceUnavailable, Message: "the records changed too often meanwhile", Hint: "try again"}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return &api.Error{Status: http.StatusServiceUnavailable, Message: "the call was cut short", Hint: "try again"}
	}
	return &api.Error{Status: http.StatusInternalServerError, Message: "something went wrong here", Hint: "the controller's log says what"}
}

// refuse answers an error, and logs those that are ours. What a handler says in so many
// words (a node does not answer) is no failure here.
func (s *Server) refuse(c *gin.Context, path string, err error) {
	e := told(err)
	meant := (*api.Error)(nil)
	if e.Status >= http.StatusInternalServerError && !errors.As(err, &meant) && c.Request.Context().Err() == nil {
		s.log.Error("a request failed", "route", path, "status", e.Status, "error", err)
	}
	if e.Status == http.StatusUnauthorized {
		c.Header("WWW-Authenticate", `Bearer realm="paddock"`)
	}
	if e.Status == http.StatusServiceUnavailable {
		c.Header("Retry-After", "2") // seconds; a restarted Redis is back by then
	}
	c.AbortWithStatusJSON(e.Status, e)
}

// recover keeps a panic from ending the process, and its words from the caller.
func (s *Server) recover(c *gin.Context) {
	defer func() {
		if reason := recover(); reason != nil {
			s.log.Error("a handler panicked", "route", c.FullPath(), "reason", reason, "stack", string(debug.Stack()))
			s.refuse(c, c.FullPath(), errors.New("panic"))
		}
	}()
	c.Next()
}
