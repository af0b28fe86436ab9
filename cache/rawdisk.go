package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/image/tart"
)

// RawDisk is a disk in a file, to make an image of (tart.Source): it knows the file's
// holes, so that those are not read.
type RawDisk struct {
	*io.SectionReader
	file *os.File
	data [][2]int64 // from and to, ascending; all else is holes
}

var _ tart.Sparse = (*RawDisk)(nil)

// OpenRawDisk opens the disk in a file that nothing writes to.
func OpenRawDisk(path string) (*RawDisk, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the disk: %w", err)
	}
	d := &RawDisk{file: file}
	info, err := file.Stat()
	if err == nil {
		d.SectionReader = io.NewSectionReader(file, 0, info.Size())
		d.data, err = dataRanges(file, info.Size())
	}
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("opening the disk: %w", err)
	}
	return d, nil
}

// Zero implements tart.Sparse.
func (d *RawDisk) Zero(offset, size int64) bool {
	i := sort.Search(len(d.data), func(i int) bool { return d.data[i][1] > offset })
	return i == len(d.data) || d.data[i][0] >= offset+size
}

// Close closes the file.
func (d *RawDisk) Close() error { return d.file.Close() }

// dataRanges asks the file system what is not a hole; all is data where it cannot tell.
func dataRanges(file *os.File, size int64) (ranges [][2]int64, err error) {
	for at := int64(0); at < size; {
		from, err := file.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole to the end
		}
		if err != nil && unsupported(err) {
			return [][2]int64{{0, size}}, nil
		}
		if err != nil {
			return nil, err
		}
		if at, err = file.Seek(from, unix.SEEK_HOLE); err != nil {
			return nil, err
		}
		ranges = append(ranges, [2]int64{from, at})
	}
	return ranges, nil
}
