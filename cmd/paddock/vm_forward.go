package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/api"
)

func forwardCommand(g *globals) *cobra.Command {
	stdio := false
	cmd := &cobra.Command{
		Use: "forward VM [LOCAL:]REMOTE", Short: "Bring a TCP port of a VM to this host", Args: cobra.ExactArgs(2),
		Long: `Listen on 127.0.0.1:LOCAL (a free port by default, which is printed) and carry each connection
to the VM's port REMOTE, until Ctrl-C. With --stdio there is one connection, standard input and
output: what a ProxyCommand wants.

` + aboutVM,
		Example: "paddock vm forward 3k8x 5900\npaddock vm forward 3k8x 8080:80\nssh -o ProxyCommand='paddock vm forward --stdio 3k8x 22' admin@mac",
		RunE: func(cmd *cobra.Command, args []string) error {
			local, remote, err := readPorts(args[1])
			if err != nil {
				return err
			}
			if stdio && strings.Contains(args[1], ":") {
				return usage("give the VM's port alone", "--stdio listens nowhere, and %q names a port here", args[1])
			}
			client, err := g.streamClient()
			if err != nil {
				return err
			}
			vm, err := findVM(cmd.Context(), client, args[0])
			if err != nil {
				return err
			}
			f := forwarder{client: client, order: api.SessionOrder{VM: vm, Kind: api.SessionPort, Port: remote}}
			if stdio {
				return f.carry(cmd.Context(), stdioConn{cmd.InOrStdin(), cmd.OutOrStdout()})
			}
			ctx, _, stop := untilSignal(cmd.Context())
			defer stop()
			return f.listen(ctx, local, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&stdio, "stdio", false, "carry standard input and output instead of listening")
	return cmd
}

// readPorts reads [LOCAL:]REMOTE; LOCAL 0 is a free one.
func readPorts(word string) (local, remote int, err error) {
	from, to, two := strings.Cut(word, ":")
	if !two {
		from, to = "0", word
	}
	l, errL := strconv.ParseUint(from, 10, 16)
	r, errR := strconv.ParseUint(to, 10, 16)
	if errL != nil || errR != nil || r == 0 {
		return 0, 0, usage("ports are 1 to 65535, as 22 or 2222:22", "%q is no port", word)
	}
	return int(l), int(r), nil
}

// forwarder carries connections of this host to a port of a VM.
type forwarder struct {
	client *api.Client
	order  api.SessionOrder
}

// listen carries every connection to a local port until ctx ends. A connection that
// cannot be carried is said, and the next may be: the guest's service may come yet.
func (f *forwarder) listen(ctx context.Context, local int, out, complaints io.Writer) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(local)))
	if err != nil {
		return fmt.Errorf("listen: %w (hint: another program may have the port; leave it out for a free one)", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	if _, err := fmt.Fprintf(out, "%s is port %d of VM %s\n", l.Addr(), f.order.Port, f.order.VM); err != nil {
		return err
	}
	var conns sync.WaitGroup
	defer conns.Wait()
	var mu sync.Mutex // complaints come one at a time
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept a connection: %w", err)
		}
		conns.Go(func() {
			if err := f.carry(ctx, conn); err != nil && ctx.Err() == nil {
				mu.Lock()
				defer mu.Unlock()
				_, _ = fmt.Fprintln(complaints, "paddock:", advise(err))
			}
		})
	}
}

// carry is one session: it copies between conn and the VM's port until both sides have
// ended (of standard input and output: the VM's), or either failed, or ctx ended.
func (f *forwarder) carry(ctx context.Context, conn io.ReadWriteCloser) error {
	defer func() { _ = conn.Close() }()
	stream, err := f.client.Session(ctx, f.order)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _, _ = conn.Close(), stream.Close() })
	defer stop()
	up := make(chan struct{})
	go func() {
		defer close(up)
		if _, err := io.Copy(stream, conn); err != nil {
			_ = stream.Close()
		} else {
			_ = stream.CloseWrite()
		}
	}()
	defer func() { _ = stream.Close() }()
	_, err = io.Copy(conn, stream)
	if gone := new(net.OpError); errors.As(err, &gone) && gone.Op == "write" || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return nil // our own side has left
	}
	if err != nil {
		return fmt.Errorf("the session broke off: %w (hint: paddock vm list shows whether the VM runs)", broken(err))
	}
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		<-up // the VM's side may listen still
	} // else a read of standard input could not be ended; it ends with the process
	return nil
}

// stdioConn is standard input and output as a connection.
type stdioConn struct {
	io.Reader
	io.Writer
}

func (stdioConn) Close() error { return nil }
