package guest

import (
	"os/exec"
	"strings"
	"testing"
)

// FuzzQuote: a shell gets every text back as it was, as a word and as a variable.
func FuzzQuote(f *testing.F) {
	for _, text := range []string{"", "plain", "it's $HOME `x` \\ \"", "-n", "two\n# lines\n", "\x01\xff~/*"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.ContainsRune(text, 0) {
			return
		}
		exports, err := Exports(map[string]string{"B": text, "A": "first"})
		if err != nil || !strings.HasPrefix(exports, "export A='first'\nexport B=") {
			t.Fatalf("%q, %v", exports, err)
		}
		out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", exports+"printf '%s|%s' "+Quote(text)+` "$B"`).Output()
		if err != nil || string(out) != text+"|"+text {
			t.Errorf("%q became %q, %v", text, out, err)
		}
	})
}

func TestExportsRefusesOddNames(t *testing.T) {
	for _, name := range []string{"", "a b", "1a", "a=b", "a;b", "é", "a\nb", "a\n"} {
		if text, err := Exports(map[string]string{name: "x"}); err == nil {
			t.Errorf("%q became %q", name, text)
		}
	}
}
