package cache

import "testing"

// A lone block of zeros is left out where it is a block of the disk, and written where it
// is only bytes.
func TestLoneZeroBlockWasWritten(t *testing.T) {
	b := append(append(letter('A')[:2*hole], zeros[:hole]...), letter('B')[:hole]...)
	if data, skip := split(b, 0); data != 2*hole || skip != hole {
		t.Errorf("%d bytes of data, %d left out; want %d and %d", data, skip, 2*hole, hole)
	}
	if data, skip := split(b, hole/2); data != len(b) || skip != 0 {
		t.Errorf("between blocks: %d bytes of data, %d left out; want %d and none", data, skip, len(b))
	}
}
