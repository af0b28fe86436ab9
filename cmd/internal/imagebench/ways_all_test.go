//go:build linux

package imagebench

import (
	"bytes"
	"path/filepath"
	"testing"
)

// Every way that is measured ends with the disk that was made, and moves what it should:
// else the figures would be those of something else.
func TestWays(t *testing.T) {
	dir, m := images(t, 48, 1)
	host := serve(t, dir, 0)
	for _, way := range []string{"tarball", "oci"} {
		to := t.TempDir()
		role(t, "crane", way, host.ref(base), to)
		if err := checkDisk(filepath.Join(to, "disk.img"), m); err != nil {
			t.Errorf("%s: %v", way, err)
		}
		if c := host.counts(t); c.Bytes < m.Bytes() {
			t.Errorf("%s: %d bytes were sent of %d", way, c.Bytes, m.Bytes())
		}
	}
	role(t, "decode", dir, base)
	store := t.TempDir()
	for _, tag := range []string{base, next} {
		m, err := readImage(dir, tag)
		if err != nil {
			t.Fatal(err)
		}
		c := role(t, "pull", host.ref(tag), string(m.Digest), store)
		if err := checkDisk(filepath.Join(store, "images", string(m.Digest[len("sha256:"):]), "disk.img"), m); err != nil {
			t.Errorf("%s: %v", tag, err)
		}
		asked := host.counts(t)
		if tag == base && asked.Bytes < m.Bytes() || tag == next && asked.Bytes > m.Bytes()*4/10 {
			t.Errorf("%s: %d bytes were sent of %d", tag, asked.Bytes, m.Bytes())
		}
		if c.rss == 0 || c.callsWritten == 0 {
			t.Errorf("nothing was counted of a process: %+v", c)
		}
	}
}

// The disk is what is said of it: 60 % zero, the same wherever it is read from, and the
// next one's chunks are the same but for 30 %.
func TestDisk(t *testing.T) {
	d := disk{size: 80 << 20, chunk: 1 << 20}
	changed := d
	changed.next = true
	zero, differ, full := 0, 0, 0
	one, two := make([]byte, d.chunk), make([]byte, d.chunk)
	for at := int64(0); at < d.size; at += d.chunk {
		_, _ = d.ReadAt(one, at) // never fails
		_, _ = changed.ReadAt(two, at)
		for page := one; len(page) > 0; page = page[4096:] {
			if bytes.Equal(page[:4096], zeros[:]) {
				zero++
			}
		}
		if d.Zero(at, d.chunk) != bytes.Equal(one, make([]byte, d.chunk)) {
			t.Errorf("chunk at %d: zero %v, which is wrong", at, d.Zero(at, d.chunk))
		}
		if !d.Zero(at, d.chunk) {
			full++
		}
		if !bytes.Equal(one, two) {
			differ++
		}
		odd := make([]byte, 1000)
		if _, _ = d.ReadAt(odd, at+65000); !bytes.Equal(odd, one[65000:66000]) {
			t.Errorf("chunk at %d: read from within, it is another", at)
		}
	}
	if part := float64(zero) * 4096 / float64(d.size); part < 0.57 || part > 0.63 {
		t.Errorf("%.2f of the disk is zero", part)
	}
	if full != 50 || differ != 15 {
		t.Errorf("%d chunks are not zero, %d of them differ in the next tag; want 50 and 15", full, differ)
	}
}
