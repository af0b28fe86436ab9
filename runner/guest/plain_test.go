package guest

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestPlain(t *testing.T) {
	for _, test := range []struct {
		text  string
		limit int
		want  string
	}{
		{"", 10, ""},
		{"build (arm64) √ 日本", 100, "build (arm64) √ 日本"},
		{"a\x1b[2J\x1b]0;title\a\x7fb", 100, "a [2J ]0;title  b"},
		{"row\nfake\trow\r\n", 100, "row fake row  "},
		{"a\u009b2J\u0085\u009cb", 100, "a 2J  b"},                      // ESC [ in one character
		{"a\x9b2J\xffb", 100, "a\uFFFD2J\uFFFDb"},                       // the same as a byte
		{"evil\u202egnp.exe\u2066\u200b\ufeff", 100, "evil gnp.exe   "}, // reads backwards
		{"two\u2028lines\u2029here", 100, "two lines here"},
		{"ééé", 5, "éé"}, // no half character
		{"\xff\xff\xff", 5, "\uFFFD"},
		{"abc", 0, ""},
		{"abc", -1, ""},
	} {
		if got := Plain(test.text, test.limit); got != test.want {
			t.Errorf("Plain(%q, %d) = %q, want %q", test.text, test.limit, got, test.want)
		}
	}
}

func FuzzPlain(f *testing.F) {
	f.Add("a\x1b[2J\u009b\xff\u202e\n", 7)
	f.Fuzz(func(t *testing.T, text string, limit int) {
		got := Plain(text, limit)
		if len(got) > max(0, limit) || !utf8.ValidString(got) || strings.ContainsFunc(got, unicode.IsControl) {
			t.Errorf("%q, %d: %q", text, limit, got)
		}
		if again := Plain(got, limit); again != got {
			t.Errorf("%q became %q", got, again)
		}
	})
}

// What a guest says of itself does nothing to the terminal of who reads it.
func TestWordsOfAGuestArePlain(t *testing.T) {
	const evil = "x\x1b[2J\u009b1A\n3k8x  ready"
	const tame = "x [2J 1A 3k8x  ready"
	for _, code := range []string{"", codeOccupied, codeUnsupported} {
		if text := (errorBody{Code: code, Text: evil}).asError().Error(); strings.ContainsFunc(text, unicode.IsControl) || !strings.Contains(text, tame) {
			t.Errorf("an error with code %q: %q", code, text)
		}
	}
	if s, ok := (Status{State: Busy, Job: evil}).checked(); !ok || s.Job != tame {
		t.Errorf("a job: %q", s.Job)
	}
	if n := (Network{Interface: evil}).checked(); n.Interface != tame {
		t.Errorf("an interface: %q", n.Interface)
	}
}
