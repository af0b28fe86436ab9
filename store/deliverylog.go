package store

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// deliveryLog is the embedded store's write-ahead log: numbered files of one line per
// delivery, "crc32 JSON". Files are only appended to; a file that a write or sync
// failed on is left alone and the next one begun, since nobody knows where it ends.
type deliveryLog struct {
	dir string

	// merging is held for reading from the append until the merge is done, so that
	// rotate can wait for deliveries that are on disk but not yet in the store.
	merging sync.RWMutex

	// turn holds one token while somebody writes and syncs.
	turn chan struct{}

	mu      sync.Mutex
	pending *batch // collects while another batch is written
	file    *os.File
	next    int // number of the next file
}

// batch is lines that are written and synced together.
type batch struct {
	lines bytes.Buffer
	done  chan struct{}
	err   error
}

func newDeliveryLog(dir string, next int) *deliveryLog {
	return &deliveryLog{dir: dir, next: next, turn: make(chan struct{}, 1)}
}

func logPath(dir string, number int) string {
	return filepath.Join(dir, fmt.Sprintf("deliveries-%08d.log", number))
}

// findLogs returns the numbers of the log files, oldest first.
func findLogs(dir string) ([]int, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "deliveries-*.log"))
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, path := range paths {
		name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "deliveries-"), ".log")
		if n, err := strconv.Atoi(name); err == nil && n > 0 {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// removeLogs removes the files before number keep.
func removeLogs(dir string, keep int) error {
	numbers, err := findLogs(dir)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		if n < keep {
			err = errors.Join(err, os.Remove(logPath(dir, n)))
		}
	}
	return err
}

// append puts a delivery on disk, together with those of other callers of the same
// moment: while one batch is synced the next one collects. The returned function must
// be called once the delivery is merged.
func (l *deliveryLog) append(d Delivery) (release func(), err error) {
	line, err := encodeLine(d)
	if err != nil {
		return nil, err
	}
	l.merging.RLock()
	l.mu.Lock()
	b, mine := l.pending, false
	if b == nil {
		b, mine = &batch{done: make(chan struct{})}, true
		l.pending = b
	}
	b.lines.Write(line)
	l.mu.Unlock()
	if mine {
		l.flush(b)
	}
	// Not abandoned when the caller gives up: the line is or will be on disk, and rotate
	// must not pass it by. A sync ends, or the disk is lost and the process with it.
	<-b.done
	if b.err != nil {
		l.merging.RUnlock()
		return nil, b.err
	}
	return l.merging.RUnlock, nil
}

// flush waits for the batch before it, then writes this one.
func (l *deliveryLog) flush(b *batch) {
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	l.mu.Lock()
	l.pending = nil
	l.mu.Unlock()
	b.err = l.write(b.lines.Bytes())
	close(b.done)
}

// write appends to the current file and syncs it. The caller holds the turn.
func (l *deliveryLog) write(lines []byte) error {
	if l.file == nil {
		file, err := os.OpenFile(logPath(l.dir, l.next), os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
		l.next++
		if err != nil {
			return fmt.Errorf("begin a log of deliveries: %w", err)
		}
		l.file = file
		if err := syncDir(l.dir); err != nil {
			return errors.Join(err, l.abandon())
		}
	}
	if _, err := l.file.Write(lines); err != nil {
		return errors.Join(fmt.Errorf("append deliveries: %w", err), l.abandon())
	}
	if err := l.file.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync deliveries: %w", err), l.abandon())
	}
	return nil
}

// abandon closes the current file; the next write begins another.
func (l *deliveryLog) abandon() error {
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// rotate ends the current file, waits until all that is in it is merged, and returns
// the number of the file that comes next.
func (l *deliveryLog) rotate() (int, error) {
	l.merging.Lock()
	defer l.merging.Unlock()
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	return l.next, l.abandon()
}

// close ends the log.
func (l *deliveryLog) close() error {
	_, err := l.rotate()
	return err
}

// encodeLine makes a delivery's line. JSON has no newline inside.
func encodeLine(d Delivery) ([]byte, error) {
	body, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode delivery: %w", err)
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.ChecksumIEEE(body), body), nil
}

// decodeLine is its inverse, on a line without its newline.
func decodeLine(line []byte) (d Delivery, err error) {
	sum, body, found := bytes.Cut(line, []byte(" "))
	want, err := strconv.ParseUint(string(sum), 16, 32)
	if !found || err != nil || len(sum) != 8 {
		return d, errors.New("the line does not begin with a checksum")
	}
	if crc32.ChecksumIEEE(body) != uint32(want) {
		return d, errors.New("the checksum is wrong")
	}
	if err := json.Unmarshal(body, &d); err != nil {
		return d, err
	}
	return d, nil
}

// readLog calls each for every delivery in a file. A last line that was torn by a
// crash was never answered for and is passed over; a damaged one before it is
// reported and skipped.
func readLog(path string, log *slog.Logger, each func(Delivery) error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	return scanLog(file, log.With("file", path), each)
}

func scanLog(r io.Reader, log *slog.Logger, each func(Delivery) error) error {
	lines := bufio.NewReader(r)
	for number := 1; ; number++ {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			if len(line) > 0 {
				log.Info("the last logged delivery was torn by a crash before it was accepted", "line", number, "bytes", len(line))
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("read deliveries: %w", err)
		}
		d, err := decodeLine(bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			log.Error("a logged delivery is damaged and skipped; the sweep of deliveries at GitHub brings it again", "line", number, "error", err)
			continue
		}
		if err := each(d); err != nil {
			return err
		}
	}
}
