package helper_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
)

// Why a boot failed is said once: each layer between it and a person once put "booting"
// and the machine's name before it.
func TestBootReasonsDoNotStutter(t *testing.T) {
	f := newFixture(t, "good", 1)
	ctx := withTimeout(t)
	taken, err := f.driver.Boot(ctx, processtest.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Destroy(context.WithoutCancel(ctx)) }()
	spec := processtest.Spec(t)
	_, err = f.driver.Boot(ctx, spec)
	if !errors.Is(err, vm.ErrAtCapacity) || strings.Contains(err.Error(), "booting") || strings.Contains(err.Error(), string(spec.ID)) {
		t.Errorf("a host without a slot: %q", err)
	}
}
