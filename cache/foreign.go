package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Foreign is an image in the cache of another tool.
type Foreign struct {
	Dir    string
	Ref    string // host/repository, with the tag that points to it if there is one, and the digest
	Digest fleet.Digest
}

// foreignDepth is how deep below a cache's root an image may be: host, four parts of a
// name and the digest. What is deeper is not looked at.
const foreignDepth = 8

// Foreigners lists the images of a cache of directories host/name/sha256:…, where a tag is
// a symbolic link to the digest beside it. No link is followed.
func Foreigners(root string) ([]Foreign, error) {
	var found []Foreign
	err := foreigners(root, nil, &found)
	if err != nil {
		return nil, fmt.Errorf("looking for images in %s: %w", root, err)
	}
	return found, nil
}

func foreigners(root string, below []string, found *[]Foreign) error {
	dir := filepath.Join(append([]string{root}, below...)...)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	repository := strings.ReplaceAll(strings.Join(below, "/"), "%3A", ":") // of a port
	tags := make(map[string]string)                                        // by digest, the first by name
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil && tags[filepath.Base(target)] == "" {
			tags[filepath.Base(target)] = e.Name()
		}
	}
	for _, e := range entries {
		d := fleet.Digest(e.Name())
		switch {
		case !e.IsDir():
		case fleet.CheckDigest(d) == nil:
			*found = append(*found, foreign(filepath.Join(dir, e.Name()), repository, tags[e.Name()], d))
		case len(below) < foreignDepth:
			err := foreigners(root, append(below[:len(below):len(below)], e.Name()), found)
			if err != nil && !errors.Is(err, fs.ErrNotExist) { // it went away meanwhile
				return err
			}
		}
	}
	return nil
}

// foreign names an image; a tag that is none is left out.
func foreign(dir, repository, tag string, d fleet.Digest) Foreign {
	ref := repository + "@" + string(d)
	if tag != "" {
		if _, err := image.ParseReference(repository + ":" + tag + "@" + string(d)); err == nil {
			ref = repository + ":" + tag + "@" + string(d)
		}
	}
	return Foreign{Dir: dir, Ref: ref, Digest: d}
}
