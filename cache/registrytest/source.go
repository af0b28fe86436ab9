package registrytest

import (
	"bytes"
	"math/rand/v2"

	"github.com/paddock-ci/paddock/image/tart"
)

// Source makes an image from a pattern with a character for each disk chunk: '0' is a
// chunk of zeros, any other character stands for content of its own, the same wherever
// it occurs. So "ab0a" is four chunks, of which two have to be fetched. Content is
// mixed as on real disks: a half that does not compress, a quarter of text, a quarter
// of zeros. Equal arguments give equal images, byte for byte.
func Source(pattern string, chunkSize int) tart.Source {
	var disk bytes.Buffer
	for _, c := range pattern {
		disk.Write(chunk(c, chunkSize))
	}
	return tart.Source{
		Config:    &tart.Config{Version: 1, OS: "linux", Arch: "arm64", CPUCount: 2, MemorySize: 1 << 30},
		NVRAM:     append([]byte("nvram of "), pattern...),
		Disk:      bytes.NewReader(disk.Bytes()),
		ChunkSize: int64(chunkSize),
	}
}

// chunk is the content of one character.
func chunk(c rune, size int) []byte {
	b := make([]byte, size)
	if c == '0' {
		return b
	}
	noise := rand.NewChaCha8([32]byte{byte(c), byte(c >> 8), byte(c >> 16)})
	_, _ = noise.Read(b[:size/2]) // never fails
	line := []byte("chunk " + string(c) + " of a disk\n")
	for i := size / 2; i < size*3/4; i++ {
		b[i] = line[(i-size/2)%len(line)]
	}
	return b
}
