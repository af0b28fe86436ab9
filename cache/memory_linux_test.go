package cache_test

import (
	"bytes"
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// largeImage pushes an image of n chunks of 64 MiB, cheaply: all have the same blocks, of
// which a sixteenth is not zero, but for the last one. NVRAM has 33 MB, as that of macOS.
func (w *world) largeImage(t *testing.T, n int) fleet.Hold {
	t.Helper()
	const block, full, empty = 64 << 10, 64, 959
	noise := rand.NewChaCha8([32]byte{1})
	plain := make([]byte, block)
	_, _ = noise.Read(plain) // never fails
	content, zeros := sha256.New(), make([]byte, block)
	for range full {
		content.Write(plain)
	}
	for range empty {
		content.Write(zeros)
	}
	stored := append(binary.LittleEndian.AppendUint32([]byte("bv4-"), block), plain...)
	packed := make([]byte, 1<<10)
	size, err := lz4.CompressBlock(zeros, packed, nil)
	if err != nil {
		t.Fatal(err)
	}
	hollow := append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32([]byte("bv41"), block), uint32(size)), packed[:size]...)
	blob := slices.Concat(bytes.Repeat(stored, full), bytes.Repeat(hollow, empty), stored, []byte("bv4$"))
	last := blob[len(blob)-4-block : len(blob)-4]

	config := []byte(`{"version":1,"os":"linux"}`)
	nvram := make([]byte, 33<<20)
	_, _ = noise.Read(nvram)
	put := func(mediaType string, data []byte, annotations map[string]string) image.Descriptor {
		d, err := w.reg.PutBlob(t.Context(), data)
		if err != nil {
			t.Fatal(err)
		}
		return image.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data)), Annotations: annotations}
	}
	const kind = "application/vnd.cirruslabs.tart."
	layers := []image.Descriptor{put(kind+"config.v1", config, nil)}
	for range n {
		_, _ = noise.Read(last)
		whole := cloneHash(t, content)
		whole.Write(last)
		layers = append(layers, put(kind+"disk.v2", blob, map[string]string{
			"org.cirruslabs.tart.uncompressed-size":           strconv.Itoa(block * (full + empty + 1)),
			"org.cirruslabs.tart.uncompressed-content-digest": fmt.Sprintf("sha256:%x", whole.Sum(nil)),
		}))
	}
	layers = append(layers, put(kind+"nvram.v1", nvram, nil))
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "layers": layers})
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.reg.PutManifest(t.Context(), "test/large", "v1", image.MediaTypeManifest, raw)
	if err != nil {
		t.Fatal(err)
	}
	return fleet.Hold{Digest: d, Ref: w.host + "/test/large:v1"}
}

func cloneHash(t *testing.T, h hash.Hash) hash.Hash {
	t.Helper()
	state, err := h.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	c := sha256.New()
	if err := c.(encoding.BinaryUnmarshaler).UnmarshalBinary(state); err != nil {
		t.Fatal(err)
	}
	return c
}

// A pull of 2.5 GiB of disk by 16 streams takes at most 128 MB of memory: the most that the
// process that pulls ever had, by the kernel's own account.
func TestMemory(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		hold := fleet.Hold{Ref: os.Getenv(childRef), Digest: fleet.Digest(os.Getenv(childDigest))}
		if err := openStore(t, dir, 16).Pull(t.Context(), hold); err != nil {
			t.Fatal(err)
		}
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(status)) {
			if kb, ok := strings.CutPrefix(line, "VmHWM:"); ok {
				fmt.Println("peak:", kb)
			}
		}
		return
	}
	w := newWorld(t)
	hold := w.largeImage(t, 40)
	out, err := child(t, "TestMemory", childDir+"="+t.TempDir(), childRef+"="+hold.Ref, childDigest+"="+string(hold.Digest)).Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, peak, _ := strings.Cut(string(out), "peak:")
	kb, err := strconv.Atoi(strings.Fields(peak + " none")[0])
	if err != nil || kb > 128<<20/1024 {
		t.Errorf("the peak is %d KiB (%v); want at most 128 MB\n%s", kb, err, out)
	}
	t.Logf("the peak is %d KiB", kb)
}
