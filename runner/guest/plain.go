package guest

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Plain makes one harmless line of a text that a guest may have written, at most limit
// bytes of valid UTF-8: it may end on an operator's terminal, or in a row of a table.
// What a terminal would obey or hide becomes a space: all controls (lines, ESC, and
// U+0080 to U+009F, which some terminals take for ESC [ and its kin), what sets a text's
// direction or has no width, and the two separators that are ends of lines elsewhere.
// What is plain stays as it is.
func Plain(text string, limit int) string {
	var plain strings.Builder
	for _, r := range text { // a byte that is no UTF-8 comes as U+FFFD
		if unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp) {
			r = ' '
		}
		if plain.Len()+utf8.RuneLen(r) > limit {
			break
		}
		plain.WriteRune(r)
	}
	return plain.String()
}
