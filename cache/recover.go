package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// recover lists what a former process left: ready images, partial ones to be resumed,
// leases. What is neither is removed, and said in the log.
func (s *Store) recover() error {
	if err := s.sweepTrash(); err != nil {
		return err
	}
	if err := s.adopt("images", s.adoptImage); err != nil {
		return err
	}
	if err := s.adopt("partial", s.adoptPartial); err != nil {
		return err
	}
	return s.recoverLeases()
}

// adopt takes over each image of one directory, or removes it.
func (s *Store) adopt(kind string, one func(fleet.Digest) error) error {
	names, err := os.ReadDir(filepath.Join(string(s.dir), kind))
	if err != nil {
		return err
	}
	for _, name := range names {
		d := fleet.Digest("sha256:" + name.Name())
		err := fleet.CheckDigest(d)
		if err == nil {
			err = one(d)
		}
		if err == nil {
			continue
		}
		s.log.Warn("removing what is no image", "dir", kind, "name", name.Name(), "err", err)
		if err := s.dir.discard(filepath.Join(string(s.dir), kind, name.Name())); err != nil {
			return err
		}
	}
	return nil
}

// sweepTrash empties the trash.
func (s *Store) sweepTrash() error {
	trash := filepath.Join(string(s.dir), "trash")
	names, err := os.ReadDir(trash)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := os.RemoveAll(filepath.Join(trash, name.Name())); err != nil {
			return err
		}
	}
	return nil
}

// readManifest reads the manifest of an image on disk and holds it to its digest.
func (s *Store) readManifest(dir string, d fleet.Digest) (*image.Manifest, image.Codec, error) {
	raw, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return nil, nil, err
	}
	if got := image.DigestOf(raw); got != d {
		return nil, nil, fmt.Errorf("its manifest has digest %s", got)
	}
	return image.Parse(raw, s.codecs)
}

// adoptImage lists a published image, if it is one.
func (s *Store) adoptImage(d fleet.Digest) error {
	dir := s.dir.image(d)
	m, _, err := s.readManifest(dir, d)
	if err != nil {
		return err
	}
	for _, file := range []string{nvramFile, configFile} {
		if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
			return err
		}
	}
	disk, err := os.Stat(filepath.Join(dir, diskFile))
	if err != nil {
		return err
	}
	if disk.Size() != m.DiskSize {
		return fmt.Errorf("its disk has %d bytes, its manifest says %d", disk.Size(), m.DiskSize)
	}
	size, err := allocated(dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entry(d)
	e.DiskBytes = size
	e.Ref, e.UsedAt = readMeta(dir)
	s.move(e, fleet.ImageReady)
	return nil
}

// adoptPartial lists a partial image as paused, if it can be resumed.
func (s *Store) adoptPartial(d fleet.Digest) error {
	dir := s.dir.partial(d)
	m, _, err := s.readManifest(dir, d)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(dir, journalFile))
	if err != nil {
		return err
	}
	done, _ := parseJournal(data)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.images[d]; e != nil && e.State == fleet.ImageReady {
		return errors.New("the image is ready, too")
	}
	e := s.entry(d)
	e.Ref, _ = readMeta(dir)
	e.Total = m.Bytes()
	e.done.Store((&journal{done: done}).bytes(m))
	s.move(e, fleet.ImagePaused)
	s.log.Info("found a pull to resume", "image", d, "done", e.done.Load(), "total", e.Total)
	return nil
}

// recoverLeases takes over the leases of ready images and removes the others.
func (s *Store) recoverLeases() error {
	root := filepath.Join(string(s.dir), "leases")
	names, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		dir := filepath.Join(root, name.Name())
		e := s.images[fleet.Digest("sha256:"+name.Name())]
		if e == nil || e.State != fleet.ImageReady {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		files, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, f := range files {
			if h, ok := holder(f.Name()); ok {
				s.leases++
				e.leases[h] = s.leases
			}
		}
	}
	return nil
}
