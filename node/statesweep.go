package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/fleet"
)

// open reads the states that agents before this one saved, and removes what is none: a
// crash cut it short, a file is missing, or there are fewer seats now. It is called
// before any VM lives.
func (s *states) open() error {
	images, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the saved states: %w", err)
	}
	for _, i := range images {
		dir := filepath.Join(s.dir, i.Name())
		entries, err := os.ReadDir(dir)
		if err != nil {
			s.remove(dir) // no directory of ours
			continue
		}
		for _, e := range entries {
			p, err := s.read(i.Name(), e.Name())
			if err != nil {
				s.log.Warn("a saved state that is none is removed", "state", e.Name(), "error", err)
				s.remove(filepath.Join(dir, e.Name()))
				continue
			}
			s.ready[p] = true
		}
		_ = os.Remove(dir) // if it is empty
	}
	return nil
}

// maxMark bounds a mark in bytes: a state has a handful of files.
const maxMark = 64 << 10

// read checks one state: its mark, its name, and that its files are as long as they were.
func (s *states) read(image, name string) (seat, error) {
	dir := filepath.Join(s.dir, image, name)
	data, err := readBounded(filepath.Join(dir, stateMark), maxMark)
	if errors.Is(err, fs.ErrNotExist) {
		return seat{}, errors.New("it was not finished")
	}
	if err != nil {
		return seat{}, err
	}
	m, err := decodeMark(data)
	if err != nil {
		return seat{}, err
	}
	if s.path(m.Seat) != dir {
		return seat{}, fmt.Errorf("its mark is that of %s of image %s", m.Seat, m.Seat.Image.Short())
	}
	if m.Seat.Number >= s.seats {
		return seat{}, fmt.Errorf("this node keeps %d of a kind now", s.seats)
	}
	for file, size := range m.Files {
		if !filepath.IsLocal(file) {
			return seat{}, fmt.Errorf("its mark names a file %q", file)
		}
		info, err := os.Lstat(filepath.Join(dir, file))
		if err != nil || info.Size() != size {
			return seat{}, fmt.Errorf("its file %s is missing or has another size", file)
		}
	}
	return m.Seat, nil
}

func decodeMark(data []byte) (mark, error) {
	var m mark
	if err := json.Unmarshal(data, &m); err != nil {
		return mark{}, fmt.Errorf("reading its mark: %w", err)
	}
	if m.Format != stateFormat {
		return mark{}, fmt.Errorf("its mark has format %d, and this program reads %d", m.Format, stateFormat)
	}
	return m, m.Seat.check()
}

// prune removes the states of images that are no longer here and those that no VM has
// started from for long. A seat that a living VM has keeps its state.
func (s *states) prune(images []fleet.NodeImage) {
	here := map[fleet.Digest]bool{}
	for _, i := range images {
		here[i.Digest] = true
	}
	s.sweep("its image is gone, or nobody asked for it", func(p seat) bool { return !here[p.Image] || s.isOld(p) })
}

// sweep removes states that no VM has the seat of.
func (s *states) sweep(why string, goes func(seat) bool) {
	s.mu.Lock()
	var gone []seat
	for p := range s.ready {
		if _, taken := s.taken[p]; !taken && goes(p) {
			gone = append(gone, p)
			s.taken[p] = ""
			delete(s.ready, p)
		}
	}
	s.mu.Unlock()
	for _, p := range gone {
		s.log.Info("a saved state is removed", "image", p.Image.Short(), "why", why)
		s.remove(s.path(p))
		_ = os.Remove(filepath.Dir(s.path(p))) // if it is empty
		s.release("", p)
	}
}

func (s *states) isOld(p seat) bool {
	info, err := os.Stat(filepath.Join(s.path(p), stateMark))
	return err == nil && s.now().Sub(info.ModTime()) > stateAge
}
