package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Bounds of a runner's archive.
const (
	// maxArchive is four times the largest that GitHub offers (about 230 MB), in bytes.
	maxArchive = 1 << 30
	// archiveStall is how long a download may bring nothing, and archiveTime how long it
	// may take in all: 130 KB/s for today's size.
	archiveStall = 30 * time.Second
	archiveTime  = 30 * time.Minute
	// archiveAge is how long an archive is kept after its last use: GitHub publishes a
	// runner every few weeks, and its older versions are no longer asked for.
	archiveAge = 14 * 24 * time.Hour
	// archiveRedirects is one for GitHub's own and some for a mirror's.
	archiveRedirects = 5
)

// errStalled ends a download that no longer brings bytes.
var errStalled = errors.New("nothing came for " + archiveStall.String())

var sha256Pattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// archives keeps GitHub's runner applications on disk, each downloaded once per host and
// checked against the SHA-256 that came with the order. VMs that want the same one share
// one download; no lock is held while bytes move.
type archives struct {
	dir    string
	client *http.Client
	most   int64 // bytes of one
	now    func() time.Time
	log    *slog.Logger

	mu     sync.Mutex
	active map[string]chan struct{} // by SHA-256; closed when that download has ended
}

func newArchives(dir string, now func() time.Time, log *slog.Logger) *archives {
	return &archives{
		dir: dir, most: maxArchive, now: now, log: log, active: map[string]chan struct{}{},
		client: &http.Client{CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > archiveRedirects {
				return fmt.Errorf("more than %d redirects", archiveRedirects)
			}
			return checkArchiveURL(r.URL)
		}},
	}
}

// open returns the archive, which is downloaded first if it is not here. The caller
// closes the file.
func (s *archives) open(ctx context.Context, want fleet.Archive) (*os.File, error) {
	f, err := s.get(ctx, want)
	if err != nil {
		return nil, fmt.Errorf("getting GitHub's runner %s: %w", want.Name, err)
	}
	return f, nil
}

func (s *archives) get(ctx context.Context, want fleet.Archive) (*os.File, error) {
	if !sha256Pattern.MatchString(want.SHA256) { // it becomes a file's name
		return nil, fmt.Errorf("its SHA-256 is %q, which is none", want.SHA256)
	}
	for {
		f, err := os.Open(s.path(want.SHA256))
		if err == nil {
			s.touch(want.SHA256)
			return f, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		s.mu.Lock()
		other, busy := s.active[want.SHA256]
		if !busy {
			s.active[want.SHA256] = make(chan struct{})
		}
		s.mu.Unlock()
		if !busy {
			if err := s.download(ctx, want); err != nil {
				return nil, err
			}
			continue
		}
		select { // if it fails, this caller tries in its turn: the other may have been cancelled
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *archives) path(sum string) string { return filepath.Join(s.dir, sum+".tar.gz") }

// touch notes a use, for evict.
func (s *archives) touch(sum string) {
	now := s.now()
	if err := os.Chtimes(s.path(sum), now, now); err != nil {
		s.log.Debug("the use of a runner's archive was not noted", "error", err)
	}
}

// download brings one archive; the caller has made its entry in active.
func (s *archives) download(ctx context.Context, want fleet.Archive) error {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		close(s.active[want.SHA256])
		delete(s.active, want.SHA256)
	}()
	if _, err := os.Lstat(s.path(want.SHA256)); err == nil {
		return nil // a download that ended since we looked
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	part := s.path(want.SHA256) + ".part"
	err := s.fetch(ctx, want, part)
	if err == nil {
		err = os.Rename(part, s.path(want.SHA256))
	}
	if err != nil {
		return errors.Join(err, removeIfThere(part))
	}
	s.log.Info("GitHub's runner was downloaded", "archive", want.Name)
	s.evict(want.SHA256)
	return syncDir(s.dir)
}

// fetch writes the archive to part, synced, and checks it on the way.
func (s *archives) fetch(ctx context.Context, want fleet.Archive, part string) (err error) {
	from, err := url.Parse(want.URL)
	if err == nil {
		err = checkArchiveURL(from)
	}
	if err != nil {
		return err
	}
	ctx, over := context.WithTimeout(ctx, archiveTime)
	defer over()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stall := time.AfterFunc(archiveStall, func() { cancel(errStalled) })
	defer stall.Stop()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, want.URL, nil)
	if err != nil {
		return err
	}
	reply, err := s.client.Do(request)
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // the address in it may be a redirect's, which is signed
		}
		return because(ctx, fmt.Errorf("asking %s: %w", from.Host, err))
	}
	defer func() { _ = reply.Body.Close() }()
	switch {
	case reply.StatusCode != http.StatusOK:
		return fmt.Errorf("%s answered %s", from.Host, reply.Status)
	case reply.ContentLength > s.most:
		return fmt.Errorf("it has %d bytes, and at most %d are taken", reply.ContentLength, s.most)
	}
	out, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	sum := sha256.New()
	body := movingReader{r: reply.Body, moved: func() { stall.Reset(archiveStall) }}
	n, err := io.Copy(io.MultiWriter(out, sum), io.LimitReader(body, s.most+1))
	switch {
	case err != nil:
		return because(ctx, fmt.Errorf("after %d bytes: %w", n, err))
	case n > s.most:
		return fmt.Errorf("it has more than %d bytes", s.most)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want.SHA256 {
		return fmt.Errorf("its SHA-256 is %s, and GitHub says %s: a proxy may have changed it", got, want.SHA256)
	}
	return out.Sync()
}

// movingReader says when bytes have moved.
type movingReader struct {
	r     io.Reader
	moved func()
}

func (m movingReader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if n > 0 {
		m.moved()
	}
	return n, err
}

// checkArchiveURL refuses what would cross a network unencrypted. The SHA-256 would show
// a change; but who asks for which runner is nobody's business.
func checkArchiveURL(u *url.URL) error {
	switch ip := net.ParseIP(u.Hostname()); {
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && (u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()):
		return nil
	}
	return fmt.Errorf("%s://%s: only https is taken", u.Scheme, u.Host)
}

// evict removes archives that were not used for long, and what a crash left of
// downloads. keep was just downloaded. A failure costs disk space only.
func (s *archives) evict(keep string) {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("old runner archives were not removed", "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entries {
		sum, _, _ := strings.Cut(e.Name(), ".")
		info, err := e.Info()
		if err != nil || sum == keep || s.active[sum] != nil {
			continue
		}
		if strings.HasSuffix(e.Name(), ".part") || s.now().Sub(info.ModTime()) > archiveAge {
			if err := removeIfThere(filepath.Join(s.dir, e.Name())); err != nil {
				s.log.Warn("an old runner archive was not removed", "error", err)
			}
		}
	}
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
