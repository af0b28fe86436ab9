package peer

import (
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

const (
	one     = fleet.Digest("sha256:1111111111111111111111111111111111111111111111111111111111111111")
	another = fleet.Digest("sha256:2222222222222222222222222222222222222222222222222222222222222222")
)

func TestTargets(t *testing.T) {
	for path, want := range map[string]target{
		"/v1/images/" + string(one) + "/manifest":                  {image: one},
		"/v1/images/" + string(one) + "/pieces/" + string(another): {one, another},
	} {
		if got, ok := parseTarget(path); !ok || got != want || got.path() != path {
			t.Errorf("%s: %+v, %v", path, got, ok)
		}
	}
	for _, path := range []string{
		"", "/", "/v1/images/", "/v1/images/" + string(one), "/v1/images/" + string(one) + "/", "/v1/images//manifest",
		"/v1/images/" + string(one) + "/manifest/", "/v1/images/" + string(one) + "/manifest/x",
		"/v1/images/../images/" + string(one) + "/manifest", "/v1/images/" + string(one) + "/pieces/",
		"/v1/images/" + string(one) + "/pieces/../../../etc/passwd", "/v1/images/" + string(one) + "/pieces/" + string(another) + "/",
		"/v1/images/sha512:" + strings.Repeat("1", 128) + "/manifest", "//v1/images/" + string(one) + "/manifest",
		"/v1/images/" + strings.ToUpper(string(one)) + "/manifest", "/v1/images/" + string(one) + "\x00/manifest",
	} {
		if got, ok := parseTarget(path); ok {
			t.Errorf("%q is taken for %+v", path, got)
		}
	}
}

func TestRanges(t *testing.T) {
	for text, want := range map[string]int64{"bytes=0-": 0, "bytes=17-": 17, "bytes=0017-": 17, "bytes=9223372036854775807-": 1<<63 - 1} {
		if from, ok := parseRange(http.Header{"Range": {text}}); !ok || from != want {
			t.Errorf("%s: %d, %v", text, from, ok)
		}
	}
	if from, ok := parseRange(nil); !ok || from != 0 {
		t.Errorf("none: %d, %v", from, ok)
	}
	for _, text := range []string{"", "bytes=", "bytes=-", "bytes=-5", "bytes=1-5", "bytes=--5-", "bytes=+5-", "bytes=1-,3-", "bytes= 1-", "items=1-", "bytes=9223372036854775808-"} {
		if from, ok := parseRange(http.Header{"Range": {text}}); ok {
			t.Errorf("%q is taken for %d", text, from)
		}
	}
	if from, ok := parseRange(http.Header{"Range": {"bytes=1-", "bytes=2-"}}); ok {
		t.Errorf("two ranges are taken for %d", from)
	}
}

// FuzzRequest: nothing panics; what a path is taken for is spelt in that one way, so that
// no path says more than two digests; and a range is a number that was written.
func FuzzRequest(f *testing.F) {
	f.Add("/v1/images/"+string(one)+"/manifest", "bytes=0-", "Bearer pdkpeer_x")
	f.Add("/v1/images/"+string(one)+"/pieces/"+string(another), "bytes=100-", "Bearer ")
	f.Add("/v1/images/../../etc/passwd/manifest", "bytes=-1-", "Basic x")
	f.Fuzz(func(t *testing.T, path, ranges, authorization string) {
		if got, ok := parseTarget(path); ok && (got.path() != path || fleet.CheckDigest(got.image) != nil) {
			t.Errorf("%q is taken for %+v", path, got)
		}
		if from, ok := parseRange(http.Header{"Range": {ranges}}); ok {
			digits := strings.TrimLeft(strings.TrimSuffix(strings.TrimPrefix(ranges, "bytes="), "-"), "0")
			if from < 0 || digits != strings.TrimLeft(strconv.FormatInt(from, 10), "0") {
				t.Errorf("%q is taken for %d", ranges, from)
			}
		}
		if token := parseToken(http.Header{"Authorization": {authorization}}); token != "" && authorization != bearer+token {
			t.Errorf("%q is taken for token %q", authorization, token)
		}
	})
}
