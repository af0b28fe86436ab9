package main

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
)

// What a guest prints does nothing to a terminal but show.
func TestTamer(t *testing.T) {
	for text, want := range map[string]string{
		"a\tb\r\nü€":              "a\tb\r\nü€",
		"\x1b[31mred\x07\x00\x7f": "^[[31mred^G^@^?",
		"\u009b2J \u00a0\u00c2":   "^[[2J \u00a0\u00c2",
		"\xc2":                    "",
		"\xc2A":                   "\xc2A",
	} {
		for step := 1; step <= max(1, len(text)); step++ {
			var got bytes.Buffer
			w := &tamer{to: &got}
			for rest := text; rest != ""; rest = rest[min(step, len(rest)):] {
				if n, err := io.WriteString(w, rest[:min(step, len(rest))]); err != nil || n != min(step, len(rest)) {
					t.Fatal(n, err)
				}
			}
			if got.String() != want {
				t.Errorf("%q in steps of %d: %q, want %q", text, step, got.String(), want)
			}
		}
	}
}

// A guest's words in a reason or in an error make no row of their own and move no cursor.
func TestGuestsWordsInTables(t *testing.T) {
	const said = "\x1b[2J\u009b1mended\nvm2   mac-2\tbusy\r\u202e\xff"
	var out bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	if err := show(cmd, &globals{output: "wide"}, []api.VMRow{{ID: "vm1", Reason: said, Address: said, JobName: said}}, vmColumns); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(out.String(), "\n"); len(lines) != 3 || lines[2] != "" {
		t.Errorf("one VM is shown as %q", lines)
	}
	explained := bytes.Buffer{}
	cmd.SetOut(&explained)
	if err := writeExplanation(cmd, &globals{}, api.Explanation{Wait: said}); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(explained.String(), "\n"); n != 2 {
		t.Errorf("an explanation has %d lines: %q", n, &explained)
	}
	for _, text := range []string{out.String(), explained.String(), advise(errors.New(said)), advise(&api.Error{Message: said, Hint: said})} {
		if strings.ContainsAny(text, "\x1b\u009b\r\t\u202e") || !strings.Contains(text, "ended") {
			t.Errorf("%q", text)
		}
	}
}

func FuzzTamer(f *testing.F) {
	f.Add([]byte("\x1b[2J\xc2"), []byte("\x9b\n"))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var got bytes.Buffer
		w := &tamer{to: &got}
		for _, p := range [][]byte{one, two} {
			if n, err := w.Write(p); err != nil || n != len(p) {
				t.Fatal(n, err)
			}
		}
		for _, r := range got.String() {
			if r < ' ' && r != '\n' && r != '\t' && r != '\r' || r >= 0x7f && r < 0xa0 {
				t.Fatalf("%q became %q", string(one)+string(two), got.String())
			}
		}
	})
}

// What ssh hands to a shell arrives there word by word.
func TestQuoteAll(t *testing.T) {
	words := []string{"plain", "", "two words", "it's", "$HOME `x` \"y\" \\", "a%b", "*", "~", "new\nline"}
	out, err := exec.CommandContext(t.Context(), "sh", "-c", `printf '<%s>' `+quoteAll(words)).Output()
	if want := "<" + strings.Join(words, "><") + ">"; err != nil || string(out) != want {
		t.Errorf("%q, %v, want %q", out, err, want)
	}
}
