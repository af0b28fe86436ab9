package peer

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image/tart"
)

// writeSize is what is written at once, in bytes: its time is what a stalled reader is
// known by, and 32 transfers of it are 4 MiB.
const writeSize = 128 << 10

// manifest sends a manifest.
func (s *Server) manifest(w http.ResponseWriter, t target) {
	raw, err := s.c.Pieces.ServeManifest(t.image)
	if err != nil {
		s.missing(w, t, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	if _, err := w.Write(raw); err == nil {
		s.sent.Add(int64(len(raw)))
	}
}

// piece sends a piece from a byte on.
func (s *Server) piece(w http.ResponseWriter, r *http.Request, t target, receiver fleet.NodeID) {
	from, ok := parseRange(r.Header)
	if !ok {
		refuse(w, http.StatusBadRequest, "the only range there is: bytes=N-")
		return
	}
	release, ok := s.places.wait(r.Context(), receiver)
	if !ok {
		w.Header().Set("Retry-After", retryAfter)
		http.Error(w, "every place for transfers is taken", http.StatusServiceUnavailable)
		return
	}
	defer release()
	p, err := s.c.Pieces.Serve(t.image, t.content)
	if err != nil {
		s.missing(w, t, err)
		return
	}
	defer func() {
		if err := p.Close(); err != nil {
			s.log.Warn("a piece that was served stays leased", "image", t.image.Short(), "error", err)
		}
	}()
	if from > 0 && from >= p.Size() {
		refuse(w, http.StatusRequestedRangeNotSatisfiable, "the piece ends before that byte")
		return
	}
	if err := s.send(w, r, p, from, p.Size()); err != nil {
		s.log.Debug("a transfer to another node ended early", "image", t.image.Short(), "to", receiver, "error", err)
		panic(http.ErrAbortHandler) // so that what was sent does not pass for the whole
	}
}

// missing answers that something is not here, or cannot be read.
func (s *Server) missing(w http.ResponseWriter, t target, err error) {
	if errors.Is(err, cache.ErrNotReady) {
		http.Error(w, "it is not on this node", http.StatusNotFound)
		return
	}
	s.log.Warn("an image cannot be served to other nodes", "image", t.image.Short(), "error", err)
	http.Error(w, "it cannot be read on this node", http.StatusInternalServerError)
}

// send writes the head and the content, encoded if that was asked for and a core is free.
func (s *Server) send(w http.ResponseWriter, r *http.Request, content io.ReaderAt, from, size int64) error {
	encode := false
	if r.Header.Get(EncodingHeader) == appleLZ4 {
		select {
		case s.encoders <- struct{}{}:
			encode = true
			defer func() { <-s.encoders }()
		default:
		}
	}
	head := w.Header()
	head.Set("Content-Type", "application/octet-stream")
	if encode {
		head.Set(EncodingHeader, appleLZ4)
	} else {
		head.Set("Content-Length", strconv.FormatInt(size-from, 10))
	}
	if from > 0 {
		head.Set("Content-Range", contentRange(from, size))
		w.WriteHeader(http.StatusPartialContent)
	}
	out := &paced{request: r, server: s, out: w, control: http.NewResponseController(w)}
	in := io.NewSectionReader(content, from, size-from)
	if !encode {
		_, err := io.CopyBuffer(out, onlyReader{in}, make([]byte, writeSize))
		return err
	}
	if _, err := tart.Encode(out, in); err != nil {
		return err
	}
	return out.control.Flush()
}

// onlyReader hides WriteTo, which would choose the size of the writes.
type onlyReader struct{ io.Reader }

// paced writes within the server's bandwidth, and gives up on who does not read.
type paced struct {
	request *http.Request // its context ends waiting
	server  *Server
	out     io.Writer
	control *http.ResponseController
}

// Write writes at most writeSize bytes, which is what both callers give it.
func (p *paced) Write(b []byte) (int, error) {
	if limit := p.server.pace; limit != nil {
		if err := limit.WaitN(p.request.Context(), min(len(b), writeSize)); err != nil {
			return 0, err
		}
	}
	if err := p.control.SetWriteDeadline(time.Now().Add(p.server.c.Stall)); err != nil {
		return 0, fmt.Errorf("setting a deadline: %w", err)
	}
	n, err := p.out.Write(b)
	p.server.sent.Add(int64(n))
	return n, err
}
