package testrunner

import (
	"encoding/base64"
	"io"
	"strings"
	"testing"
)

// A config that cannot be read ends the runner at once, and its errors do not quote it.
func TestABrokenConfig(t *testing.T) {
	pack := func(files string) string { return base64.StdEncoding.EncodeToString([]byte(files)) }
	for _, c := range []struct{ name, config, says string }{
		{"nothing", "", "not a JSON map"},
		{"no base64", "secret!", "not base64"},
		{"no JSON", pack("secret"), "not a JSON map"},
		{"no files", pack("{}"), "is missing or is not JSON"},
		{"no key", pack(`{".runner":"e30=",".credentials":"e30=",".credentials_rsaparams":"e30="}`), "key is broken"},
	} {
		exit, err := Run(t.Context(), strings.NewReader(c.config), io.Discard)
		if exit != 1 || err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: exit %d, %v, want %q", c.name, exit, err, c.says)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add("")
	f.Add("e30=")
	f.Add(base64.StdEncoding.EncodeToString([]byte(`{".runner":"e30=",".credentials":"e30=",".credentials_rsaparams":"eyJEIjoiQVE9PSJ9"}`)))
	f.Fuzz(func(t *testing.T, config string) {
		r, err := newRunner(config, io.Discard)
		if (r == nil) == (err == nil) {
			t.Errorf("runner %v, error %v", r, err)
		}
	})
}
