package guest

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Quote makes one word of any text for a POSIX shell; a NUL byte has no place in one.
func Quote(text string) string {
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// variable is a name that a shell can export.
var variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// Exports are lines that set variables in a POSIX shell, in the order of their names.
func Exports(env map[string]string) (string, error) {
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(env)) {
		if !variable.MatchString(key) {
			return "", fmt.Errorf("env: %q is no name that a shell can pass on: letters, digits and _ only", key)
		}
		fmt.Fprintf(&text, "export %s=%s\n", key, Quote(env[key]))
	}
	return text.String(), nil
}
