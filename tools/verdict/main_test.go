package main

import "testing"

func TestStrict(t *testing.T) {
	for ci, want := range map[string]bool{
		"": false, "0": false, "false": false, "False": false, " ": false,
		"true": true, "TRUE": true, "1": true, "yes": true, "woodpecker": true,
	} {
		if got := strict(ci); got != want {
			t.Errorf("CI=%q: strict %v, want %v", ci, got, want)
		}
	}
}
