package githubtest

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

//go:embed data/github-openapi-subset.json data/webhook-schemas-subset.json
var data embed.FS

// schema holds GitHub's descriptions: what the REST API may say, and webhooks.
type schema struct {
	router routers.Router
	basic  *openapi3.Schema              // of error bodies
	events map[string]*jsonschema.Schema // by event$action
}

// loadSchema reads the descriptions once per process; they are never changed.
var loadSchema = sync.OnceValues(func() (*schema, error) {
	raw, err := data.ReadFile("data/github-openapi-subset.json")
	if err != nil {
		return nil, err
	}
	doc, err := openapi3.NewLoader().LoadFromData(raw)
	if err != nil {
		return nil, fmt.Errorf("OpenAPI: %w", err)
	}
	doc.Servers = nil // https://api.github.com; here any host will do
	router, err := gorillamux.NewRouter(doc)
	if err != nil {
		return nil, fmt.Errorf("OpenAPI: %w", err)
	}
	s := &schema{router: router, basic: doc.Components.Schemas["basic-error"].Value, events: map[string]*jsonschema.Schema{}}

	raw, err = data.ReadFile("data/webhook-schemas-subset.json")
	if err != nil {
		return nil, err
	}
	hooks, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("webhook schemas: %w", err)
	}
	compiler := jsonschema.NewCompiler()
	compiler.RegisterFormat(&jsonschema.Format{Name: "uri-template", Validate: uriTemplate})
	compiler.AssertFormat()
	if err := compiler.AddResource("webhooks.json", hooks); err != nil {
		return nil, fmt.Errorf("webhook schemas: %w", err)
	}
	for _, action := range []string{"queued", "waiting", "in_progress", "completed"} {
		event := "workflow_job$" + action // as the document names them
		if s.events[event], err = compiler.Compile("webhooks.json#/definitions/" + event); err != nil {
			return nil, fmt.Errorf("webhook schema of %s: %w", event, err)
		}
	}
	return s, nil
})

// uriTemplate replaces the library's own check, which does not know the operators of
// RFC 6570 ({/sha}, {?since}) that GitHub's templates are full of.
func uriTemplate(v any) error {
	template, ok := v.(string)
	if ok && strings.Count(template, "{") != strings.Count(template, "}") {
		return fmt.Errorf("%q: braces do not match", template)
	}
	return nil
}

// filterOptions: authentication is checked by the handlers, which know the keys.
var filterOptions = &openapi3filter.Options{
	AuthenticationFunc:    openapi3filter.NoopAuthenticationFunc,
	IncludeResponseStatus: true,
	SkipSettingDefaults:   true,
}

// request validates a REST request; its input is needed for the response.
func (s *schema) request(r *http.Request, body []byte) (*openapi3filter.RequestValidationInput, error) {
	route, parameters, err := s.router.FindRoute(r)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", r.Method, r.URL.Path, err)
	}
	checked := r.Clone(r.Context())
	checked.Body = io.NopCloser(bytes.NewReader(body))
	input := &openapi3filter.RequestValidationInput{
		Request: checked, PathParams: parameters, Route: route, Options: filterOptions,
	}
	if err := openapi3filter.ValidateRequest(r.Context(), input); err != nil {
		return input, fmt.Errorf("%s %s: %s", r.Method, route.Path, brief(err))
	}
	return input, nil
}

// everywhere are the answers that any path may give and the description leaves out for
// most: they must at least carry the body of an error.
var everywhere = []int{
	http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusTooManyRequests,
}

// response validates a REST response.
func (s *schema) response(ctx context.Context, input *openapi3filter.RequestValidationInput, status int, header http.Header, body []byte) error {
	if status >= 500 {
		return nil // nothing is promised about them
	}
	where := fmt.Sprintf("%s %s answers %d", input.Request.Method, input.Route.Path, status)
	if input.Route.Operation.Responses.Status(status) == nil {
		for _, known := range everywhere {
			if status == known {
				return s.errorBody(where, body)
			}
		}
	}
	err := openapi3filter.ValidateResponse(ctx, &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: status, Header: header,
		Body: io.NopCloser(bytes.NewReader(body)), Options: filterOptions,
	})
	if err != nil {
		return fmt.Errorf("%s: %s", where, brief(err))
	}
	return nil
}

// brief leaves out the schema and the value, which kin-openapi prints whole.
func brief(err error) string {
	message, _, _ := strings.Cut(err.Error(), "\nSchema:")
	return message
}

func (s *schema) errorBody(where string, body []byte) error {
	var value any
	if err := json.Unmarshal(body, &value); err != nil {
		return fmt.Errorf("%s: body is not JSON: %w", where, err)
	}
	if err := s.basic.VisitJSON(value); err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	return nil
}

// hook validates a webhook's payload.
func (s *schema) hook(event, action string, payload []byte) error {
	compiled := s.events[event+"$"+action]
	if compiled == nil {
		return fmt.Errorf("webhook %s %s: its schema is not known here", event, action)
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(payload))
	if err != nil {
		return fmt.Errorf("webhook %s %s: %w", event, action, err)
	}
	if err := compiled.Validate(value); err != nil {
		return fmt.Errorf("webhook %s %s: %w", event, action, err)
	}
	return nil
}

// violate records what does not conform.
func (g *GitHub) violate(err error) {
	g.c.Log.Error("not as GitHub describes itself", "error", err)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.violations = append(g.violations, err.Error())
}

// Violations lists what did not conform to GitHub's descriptions: requests, responses
// and webhooks. A test asserts that there is none.
func (g *GitHub) Violations() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.violations...)
}
