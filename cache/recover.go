package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// errDemoted says that a published image became a partial one, which is looked at later.
var errDemoted = errors.New("demoted")

// errNoImage marks what is in an image's place, was read, and is not that image.
var errNoImage = errors.New("no image")

// unusable reports whether err says that there is no such image, or not in full. Any
// other error (too many open files, a failing disk, a lack of rights) says nothing of the
// image, which may be whole.
func unusable(err error) bool {
	for _, target := range []error{os.ErrNotExist, syscall.ENOTDIR, syscall.EISDIR, errNoImage} {
		if errors.Is(err, target) {
			return true
		}
	}
	return isFormat(err)
}

// recover lists what a former process left: ready images, partial ones to be resumed,
// leases. What is neither is removed, and said in the log; what cannot be read fails it,
// for a whole image is not to be lost to a shortage of the moment.
func (s *Store) recover() error {
	if err := s.sweepTop(); err != nil {
		return err
	}
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

// adopt takes over each image of one directory, or removes what is none.
func (s *Store) adopt(kind string, one func(fleet.Digest) error) error {
	names, err := os.ReadDir(filepath.Join(string(s.dir), kind))
	if err != nil {
		return err
	}
	for _, name := range names {
		d := fleet.Digest("sha256:" + name.Name())
		err := errNoImage
		if fleet.CheckDigest(d) == nil {
			err = one(d)
		}
		switch {
		case errors.Is(err, errDemoted):
			continue
		case err == nil:
			if err := s.sweepFiles(s.dir.of(kind, d), isImageFile); err != nil {
				return err
			}
			continue
		case !unusable(err):
			return fmt.Errorf("reading image %s: %w; mend that, or remove %s to pull it again", d.Short(), err, filepath.Join(string(s.dir), kind, name.Name()))
		}
		s.log.Warn("removing what is no image", "dir", kind, "name", name.Name(), "error", err)
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
		s.log.Info("emptying the trash", "name", name.Name())
		if err := os.RemoveAll(filepath.Join(trash, name.Name())); err != nil {
			return err
		}
	}
	return nil
}

// sweepTop removes the files that a crash left beside the store's directories. What else is
// there may be somebody's who gave us a directory of his own, and is only named.
func (s *Store) sweepTop() error {
	names, err := os.ReadDir(string(s.dir))
	if err != nil {
		return err
	}
	for _, name := range names {
		switch n := name.Name(); {
		case n == lockFile || slices.Contains(kinds, n):
		case strings.HasPrefix(n, ".share-"): // CanShare's
			s.log.Warn("removing what a crash left", "name", n)
			if err := os.RemoveAll(filepath.Join(string(s.dir), n)); err != nil {
				return err
			}
		default:
			s.log.Warn("leaving alone what is no part of the store", "name", n)
		}
	}
	return nil
}

// sweepFiles removes from a directory of the store what is none of its files.
func (s *Store) sweepFiles(dir string, known func(name string) bool) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if known(name.Name()) {
			continue
		}
		s.log.Warn("removing what is no part of the store", "dir", dir, "name", name.Name())
		if err := os.RemoveAll(filepath.Join(dir, name.Name())); err != nil {
			return err
		}
	}
	return nil
}

// isImageFile reports whether a name is one of an image's files, ready or partial.
func isImageFile(name string) bool {
	switch name {
	case diskFile, nvramFile, configFile, manifestFile, metaFile, journalFile:
		return true
	}
	return false
}

// readManifest reads the manifest of an image on disk and holds it to its digest.
func (s *Store) readManifest(dir string, d fleet.Digest) (*image.Manifest, image.Codec, error) {
	return readManifest(dir, d, s.codecs)
}

// inspect reads the manifest of a published image and checks that its files are there.
// Errors that are unusable say that this is no image.
func (s *Store) inspect(d fleet.Digest) (*image.Manifest, error) {
	dir := s.dir.image(d)
	m, _, err := s.readManifest(dir, d)
	if err != nil {
		return nil, err
	}
	return m, checkFiles(dir, m)
}

// checkFiles holds the files of an image to the sizes in its manifest.
func checkFiles(dir string, m *image.Manifest) error {
	for _, s := range smallFiles(m) {
		if err := checkSize(dir, s.file, s.blob.Size); err != nil {
			return err
		}
	}
	return checkSize(dir, diskFile, m.DiskSize)
}

func checkSize(dir, file string, want int64) error {
	info, err := os.Stat(filepath.Join(dir, file))
	if err != nil {
		return err
	}
	if info.Size() != want || !info.Mode().IsRegular() {
		return fmt.Errorf("%w: %s has %d bytes, the manifest says %d", errNoImage, file, info.Size(), want)
	}
	return nil
}

// smallFlaws are the NVRAM and the VM config, if they are not there or of another size.
func smallFlaws(dir string, m *image.Manifest) (flaws []Flaw) {
	for _, s := range smallFiles(m) {
		if err := checkSize(dir, s.file, s.blob.Size); err != nil && unusable(err) {
			flaws = append(flaws, Flaw{Kind: s.kind, Layer: s.layer, Size: s.blob.Size, Want: s.blob.Digest, Err: err})
		}
	}
	return flaws
}

// spare takes what is bad out of a published image, and makes a partial one of the rest.
func (s *Store) spare(m *image.Manifest, flaws []Flaw) error {
	for _, small := range smallFiles(m) {
		if slices.ContainsFunc(flaws, func(f Flaw) bool { return f.Kind == small.kind }) {
			if err := os.RemoveAll(filepath.Join(s.dir.image(m.Digest), small.file)); err != nil {
				return err
			}
		}
	}
	if err := s.demote(m, flaws); err != nil {
		return err
	}
	return errDemoted
}

// adoptImage lists a published image, if it is one. One whose small files only are not what
// they should be becomes a partial one, of which a pull fetches just these.
func (s *Store) adoptImage(d fleet.Digest) error {
	dir := s.dir.image(d)
	m, _, err := s.readManifest(dir, d)
	if err == nil {
		err = checkFiles(dir, m)
	}
	if m != nil && err != nil && unusable(err) {
		if flaws := smallFlaws(dir, m); len(flaws) > 0 && checkSize(dir, diskFile, m.DiskSize) == nil {
			s.log.Warn("an image is to be fetched again in part", "image", d, "error", err)
			return s.spare(m, flaws)
		}
	}
	if err != nil {
		return err
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
	if info, err := os.Stat(dir); err == nil {
		e.ReadyAt = info.ModTime() // nothing is made or removed in it once it is published
	}
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
	done, marks, _, err := readJournal(filepath.Join(dir, journalFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) { // without one, nothing is done
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.images[d]; e != nil && e.State == fleet.ImageReady {
		return fmt.Errorf("%w to be resumed: it is ready, too", errNoImage)
	}
	e := s.entry(d)
	e.Ref, _ = readMeta(dir)
	e.Total = m.Bytes()
	e.done.Store((&journal{done: done, marks: marks}).bytes(m, true))
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
			s.log.Warn("removing the leases of an image that is not here", "name", name.Name())
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		err := s.sweepFiles(dir, func(file string) bool {
			h, ok := holder(file)
			if ok {
				s.leases++
				e.leases[h] = s.leases
			}
			return ok
		})
		if err != nil {
			return err
		}
	}
	return nil
}
