package ssh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
)

// algorithms are the kinds of host key we ask for, in this order. The order is ours and
// fixed, since a server with several keys shows the one that is asked for first: an
// update of the library must not make a pinned guest look like another one.
var algorithms = []string{
	xssh.KeyAlgoED25519,
	xssh.KeyAlgoECDSA256, xssh.KeyAlgoECDSA384, xssh.KeyAlgoECDSA521,
	xssh.KeyAlgoRSASHA512, xssh.KeyAlgoRSASHA256,
}

// maxQuestions bounds what a server may ask by keyboard-interactive in one login; sshd
// asks for a password once per try.
const maxQuestions = 8

// login is one handshake: what is known of it decides what its failure means.
type login struct {
	config  Config
	conn    *firstBytes
	pinning error // what HostKeys said, if it refused
	checked bool  // the host key was accepted
	key     bool  // the server wanted to see the private key
	word    bool  // the server wanted to hear the password
	asked   int   // questions answered by keyboard-interactive
}

// firstBytes remembers how a peer began to speak. Only the handshake's goroutines read.
type firstBytes struct {
	net.Conn
	mu   sync.Mutex
	seen []byte // at most 64
}

func (f *firstBytes) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	f.mu.Lock()
	defer f.mu.Unlock()
	if room := 64 - len(f.seen); room > 0 {
		f.seen = append(f.seen, p[:min(n, room)]...)
	}
	return n, err
}

func (f *firstBytes) said() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return string(f.seen)
}

// Dial logs in over conn, a connection to the guest's SSH port, and takes it over: it is
// closed if Dial fails. The login takes at most 30 s.
func Dial(ctx context.Context, conn net.Conn, c Config) (*Client, error) {
	if c.Login == (fleet.Login{}) {
		c.Login = fleet.StockLogin
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	l := &login{config: c, conn: &firstBytes{Conn: conn}}
	methods, err := l.methods()
	if err == nil && (c.HostKey == nil || c.Key == "") {
		err = errors.New("host keys are pinned by name: neither the store nor the name may be missing")
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("SSH login of %s: %w", c.Login.User, err)
	}
	bounded, cancel := context.WithTimeout(ctx, handshakeLimit)
	defer cancel()
	stop := context.AfterFunc(bounded, func() { _ = conn.Close() })
	defer stop()
	client, chans, requests, err := xssh.NewClientConn(l.conn, c.Key, &xssh.ClientConfig{
		User:              c.Login.User,
		Auth:              methods,
		HostKeyCallback:   l.checkKey,
		HostKeyAlgorithms: algorithms,
		ClientVersion:     "SSH-2.0-Paddock",
	})
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			return nil, fmt.Errorf("SSH login of %s: %w (cut off: %w)", c.Login.User, ErrNoAnswer, ctx.Err())
		}
		return nil, fmt.Errorf("SSH login of %s: %w", c.Login.User, l.meaning(err, bounded.Err() != nil))
	}
	made := &Client{
		conn: xssh.NewClient(client, chans, requests), raw: conn, dir: c.Dir, log: c.Log,
		version: guest.Plain("ssh "+strings.TrimPrefix(string(client.ServerVersion()), "SSH-2.0-"), maxLine),
		closed:  make(chan struct{}), ended: make(chan struct{}),
	}
	go made.stayAlive()
	return made, nil
}

// methods are the ways to log in that the account allows, the key first.
func (l *login) methods() ([]xssh.AuthMethod, error) {
	account := l.config.Login
	var methods []xssh.AuthMethod
	if account.Key != "" {
		signer, err := xssh.ParsePrivateKey([]byte(account.Key))
		var locked *xssh.PassphraseMissingError
		switch {
		case errors.As(err, &locked):
			return nil, errors.New("the private key has a passphrase, which nobody would be there to type: give a key without one")
		case err != nil:
			// The library's text is not passed on: it may quote the key.
			return nil, errors.New("the private key cannot be read: it must be in PEM, as ssh-keygen writes it")
		}
		methods = append(methods, xssh.PublicKeysCallback(func() ([]xssh.Signer, error) {
			l.key = true
			return []xssh.Signer{signer}, nil
		}))
	}
	if account.Password != "" {
		methods = append(methods, xssh.PasswordCallback(func() (string, error) {
			l.word = true
			return account.Password, nil
		}), xssh.KeyboardInteractive(l.answer))
	}
	if len(methods) == 0 || account.User == "" {
		return nil, errors.New("the pool's ssh login needs a user, and a password or a key")
	}
	return methods, nil
}

// answer gives the password to questions that are not echoed, which is how macOS's sshd
// asks for it.
func (l *login) answer(_, _ string, questions []string, echos []bool) ([]string, error) {
	answers := make([]string, len(questions))
	for i := range questions {
		if l.asked++; echos[i] || l.asked > maxQuestions {
			return nil, errors.New("the server asks for more than a password")
		}
		l.word, answers[i] = true, l.config.Login.Password
	}
	return answers, nil
}

func (l *login) checkKey(_ string, _ net.Addr, key xssh.PublicKey) error {
	l.pinning = l.config.HostKey.Check(l.config.Key, key.Marshal())
	l.checked = l.pinning == nil
	return l.pinning
}

// meaning turns a failed handshake into what a person can act on.
func (l *login) meaning(err error, late bool) error {
	said := l.conn.said()
	switch {
	case l.pinning != nil:
		return l.pinning
	case said == "":
		return fmt.Errorf("%w: not a byte within %v: is its SSH server running? If this image has Paddock's agent, the pool needs bootstrap: agent (%s)",
			ErrNoAnswer, handshakeLimit, reason(err, late))
	case !strings.Contains(said, "SSH-"):
		return fmt.Errorf("%w: the port's first bytes are %q: this pool has bootstrap: ssh; if this image has Paddock's agent, it needs bootstrap: agent", ErrNotSSH, said)
	case l.checked && isRefusal(err):
		return l.refused()
	case late || !l.checked:
		return fmt.Errorf("%w: its login came to no end (%s)", ErrNoAnswer, reason(err, late))
	}
	return fmt.Errorf("%w: during the login: %s", guest.ErrLost, reason(err, late))
}

// isRefusal tells a refused login from a broken one, for which the library has no type.
// The second text is of a server that offers keyboard-interactive, and then refuses it
// before it has asked anything, as an sshd without PAM does after a wrong password.
func isRefusal(err error) bool {
	return strings.Contains(err.Error(), "unable to authenticate") || strings.Contains(err.Error(), "unexpected message type 51 (expected 60)")
}

// refused says what was wrong, and what the server would not even hear of.
func (l *login) refused() error {
	account := l.config.Login
	var told []string
	if account.Key != "" {
		told = append(told, offered("private key", l.key))
	}
	if account.Password != "" {
		told = append(told, offered("password", l.word))
	}
	return fmt.Errorf("%w: %s; set the pool's ssh login to an account of this image, and see that the image's sshd allows it", ErrLogin, strings.Join(told, ", "))
}

func offered(what string, heard bool) string {
	if heard {
		return "the " + what + " is wrong"
	}
	return "the server takes no login by " + what
}

// reason is the library's account of a failure, bounded: it may quote the server.
func reason(err error, late bool) string {
	if late {
		return fmt.Sprintf("cut after %v", handshakeLimit.Round(time.Second))
	}
	return guest.Plain(strings.TrimPrefix(err.Error(), "ssh: "), maxLine)
}
