package helper

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/fleet"
)

// Trace is what is on disk of one machine.
type Trace struct {
	ID  fleet.VMID
	PID int // its helper's; 0: not known
	// Ended: its helper left the result; nobody has fetched it and destroyed the machine.
	Ended bool
}

// Look reads what is in a driver's directory without touching it, for a look beside the
// agent. A directory that is not there has no machines.
func Look(dir string) ([]Trace, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking for machines: %w", err)
	}
	var traces []Trace
	for _, e := range entries {
		id := fleet.VMID(e.Name())
		if !e.IsDir() || checkID(id) != nil {
			continue
		}
		f := folder(filepath.Join(dir, e.Name()))
		_, err := os.Stat(f.path(resultName))
		traces = append(traces, Trace{ID: id, PID: f.pid(), Ended: err == nil})
	}
	return traces, nil
}

// CheckPath fails if the sockets of machines in dir would have too long a path.
func CheckPath(dir string) error {
	_, err := (&Driver{config: Config{Dir: dir}}).folder(fleet.NewVMID())
	return err
}
