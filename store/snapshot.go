package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
)

// snapshotFormat is the version of the file; another one is refused, not guessed at.
const snapshotFormat = 1

// snapshotFile is the file's JSON: the sum covers Records.
type snapshotFile struct {
	Format  int             `json:"format"`
	Sum     uint32          `json:"crc32"`
	Records json.RawMessage `json:"records"`
}

// snapshotRecords is what outlives a restart, as the store keeps it.
type snapshotRecords struct {
	Jobs    map[string]string `json:"jobs"`    // id → record
	Tombs   map[string]string `json:"tombs"`   // id → milliseconds since 1970
	Cursors map[string]string `json:"cursors"` // name → value
}

func snapshotPath(dir string) string { return filepath.Join(dir, "snapshot.json") }

// encodeSnapshot makes the file of what snapshot.lua answered: three flat lists of
// keys and values.
func encodeSnapshot(answer []any) ([]byte, error) {
	if len(answer) != 3 {
		return nil, fmt.Errorf("snapshot: %d lists, want 3", len(answer))
	}
	var maps [3]map[string]string
	for i := range maps {
		list, ok := answer[i].([]any)
		if !ok || len(list)%2 != 0 {
			return nil, fmt.Errorf("snapshot: list %d is not one of pairs", i)
		}
		maps[i] = make(map[string]string, len(list)/2)
		for k := 0; k < len(list); k += 2 {
			maps[i][text(list, k)] = text(list, k+1)
		}
	}
	for id, at := range maps[1] {
		maps[1][id] = strconv.FormatInt(revisionOf(at), 10)
	}
	records, err := json.Marshal(snapshotRecords{Jobs: maps[0], Tombs: maps[1], Cursors: maps[2]})
	if err != nil {
		return nil, fmt.Errorf("encode the snapshot: %w", err)
	}
	return json.Marshal(snapshotFile{Format: snapshotFormat, Sum: crc32.ChecksumIEEE(records), Records: records})
}

// decodeSnapshot reads a file into the triples of kind, key and value that restore.lua
// takes. A record that cannot be read makes the whole file a damaged one.
func decodeSnapshot(body []byte) ([]any, error) {
	var file snapshotFile
	if err := json.Unmarshal(body, &file); err != nil {
		return nil, err
	}
	if file.Format != snapshotFormat {
		return nil, fmt.Errorf("format %d: this version reads format %d", file.Format, snapshotFormat)
	}
	if crc32.ChecksumIEEE(file.Records) != file.Sum {
		return nil, errors.New("the checksum is wrong")
	}
	var records snapshotRecords
	if err := json.Unmarshal(file.Records, &records); err != nil {
		return nil, err
	}
	var triples []any
	for id, record := range records.Jobs {
		job, err := joinJob(record)
		if err != nil {
			return nil, err
		}
		if jobKey(job.ID) != id {
			return nil, fmt.Errorf("job %d is kept as %q", job.ID, id)
		}
		triples = append(triples, "j", id, record)
	}
	for id, at := range records.Tombs {
		if _, err := strconv.ParseInt(at, 10, 64); err != nil {
			return nil, fmt.Errorf("tombstone of job %s: %w", id, err)
		}
		triples = append(triples, "t", id, at)
	}
	for name, value := range records.Cursors {
		triples = append(triples, "c", name, value)
	}
	return triples, nil
}

// writeFile replaces a file, whole or not at all, and durably.
func writeFile(path string, body []byte) error {
	staged, err := stageFile(path, body)
	if err != nil {
		return err
	}
	return putFile(staged, path)
}

// stageFile writes body durably into a new file beside path, for putFile.
func stageFile(path string, body []byte) (staged string, err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	file, err := os.CreateTemp(dir, filepath.Base(path)+".*.tmp") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = file.Write(body)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		_ = os.Remove(file.Name())
		return "", err
	}
	return file.Name(), nil
}

// putFile puts a staged file in the place of path; on failure it is gone.
func putFile(staged, path string) error {
	if err := os.Rename(staged, path); err != nil {
		_ = os.Remove(staged)
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes a new or renamed file's name durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
