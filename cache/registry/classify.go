package registry

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/paddock-ci/paddock/cache"
)

// maxText bounds what is told of a registry's own words, in bytes: some answer with a
// page of HTML.
const maxText = 400

// classify finds out what an error of go-containerregistry or net/http means, and says
// what to do. path is below the repository; empty: the repository as a whole.
func classify(repository name.Repository, path string, err error) error {
	var known *cache.Error
	if errors.As(err, &known) {
		return err
	}
	err = discreet(err)
	host, what := repository.RegistryStr(), strings.TrimSuffix(repository.Name()+"/"+path, "/")
	network := &cache.Error{Class: cache.ClassNetwork, Err: fmt.Errorf("%s: %w", what, err)}
	var refused *transport.Error
	if !errors.As(err, &refused) {
		var request *url.Error
		if errors.As(err, &request) {
			network.Err = fmt.Errorf("%w; check that this machine reaches %s", network.Err, host)
		}
		return network
	}
	switch refused.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("%s refuses access to %s: %w; log in with \"docker login %s\" or check the credentials' scope", host, repository.RepositoryStr(), err, host)}
	case http.StatusNotFound:
		return &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("%s is not at %s: %w; check the name, and whether the registry hides it for lack of credentials", path, repository.Name(), err)}
	case http.StatusTooManyRequests, http.StatusRequestTimeout:
		return network
	}
	if refused.StatusCode/100 == 5 {
		return network
	}
	return &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("%s: %w", what, err)}
}

// query finds the queries of URLs: links to storage are signed there, and whoever has
// the link has the blob.
var query = regexp.MustCompile(`(https?://[^\s"?]*)\?[^\s"]*`)

// discreet takes from an error's text what must not be in logs: the queries of signed
// links, and answers of token servers. It bounds the text.
func discreet(err error) error {
	text := query.ReplaceAllString(err.Error(), "$1")
	if before, _, found := strings.Cut(text, "no token in bearer response"); found {
		text = before + "the token server's answer holds no token"
	}
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "…"
	}
	if text == err.Error() {
		return err
	}
	return worded{err, text}
}

// worded is an error with another text.
type worded struct {
	error
	text string
}

func (w worded) Error() string { return w.text }
func (w worded) Unwrap() error { return w.error }
