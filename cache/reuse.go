package cache

import (
	"context"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// reuseBase finds the ready image whose disk is the best to begin with: dir has its
// disk.img, same are the chunks that are at the same offsets in both, zero ones too. What
// is journalled of them is told to has and counts as progress. release, if ok, is called
// when the disk is cloned, or not.
func (f *fetch) reuseBase(context.Context) (base fleet.Digest, dir string, same []image.Chunk, release func(), ok bool) {
	return "", "", nil, nil, false
}

// local copies a chunk from a ready image, and verifies it; what it leaves if it is not
// done reads as zeros. It counts the progress; the caller journals and tells has.
func (f *fetch) local(context.Context, image.Chunk, []int64) (done bool, err error) {
	return false, nil
}
