package config

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// Duration is a time.Duration written like 90s, 10m or 6h.
type Duration time.Duration

// Duration returns it as the standard library's.
func (d Duration) Duration() time.Duration { return time.Duration(d) }

// UnmarshalYAML reads a duration; a bare number is refused, since its unit is a guess.
func (d *Duration) UnmarshalYAML(node ast.Node) error {
	text := scalar(node)
	value, err := time.ParseDuration(text)
	if err != nil || value < 0 {
		return badValue(node, text, "a duration", "write 90s, 10m or 6h")
	}
	*d = Duration(value)
	return nil
}

// Size is a number of bytes, written like 8GiB or 40GB.
type Size int64

// sizeUnits, longest suffix first.
var sizeUnits = []struct {
	suffix string
	bytes  float64
}{
	{"kib", 1 << 10}, {"mib", 1 << 20}, {"gib", 1 << 30}, {"tib", 1 << 40},
	{"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9}, {"tb", 1e12}, {"b", 1},
}

// UnmarshalYAML reads a size; a bare number is refused, since its unit is a guess.
func (s *Size) UnmarshalYAML(node ast.Node) error {
	text := scalar(node)
	if s.Set(text) != nil {
		return badValue(node, text, "a size", "write 8GiB or 40GB")
	}
	return nil
}

// Set reads a size as a flag's value; a bare number is refused as well.
func (s *Size) Set(text string) error {
	for _, unit := range sizeUnits {
		number, found := strings.CutSuffix(strings.ToLower(text), unit.suffix)
		if !found {
			continue
		}
		value, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		// Above 8 EiB a size would not fit the int64 that it becomes.
		if err == nil && value >= 0 && value*unit.bytes < 1<<63 {
			*s = Size(value * unit.bytes)
			return nil
		}
	}
	return fmt.Errorf("%q is not a size: write 8GiB or 40GB", text)
}

// String is the number of bytes, and nothing for none, as a flag's default is shown.
func (s *Size) String() string {
	if *s == 0 {
		return ""
	}
	return strconv.FormatInt(int64(*s), 10) + "B"
}

// Type names the value in a command's help.
func (s *Size) Type() string { return "size" }

func scalar(node ast.Node) string {
	if token := node.GetToken(); token != nil {
		return strings.TrimSpace(token.Value)
	}
	return node.String()
}

func badValue(node ast.Node, text, kind, hint string) error {
	problem := &Problem{Path: node.GetPath(), What: fmt.Sprintf("%q is not %s", text, kind), Hint: hint}
	if token := node.GetToken(); token != nil && token.Position != nil {
		problem.Line = token.Position.Line
	}
	return problem
}
