package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/ocidir"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

func imagePushCommand(g *globals) *cobra.Command {
	p := &push{g: g, chunk: tart.DefaultChunkSize}
	cmd := &cobra.Command{
		Use: "push DIR REF", Short: "Make an image of a directory, at a registry", Args: cobra.ExactArgs(2),
		Long: `Make an image that Tart can read, too, of a directory with disk.img, nvram.bin and config.json: what
"paddock image create" makes, or a stopped machine's. Nothing may write to it meanwhile. It is
encoded on all cores and sent as it is made; what the registry has already is not sent again.

With --parent, chunks that are in that image are taken over as they stand, so that both share
them at the registry and on every Mac: within one registry they are mounted, not sent. Name the
image that this one was made from. With --layout the image goes into an OCI image layout in that
directory, such as a shared mount, instead of to the registry of REF.

Equal directories make equal images, with the same digest, which is printed.

--json prints one object per line: state (pushing), done and total (bytes of the disk: those that
are read, and zeros), rate (bytes per second) and eta (seconds). The last one has state pushed,
digest, seconds, and new and parent: bytes on the wire of its own and of its parent.
` + aboutFailure,
		Example: `paddock image push ~/images/macos ghcr.io/acme/macos:15
paddock image push ~/vms/baked ghcr.io/acme/macos:15-xcode --parent ghcr.io/acme/macos:15
paddock image push ~/images/macos registry.local/macos:15 --layout /Volumes/images`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			p.cmd, p.dir = cmd, args[0]
			if p.ref, err = image.ParseReference(args[1]); err != nil {
				return usage("like ghcr.io/acme/macos:15", "%v", err)
			}
			if p.ref.Tag() == "" {
				return usage("give it a tag, like "+p.ref.Repository().Name()+":15", "%s names no tag: an image's digest is known when it is made", args[1])
			}
			if p.parent != "" {
				if _, err := image.ParseReference(string(p.parent)); err != nil {
					return usage("like ghcr.io/acme/macos:14", "--parent: %v", err)
				}
			}
			if p.chunk < 1<<16 || p.chunk > image.MaxChunkBytes {
				return usage("64KiB to 16GiB; 512MiB is usual", "--chunk-size %s", cmd.Flag("chunk-size").Value)
			}
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			return p.run(ctx)
		},
	}
	cmd.Flags().Var(&p.parent, "parent", "image that this one was made from, whose chunks are taken over")
	cmd.Flags().Var(&p.chunk, "chunk-size", "bytes of disk in a layer")
	cmd.Flag("chunk-size").DefValue = "512MiB"
	cmd.Flags().Var(&p.layout, "layout", "directory of an OCI image layout to write to, instead of a registry")
	jsonFlag(cmd, g)
	return cmd
}

// push is one push.
type push struct {
	cmd    *cobra.Command
	g      *globals
	dir    string
	ref    image.Reference
	parent given
	layout given
	chunk  config.Size
}

// target is where an image goes: its blobs one by one, from several goroutines, then
// the manifest.
type target interface {
	// parent reads the manifest of the image that blobs may be taken from.
	parent(ctx context.Context, ref string) (*image.Manifest, error)
	// take brings a blob of the parent, and reports false if it must be made anew.
	take(ctx context.Context, b image.Blob, parent string) (bool, error)
	put(ctx context.Context, l tart.Layer) error
	finish(ctx context.Context, raw []byte) (fleet.Digest, error)
}

func (p *push) run(ctx context.Context) (err error) {
	start := time.Now()
	src, disk, err := openImage(p.dir)
	if err != nil {
		return err
	}
	defer func() { _ = disk.file.Close() }() // it was only read
	bar := p.g.steps(p.cmd, p.ref.String())
	defer bar.end()
	disk.begin(int64(p.chunk), bar.tell)
	sent := &sent{}
	to, err := p.target(ctx)
	if err != nil {
		return p.failed(ctx, sent, err)
	}
	src.ChunkSize, src.Workers = int64(p.chunk), runtime.GOMAXPROCS(0)
	if p.parent != "" {
		if src.Parent, err = to.parent(ctx, string(p.parent)); err != nil {
			return p.failed(ctx, sent, fmt.Errorf("reading the parent %s: %w", p.parent, err))
		}
		src.Reuse = func(ctx context.Context, c image.Chunk) (bool, error) {
			taken, err := to.take(ctx, image.Blob{Digest: c.Blob, Size: c.BlobSize, MediaType: c.MediaType}, string(p.parent))
			if taken {
				sent.add(0, c.BlobSize)
			}
			return taken, err
		}
	}
	bar.begin("pushing")
	raw, err := tart.Build(ctx, src, func(ctx context.Context, l tart.Layer) error {
		if err := to.put(ctx, l); err != nil {
			return err
		}
		sent.add(l.Size, 0)
		return nil
	})
	var d fleet.Digest
	if err == nil {
		d, err = to.finish(ctx, raw)
	}
	if err != nil {
		return p.failed(ctx, sent, err)
	}
	bar.end()
	return p.tell(d, sent, time.Since(start))
}

func (p *push) failed(ctx context.Context, sent *sent, err error) error {
	if wasInterrupted(ctx, err) {
		return &interruptedError{"there is no such image; chunks that were sent are there", "the same command does not send them again"}
	}
	switch class := classOf(err); {
	case class == cache.ClassAuth:
		return fmt.Errorf("%w (hint: docker login with an account that may write there)", err)
	case class == cache.ClassNetwork && sent.any():
		return fmt.Errorf("%w (hint: the same command does not send again what is there)", err)
	case class == cache.ClassNetwork:
		return fmt.Errorf("%w (hint: nothing was sent; is %s the right host, and can this one reach it?)", err, p.ref.Host())
	default:
		return err
	}
}

func (p *push) tell(d fleet.Digest, sent *sent, spent time.Duration) error {
	if p.g.output == "json" {
		return writeLine(p.cmd, map[string]any{
			"state": "pushed", "ref": p.ref.String(), "digest": d, "seconds": spent.Round(time.Millisecond).Seconds(), "new": sent.fresh, "parent": sent.taken,
		})
	}
	text := size(sent.fresh) + " in chunks of its own"
	if p.parent != "" {
		text += fmt.Sprintf(", %s shared with its parent", or(size(sent.taken), "nothing"))
	}
	_, err := fmt.Fprintf(p.cmd.OutOrStdout(), "%s is pushed after %s: %s\n%s\n", p.ref, short(spent), text, d)
	return err
}

// sent counts bytes on the wire.
type sent struct {
	mu           sync.Mutex
	fresh, taken int64
}

func (s *sent) add(fresh, taken int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh += fresh
	s.taken += taken
}

// any reports whether a layer is there.
func (s *sent) any() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fresh > 0
}

func (p *push) target(ctx context.Context) (target, error) {
	client, err := registry.New(registry.Config{Log: p.g.quietLog()})
	if err != nil {
		return nil, err
	}
	if p.layout == "" {
		upload, err := client.Upload(ctx, p.ref.String(), nil)
		return &toRegistry{client, upload}, err
	}
	dir, err := filepath.Abs(string(p.layout))
	if err != nil {
		return nil, err
	}
	layout, err := ocidir.Open(dir)
	return &toLayout{layout, p.ref}, err
}

type toRegistry struct {
	client *registry.Client
	upload *registry.Upload
}

func (t *toRegistry) parent(ctx context.Context, ref string) (*image.Manifest, error) {
	found, err := t.client.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	return parseManifest(t.client.Manifest(ctx, ref, found.Digest))
}

func (t *toRegistry) take(ctx context.Context, b image.Blob, parent string) (bool, error) {
	return t.upload.Take(ctx, b, parent)
}

func (t *toRegistry) put(ctx context.Context, l tart.Layer) error {
	return t.upload.Put(ctx, registry.Blob(l))
}

func (t *toRegistry) finish(ctx context.Context, raw []byte) (fleet.Digest, error) {
	return t.upload.Finish(ctx, raw)
}

type toLayout struct {
	layout *ocidir.Layout
	ref    image.Reference
}

func (t *toLayout) parent(ctx context.Context, ref string) (*image.Manifest, error) {
	d, err := t.layout.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	return parseManifest(t.layout.Manifest(ctx, ref, d))
}

// take finds the parent's blob where it lies: a layout has one place for all images.
func (t *toLayout) take(ctx context.Context, b image.Blob, parent string) (bool, error) {
	body, err := t.layout.Open(ctx, cache.Want{Ref: parent, Chunk: image.Chunk{Content: b.Digest, Blob: b.Digest, BlobSize: b.Size, Size: b.Size}}, 0)
	if err != nil {
		if cache.ClassOf(err) == cache.ClassNotFound {
			err = nil
		}
		return false, err
	}
	return true, body.Close()
}

func (t *toLayout) put(ctx context.Context, l tart.Layer) error {
	return t.layout.Put(ctx, ocidir.Blob(l))
}

func (t *toLayout) finish(ctx context.Context, raw []byte) (fleet.Digest, error) {
	return t.layout.Add(ctx, t.ref.String(), raw, nil)
}

func parseManifest(raw []byte, err error) (*image.Manifest, error) {
	if err != nil {
		return nil, err
	}
	m, _, err := image.Parse(raw, cache.Formats())
	return m, err
}

// openImage opens a directory as what an image is made of.
func openImage(dir string) (src tart.Source, disk *diskReader, err error) {
	const hint = "an image is a directory with disk.img, nvram.bin and config.json, as paddock image create makes it"
	bad := func(err error) (tart.Source, *diskReader, error) {
		return tart.Source{}, nil, fmt.Errorf("%s is no image: %w (hint: %s)", dir, err, hint)
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return bad(errors.New("there is no such directory"))
	}
	if src.Config, err = vm.ReadConfig(dir); errors.Is(err, fs.ErrNotExist) {
		return bad(errors.New("it has no " + vm.ConfigFile))
	} else if err != nil {
		return bad(err)
	}
	if src.NVRAM, err = readNVRAM(filepath.Join(dir, vm.NVRAMFile)); err != nil {
		return bad(err)
	}
	file, err := os.Open(filepath.Join(dir, vm.DiskFile))
	if errors.Is(err, fs.ErrNotExist) {
		return bad(errors.New("it has no " + vm.DiskFile))
	}
	if err != nil {
		return bad(err)
	}
	info, err := file.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() == 0) {
		err = errors.New(vm.DiskFile + " is empty, or no file")
	}
	if err != nil {
		_ = file.Close()
		return bad(err)
	}
	disk = &diskReader{file: file, size: info.Size()}
	src.Disk = disk
	return src, disk, nil
}

func readNVRAM(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("it has no " + vm.NVRAMFile)
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, image.MaxNVRAMBytes+1))
	if err == nil && (len(data) == 0 || len(data) > image.MaxNVRAMBytes) {
		err = fmt.Errorf("%s has %d bytes, want 1 to %d", vm.NVRAMFile, len(data), image.MaxNVRAMBytes)
	}
	return data, err
}

// diskReader is a disk that knows its holes, and tells how much of it has been read.
type diskReader struct {
	file *os.File
	size int64

	mu    sync.Mutex
	chunk int64
	seen  []int64 // of each chunk, how far it has been read, in bytes
	done  int64   // the sum of those
	tell  func(done, total int64)
}

func (d *diskReader) begin(chunk int64, tell func(done, total int64)) {
	d.chunk, d.tell = chunk, tell
	d.seen = make([]int64, (d.size-1)/chunk+1)
}

// Size implements tart.Disk.
func (d *diskReader) Size() int64 { return d.size }

// ReadAt implements tart.Disk.
func (d *diskReader) ReadAt(b []byte, offset int64) (int, error) {
	n, err := d.file.ReadAt(b, offset)
	d.reached(offset + int64(n))
	return n, err
}

// Zero implements tart.Sparse: a hole needs no reading.
func (d *diskReader) Zero(offset, size int64) bool {
	// Other goroutines move the file's position, too, but each learns of its own move.
	data, err := d.file.Seek(offset, unix.SEEK_DATA)
	hole := errors.Is(err, unix.ENXIO) || err == nil && data >= offset+size
	if hole {
		d.reached(offset + size)
	}
	return hole
}

// reached notes that a chunk has been read up to a byte of the disk. Chunks are read from
// their beginning on, and some more than once.
func (d *diskReader) reached(to int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if to <= 0 || to > d.size {
		return
	}
	n := (to - 1) / d.chunk
	if more := to - n*d.chunk - d.seen[n]; more > 0 {
		d.seen[n] += more
		d.done += more
		d.tell(d.done, d.size)
	}
}
