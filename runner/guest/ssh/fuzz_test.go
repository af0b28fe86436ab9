package ssh

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/runner/guest"
)

// FuzzAnswer: no bytes from a guest panic, and what is taken from them is bounded.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("hi\npaddock-X\nstate busy\nname r\nbusy 1767323045 2026-01-02 03:04:05Z: Running job: build\n.\n"))
	f.Add([]byte("paddock-X\nstate exited\nname r\nexit 3 1767323045\n.\n\xff the end"))
	f.Add([]byte("paddock-X\noccupied other\n"))
	f.Add([]byte("paddock-X\nok\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, word := range []bool{false, true} {
			r := &reader{Reader: bufio.NewReaderSize(bytes.NewReader(b), maxLine)}
			if err := r.preface("paddock-X"); err != nil {
				continue
			}
			if word {
				if err := r.word("ok"); err != nil && len(err.Error()) > 4*maxLine {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
				continue
			}
			s, err := r.status()
			if err != nil {
				continue
			}
			if len(s.Name) > 3<<10 || len(s.Job) > 3<<10 || len(s.Tail) > 12<<10 {
				t.Errorf("status out of bounds: name %d, job %d, tail %d bytes", len(s.Name), len(s.Job), len(s.Tail))
			}
			if _, err := json.Marshal(s); err != nil {
				t.Errorf("a status that cannot be passed on: %v", err)
			}
		}
	})
}

// FuzzPins: a file of host keys that is read says of itself what is written again.
func FuzzPins(f *testing.F) {
	f.Add("# comment\nsha256:x ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHmsvj8J5vQBZjGtTn0GgC2bLLq7WQSaLm1oAHAd8qU1\n")
	f.Fuzz(func(t *testing.T, text string) {
		pins, err := parsePins(text)
		if err != nil {
			return
		}
		k := &KeyFile{path: t.TempDir() + "/hosts"}
		if err := k.save(pins); err != nil {
			t.Fatal(err)
		}
		again, err := k.load()
		if err != nil || len(again) != len(pins) {
			t.Fatalf("%d pins of %d, %v", len(again), len(pins), err)
		}
		for i := range pins {
			if pins[i].name != again[i].name || !bytes.Equal(pins[i].key, again[i].key) {
				t.Errorf("pin %d: %v became %v", i, pins[i], again[i])
			}
		}
	})
}

// FuzzQuote: a shell reads what was quoted, and what was encoded for its printf, as it was.
func FuzzQuote(f *testing.F) {
	f.Add("it's $HOME `x` \\ \"\n#\n", []byte("\x00.\\0x\xff"))
	f.Fuzz(func(t *testing.T, text string, input []byte) {
		text = strings.ReplaceAll(text, "\x00", "")
		encoded := strings.TrimSuffix(encodeInput(input), ".")
		if strings.ContainsAny(encoded, ".'\n") || len(text)+len(encoded) > 64<<10 {
			return // longer than an argument may be
		}
		out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", "printf %s "+guest.Quote(text)+"; printf '%b' '"+encoded+"'").Output()
		if want := text + string(input); err != nil || string(out) != want {
			t.Errorf("%q, %v; want %q", out, err, want)
		}
	})
}
