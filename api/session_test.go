package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// upgrading answers a call with a 101 and echoes its stream in capitals; with other
// headers it answers those.
func upgrading(t *testing.T, answer string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 1 || r.Header.Get("Upgrade") != StreamProtocol || r.Header.Get("Connection") != "Upgrade" || r.Header.Get("Authorization") != "Bearer pdk_one" {
			t.Errorf("%s %v", r.Proto, r.Header)
		}
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, answer)
		text, _ := io.ReadAll(rw)
		_, _ = io.WriteString(conn, strings.ToUpper(string(text)))
	}
}

const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: paddock-stream\r\n\r\n"

// A call becomes a stream over TLS, whose bytes may come with the answer itself, whose
// halves end one by one, and which outlives the context of the call.
func TestStream(t *testing.T) {
	d := newDouble(t, http.StatusOK, "")
	d.Config.Handler = upgrading(t, switching+"hello ")
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := d.client(t).Session(ctx, SessionOrder{VM: "vm1", Kind: SessionPort, Port: 22})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	cancel()
	if _, err := io.WriteString(stream, "world"); err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(stream); err != nil || string(text) != "hello WORLD" {
		t.Errorf("%q, %v", text, err)
	}
}

// Each call has a connection of its own, so that a balancer sends the next try elsewhere.
func TestStreamsOwnConnections(t *testing.T) {
	d := newDouble(t, http.StatusMisdirectedRequest, `{"error":"another replica","hint":"again"}`)
	inner := d.Config.Handler
	seen := map[string]bool{}
	d.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen[r.RemoteAddr] = true
		if r.ProtoMajor != 1 {
			t.Errorf("by %s", r.Proto)
		}
		inner.ServeHTTP(w, r)
	})
	c := d.client(t)
	for range 2 {
		if _, err := c.Answer(t.Context(), "mac1", "s/1"); !Misdirected(err) || d.path != "/v1/nodes/mac1/sessions/s%2F1" {
			t.Errorf("%s: %v", d.path, err)
		}
	}
	if err := c.Refuse(t.Context(), "mac1", "s1", Error{Message: "no", Hint: "ask"}); !Misdirected(err) || d.sent != `{"error":"no","hint":"ask"}` || d.path != "/v1/nodes/mac1/sessions/s1" {
		t.Errorf("%s %s: %v", d.path, d.sent, err)
	}
	if len(seen) != 3 {
		t.Errorf("%d connections for 3 calls", len(seen))
	}
}

func TestStreamRefused(t *testing.T) {
	for name, c := range map[string]struct {
		order  SessionOrder
		status int
		body   string
		path   string
		want   string
	}{
		"ours":                 {SessionOrder{VM: "vm1", Kind: SessionLogs, Once: true}, 409, `{"error":"no","hint":"ask"}`, "/v1/vms/vm1/session?kind=logs&once=true", "no (hint: ask)"},
		"a proxy's":            {SessionOrder{VM: "a/b", Kind: SessionConsole}, 502, "<html>", "/v1/vms/a%2Fb/session?kind=console", "502 Bad Gateway"},
		"not upgraded at all":  {SessionOrder{VM: "vm1", Kind: SessionPort, Port: 5900}, 200, "{}", "/v1/vms/vm1/session?kind=port&port=5900", "200 OK"},
		"a redirect elsewhere": {SessionOrder{VM: "vm1", Kind: SessionConsole}, 302, "", "/v1/vms/vm1/session?kind=console", "302 Found"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDouble(t, c.status, c.body)
			stream, err := d.client(t).Session(t.Context(), c.order)
			var said *Error
			if stream != nil || !errors.As(err, &said) || said.Status != c.status || !strings.Contains(err.Error(), c.want) || d.path != c.path || d.method != "POST" {
				t.Errorf("%s %s: %v", d.method, d.path, err)
			}
		})
	}
	t.Run("another protocol", func(t *testing.T) {
		d := newDouble(t, http.StatusOK, "")
		d.Config.Handler = upgrading(t, strings.Replace(switching, "paddock-stream", "websocket", 1))
		if _, err := d.client(t).Session(t.Context(), SessionOrder{VM: "vm1", Kind: SessionConsole}); err == nil || !strings.Contains(err.Error(), "another protocol") {
			t.Error(err)
		}
	})
	t.Run("its caller leaves", func(t *testing.T) {
		d := newDouble(t, http.StatusOK, "")
		d.Config.Handler = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := d.client(t).Session(ctx, SessionOrder{VM: "vm1", Kind: SessionConsole}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		d := newDouble(t, http.StatusOK, "")
		c := d.client(t)
		d.Close()
		if _, err := c.Session(t.Context(), SessionOrder{VM: "vm1", Kind: SessionConsole}); err == nil || !strings.Contains(err.Error(), "reach the controller at "+d.URL) {
			t.Error(err)
		}
	})
}

// FuzzStream: whatever answers a call for a stream, it is a stream or an error.
func FuzzStream(f *testing.F) {
	f.Add([]byte(switching + "hello"))
	f.Add([]byte("HTTP/1.1 101\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 409 Conflict\r\nContent-Length: 15\r\n\r\n{\"error\":\"no\"}x"))
	f.Add([]byte("\x00"))
	l, err := new(net.ListenConfig).Listen(f.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = l.Close() })
	answers := make(chan []byte, 1)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = http.ReadRequest(bufio.NewReader(conn))
			_, _ = conn.Write(<-answers)
			_ = conn.Close()
		}
	}()
	c, err := New(Config{URL: "http://" + l.Addr().String(), Token: "pdk_one"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		answers <- answer
		stream, err := c.Session(t.Context(), SessionOrder{VM: "vm1", Kind: SessionConsole})
		if (stream == nil) == (err == nil) {
			t.Fatal(fmt.Sprint(stream), err)
		}
		if stream != nil {
			_, _ = io.Copy(io.Discard, stream)
			_ = stream.Close()
		}
	})
}
