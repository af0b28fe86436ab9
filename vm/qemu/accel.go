package qemu

import "context"

const (
	accelTCG  = "tcg"
	accelKVM  = "kvm"
	accelAuto = "auto"
)

func (d *Driver) accel(ctx context.Context, p program) (string, error) { return accelTCG, nil }
