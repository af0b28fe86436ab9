package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// journalFormat is the version of a record; one of another version is moved aside.
const journalFormat = 1

// maxRecord bounds a journal file in bytes: a record is a few kilobytes.
const maxRecord = 1 << 20

// vmIDPattern is what a VM's id must look like before it becomes a file's name: an
// order or a file from outside must not lead out of our directory.
var vmIDPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// record is what the journal keeps of one VM. No JIT config is ever in it.
type record struct {
	Format int          `json:"format"`
	Node   fleet.NodeID `json:"node"`
	// Report is what the controller is told, or will be.
	Report api.VMReport `json:"report"`
	// Starting is the runner that was about to be started; it moves to Report.Runner
	// once the guest has taken it.
	Starting *api.RunnerReport `json:"starting,omitempty"`
	// Seat is the saved state that the machine started from (Report.Tier says so) or that
	// was saved of it: no other VM has it while this one lives.
	Seat *seat `json:"seat,omitempty"`
	// End is why the VM's life ends, from before its teardown begins.
	End *ending `json:"end,omitempty"`
}

// journal keeps one file per VM, each replaced as a whole.
type journal struct {
	dir  string
	node fleet.NodeID
}

func openJournal(dir string, node fleet.NodeID) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the journal: %w", err)
	}
	return &journal{dir: dir, node: node}, nil
}

func (j *journal) path(id fleet.VMID) string { return filepath.Join(j.dir, string(id)+".json") }

// put writes a record so that a crash leaves the old one or the new one.
func (j *journal) put(r record) error {
	r.Format, r.Node = journalFormat, j.node
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("journal of VM %s: %w", r.Report.ID, err)
	}
	path := j.path(r.Report.ID)
	_, err = os.Lstat(path)
	fresh := errors.Is(err, fs.ErrNotExist)
	if err := writeSynced(path+".new", data); err != nil {
		return fmt.Errorf("journal of VM %s: %w", r.Report.ID, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("journal of VM %s: %w", r.Report.ID, err)
	}
	if !fresh {
		return nil // a lost rename leaves the record before it, which is true as well
	}
	return syncDir(j.dir)
}

// remove forgets a VM.
func (j *journal) remove(id fleet.VMID) error {
	if err := os.Remove(j.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal of VM %s: %w", id, err)
	}
	return nil
}

// load reads every record. A file that is no record of ours is moved aside into
// "aside" and named in problems; err means that the journal cannot be read at all.
func (j *journal) load() (records []record, problems []error, err error) {
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the journal: %w", err)
	}
	for _, e := range entries {
		id, isRecord := strings.CutSuffix(e.Name(), ".json")
		if e.IsDir() || !isRecord {
			continue // "aside", and .new files of a write that a crash cut short
		}
		r, err := j.read(fleet.VMID(id))
		if err == nil {
			records = append(records, r)
			continue
		}
		problems = append(problems, fmt.Errorf("journal file %s: %w", e.Name(), err))
		if err := j.moveAside(e.Name()); err != nil {
			problems = append(problems, err)
		}
	}
	return records, problems, nil
}

func (j *journal) read(id fleet.VMID) (record, error) {
	data, err := readBounded(j.path(id), maxRecord)
	if err != nil {
		return record{}, err
	}
	r, err := decodeRecord(data)
	if err != nil {
		return record{}, err
	}
	if r.Report.ID != id {
		return record{}, fmt.Errorf("it speaks of VM %s", r.Report.ID)
	}
	if r.Node != j.node {
		return record{}, fmt.Errorf("it is node %q's, and this is %q", r.Node, j.node)
	}
	return r, nil
}

// readBounded reads a file of at most most bytes.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("larger than %d bytes", most)
	}
	return data, err
}

// moveAside keeps a bad file for people, under a name that no later one takes.
func (j *journal) moveAside(name string) error {
	aside := filepath.Join(j.dir, "aside")
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return fmt.Errorf("moving a journal file aside: %w", err)
	}
	to := filepath.Join(aside, name)
	for n := 1; ; n++ {
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			break
		}
		to = filepath.Join(aside, fmt.Sprintf("%s.%d", name, n))
	}
	if err := os.Rename(filepath.Join(j.dir, name), to); err != nil {
		return fmt.Errorf("moving a journal file aside: %w", err)
	}
	return nil
}

// decodeRecord reads one record and refuses what no agent has written.
func decodeRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, err
	}
	if r.Format != journalFormat {
		return record{}, fmt.Errorf("format %d, and this program reads format %d", r.Format, journalFormat)
	}
	if !vmIDPattern.MatchString(string(r.Report.ID)) || r.Report.Order.ID != r.Report.ID {
		return record{}, fmt.Errorf("VM %q with an order for %q", r.Report.ID, r.Report.Order.ID)
	}
	if stage(r.Report.State) == 0 {
		return record{}, fmt.Errorf("state %q", r.Report.State)
	}
	if r.Seat != nil {
		if err := r.Seat.check(); err != nil {
			return record{}, err
		}
	}
	return r, nil
}

// stage orders the states that a node may report; 0: none of them.
func stage(s fleet.VMState) int {
	switch s {
	case fleet.VMBooting:
		return 1
	case fleet.VMWarm:
		return 2
	case fleet.VMRegistered:
		return 3
	case fleet.VMBusy:
		return 4
	case fleet.VMDone:
		return 5
	case fleet.VMPlaced, fleet.VMLost: // the leader's words
	}
	return 0
}

// writeSynced writes a file (0600: an order's environment is nobody else's) and returns
// once it is on disk.
func writeSynced(path string, data []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

// syncDir makes a new name in dir survive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

// lockTime is how long a lock is waited for: an agent that was killed in the middle of
// starting a helper leaves it locked until that helper's program is loaded.
const lockTime = 2 * time.Second

// lock takes an advisory lock that ends with the process, however it ends. The file
// is not inherited by children's programs, so a helper process does not hold it.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the agent's directory: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if ctx.Err() != nil {
			_ = f.Close()
			return nil, fmt.Errorf("%s is locked (%w): is another agent running with this directory? stop it first, or give this one a directory of its own", path, err)
		}
		pause(ctx, lockTime/40)
	}
}
