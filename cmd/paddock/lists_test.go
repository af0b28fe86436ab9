package main

import (
	"bytes"
	"regexp"
	"testing"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
)

// The wide list of nodes says where a node is, and where its neighbours find it.
func TestNodesWide(t *testing.T) {
	var out bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	rows := []api.NodeRow{{ID: "mac-1", Driver: "vz", Site: "berlin", Peer: "10.0.0.7:7420"}}
	if err := show(cmd, &globals{output: "wide"}, rows, nodeColumns); err != nil {
		t.Fatal(err)
	}
	if want := regexp.MustCompile(`\bSITE +PEER +DRIVER\b(.|\n)*\bberlin +10\.0\.0\.7:7420 +vz\b`); !want.MatchString(out.String()) {
		t.Errorf("no %s in:\n%s", want, out.String())
	}
	out.Reset()
	if err := show(cmd, &globals{output: "table"}, rows, nodeColumns); err != nil || bytes.Contains(out.Bytes(), []byte("berlin")) {
		t.Errorf("%v in the narrow list:\n%s", err, out.String())
	}
}
