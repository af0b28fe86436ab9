package config

import "testing"

// The example is what people start from: it must pass the check as it stands.
func TestExampleFile(t *testing.T) {
	c, err := Load("../../../docs/paddock.example.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Pools) != 1 || c.Pools[0].Name != "sequoia" {
		t.Errorf("pools: %+v", c.Pools)
	}
}
