package tart

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/image"
)

// A guest's kernel comes from outside like the rest of the config: what cannot be on a
// disk is refused before anything is read from one.
func TestBoot(t *testing.T) {
	config := func(boot string) string { return `{"version":1,"os":"linux","paddockBoot":` + boot + `}` }
	good := config(`{"kernel":{"offset":512,"size":1024},"initrd":{"offset":2048,"size":1},"commandLine":"console=hvc0"}`)
	c, err := ParseConfig([]byte(good))
	if err != nil || c.Boot.Initrd.Offset != 2048 {
		t.Fatalf("%+v, %v", c, err)
	}
	if again, err := json.Marshal(c); err != nil || !strings.Contains(string(again), `"commandLine":"console=hvc0"`) {
		t.Errorf("written again: %s, %v", again, err)
	}
	for what, bad := range map[string]string{
		"no kernel":         config(`{}`),
		"an empty kernel":   config(`{"kernel":{"offset":0,"size":0}}`),
		"before the disk":   config(`{"kernel":{"offset":-1,"size":5}}`),
		"beyond any disk":   config(`{"kernel":{"offset":9223372036854775807,"size":5}}`),
		"a huge kernel":     config(`{"kernel":{"offset":0,"size":99999999999}}`),
		"a bad initrd":      config(`{"kernel":{"offset":0,"size":5},"initrd":{"offset":0,"size":-5}}`),
		"a line too long":   config(`{"kernel":{"offset":0,"size":5},"commandLine":"` + strings.Repeat("x", 4096) + `"}`),
		"two lines":         config(`{"kernel":{"offset":0,"size":5},"commandLine":"a\nb"}`),
		"on a macOS guest":  `{"version":1,"ecid":"YQ==","hardwareModel":"YQ==","paddockBoot":{"kernel":{"offset":0,"size":5}}}`,
		"of another nature": config(`[1]`),
	} {
		if _, err := ParseConfig([]byte(bad)); !errors.Is(err, image.ErrMalformed) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
