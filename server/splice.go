package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/store"
)

const (
	// handoverTime bounds the answer by which a call becomes a stream.
	handoverTime = 5 * time.Second
	// spliceBuffer is what one direction of a session holds, in bytes.
	spliceBuffer = 32 << 10
)

// stream is a call's connection after its 101.
type stream struct {
	net.Conn
	read io.Reader // first what net/http had read already
}

func (s *stream) Read(p []byte) (int, error) { return s.read.Read(p) }

// CloseWrite ends one direction; both kinds of connection that net/http serves can.
func (s *stream) CloseWrite() error {
	if half, ok := s.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return fmt.Errorf("half-close a %T: %w", s.Conn, errors.ErrUnsupported)
}

// upgrades reports whether a call asks to become a stream, and can.
func upgrades(c *gin.Context) bool {
	return c.Request.ProtoMajor == 1 && strings.EqualFold(c.GetHeader("Upgrade"), api.StreamProtocol)
}

func noUpgrade(c *gin.Context) error {
	if c.Request.ProtoMajor == 1 { // HTTP/2 has no such headers
		c.Header("Upgrade", api.StreamProtocol)
		c.Header("Connection", "Upgrade")
	}
	return refusal(http.StatusUpgradeRequired, "this call becomes a raw stream", "send it by HTTP/1.1 with Connection: Upgrade and Upgrade: "+api.StreamProtocol+"; a proxy in between has to pass these")
}

// take answers a call with 101 and takes its connection over.
func take(c *gin.Context) (*stream, error) {
	conn, buffered, err := c.Writer.Hijack()
	if err != nil {
		return nil, fmt.Errorf("take the connection over: %w", err)
	}
	err = conn.SetDeadline(time.Now().Add(handoverTime))
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", api.StreamProtocol)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	var early []byte
	if err == nil {
		early, err = buffered.Peek(buffered.Reader.Buffered())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("switch to a stream: %w", err), conn.Close())
	}
	return &stream{Conn: conn, read: io.MultiReader(bytes.NewReader(bytes.Clone(early)), conn)}, nil
}

// splice copies between a person and a node until both directions have ended, one of
// them broke, the VM ended, the person's token ended or was revoked or the server drains;
// then both are closed. An idle session stays: TCP's keep-alive finds peers that are gone.
func (s *Server) splice(ctx context.Context, near, far *stream, p store.Pending, who access.Identity) {
	began := time.Now()
	s.metrics.sessions.Inc()
	defer s.metrics.sessions.Dec()
	var moved atomic.Int64
	ends := make(chan error, 2)
	go func() { ends <- pour(far, near, &moved) }()
	go func() { ends <- pour(near, far, &moved) }()
	cut := func() { _, _ = near.Close(), far.Close() }
	look := time.NewTicker(s.times.look)
	defer look.Stop()
	var (
		left  = 2
		quiet time.Duration // since one side ended, without a byte
		last  int64
		why   = "it ended"
		drain = s.drain
		grace <-chan time.Time
	)
	for left > 0 {
		select {
		case err := <-ends:
			left--
			// Only a port's streams have two directions; who closes another leaves.
			if err != nil || p.Kind != string(api.SessionPort) {
				cut()
			}
		case <-look.C:
			now := moved.Load()
			if quiet += s.times.look; left == 2 || now != last {
				quiet = 0
			}
			last = now
			if quiet >= s.times.quiet {
				why = "one side had ended and the other was silent"
				cut()
			}
			if over := s.over(ctx, &p, who); over != "" {
				why = over
				cut()
			}
			s.looks.Add(1)
		case <-drain:
			drain = nil
			timer := time.NewTimer(s.times.grace)
			defer timer.Stop()
			grace = timer.C
		case <-grace:
			why = "the controller stops"
			cut()
		}
	}
	cut()
	s.log.Info("a session ended", "vm", p.VM, "node", p.Node, "actor", p.Actor, "kind", what(&p), "reason", why, "bytes", moved.Load(), "seconds", time.Since(began).Seconds())
}

// pour copies one direction and passes its end on. An error means that the other
// direction is worth nothing, either.
func pour(to, from *stream, moved *atomic.Int64) error {
	buffer := make([]byte, spliceBuffer)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return err
			}
			moved.Add(int64(n))
		}
		if errors.Is(err, io.EOF) {
			return to.CloseWrite()
		}
		if err != nil {
			return err
		}
	}
}

// over says why a session may not go on, "" if it may. A store that is away or was
// emptied says nothing about its VM.
func (s *Server) over(ctx context.Context, p *store.Pending, who access.Identity) string {
	now := s.c.Now()
	if !now.Before(who.ExpiresAt) {
		return "its token ended"
	}
	ledger, err := s.ledger.get(ctx, now)
	if err != nil {
		return ""
	}
	if _, revoked := ledger.Revoked[who.ID]; revoked {
		return "its token was revoked"
	}
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return ""
	}
	if vm := view.VMs[p.VM]; vm != nil && vm.State.Final() || vm == nil && view.Nodes[p.Node] != nil {
		return "the VM ended"
	}
	return ""
}
