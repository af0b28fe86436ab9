//go:build linux

package imagebench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// counts is what a registry was asked for since the last question.
type counts struct {
	Requests int64 `json:"requests"` // of blobs
	Bytes    int64 `json:"bytes"`    // of blobs, sent
}

// files is a registry that only answers, from a directory of makeImages. It is plain: no
// credentials, no uploads, byte ranges as net/http does them, sendfile where nothing limits.
type files struct {
	dir             string
	limit           *rate.Limiter // bytes; nil: none
	requests, bytes atomic.Int64
}

// serveRegistry is the role of a registry: DIR, bytes per second (0: no limit). Its first
// line says where it listens; it ends with its input.
func serveRegistry(ctx context.Context, args []string) error {
	if err := want(args, "DIR", "RATE"); err != nil {
		return err
	}
	f := &files{dir: args[0]}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if n > 0 {
		f.limit = rate.NewLimiter(rate.Limit(n), n/10)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	server := &http.Server{Handler: f, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // the parent is gone
		_ = server.Close()
	}()
	if err := server.Serve(l); err != http.ErrServerClosed {
		return err
	}
	return nil
}

func (f *files) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, name := path.Base(path.Dir(r.URL.Path)), path.Base(r.URL.Path)
	switch {
	case r.URL.Path == "/v2/":
	case r.URL.Path == "/counts":
		_ = json.NewEncoder(w).Encode(counts{f.requests.Swap(0), f.bytes.Swap(0)})
	case kind == "manifests":
		f.manifest(w, r, name)
	case kind == "blobs":
		if r.Method == http.MethodGet {
			f.requests.Add(1)
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", name)
		http.ServeFile(&counting{ResponseWriter: w, files: f, r: r}, r, filepath.Join(f.dir, blobsDir, strings.TrimPrefix(name, "sha256:")))
	default:
		http.NotFound(w, r)
	}
}

// manifest answers by tag and by digest.
func (f *files) manifest(w http.ResponseWriter, r *http.Request, name string) {
	for _, tag := range []string{base, next, recoded} {
		raw, err := os.ReadFile(filepath.Join(f.dir, tag))
		if d := image.DigestOf(raw); err == nil && (tag == name || d == fleet.Digest(name)) {
			w.Header().Set("Content-Type", image.MediaTypeManifest)
			w.Header().Set("Docker-Content-Digest", string(d))
			w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
			if r.Method == http.MethodGet {
				_, _ = w.Write(raw) // the client may be gone
			}
			return
		}
	}
	http.NotFound(w, r)
}

// counting counts what is sent of blobs, and slows it down.
type counting struct {
	http.ResponseWriter
	files *files
	r     *http.Request
}

func (c *counting) Write(b []byte) (int, error) {
	if c.files.limit != nil {
		if err := c.files.limit.WaitN(c.r.Context(), len(b)); err != nil {
			return 0, err
		}
	}
	n, err := c.ResponseWriter.Write(b)
	c.files.bytes.Add(int64(n))
	return n, err
}

// ReadFrom leaves the copying to the kernel.
func (c *counting) ReadFrom(r io.Reader) (int64, error) {
	if c.files.limit != nil {
		return io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	}
	n, err := io.Copy(c.ResponseWriter, r)
	c.files.bytes.Add(n)
	return n, err
}
