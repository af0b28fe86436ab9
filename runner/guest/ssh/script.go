package ssh

import (
	_ "embed" // the scripts
	"errors"
	"fmt"
	"strings"

	"github.com/paddock-ci/paddock/runner/guest"
)

// The scripts, in POSIX sh; state.sh comes before each.
var (
	//go:embed scripts/state.sh
	scriptState string
	//go:embed scripts/hello.sh
	scriptHello string
	//go:embed scripts/watch.sh
	scriptWatch string
	//go:embed scripts/start.sh
	scriptStart string
	//go:embed scripts/output.sh
	scriptOutput string
	//go:embed scripts/exec.sh
	scriptExec string
	//go:embed scripts/put.sh
	scriptPut string
)

// Bounds of what a caller gives.
const (
	maxScript = 64 << 10  // bytes: the arguments and environment of a runner are far smaller
	maxInput  = 256 << 10 // bytes of a runner's input, of which a shell holds a copy; a JIT config has 8 KiB
	maxName   = 256       // bytes of a runner's name, of which GitHub takes 64
)

// script is a script as it is sent: state.sh, what the host sets, and the body.
func script(body string, set ...string) string {
	return bare(scriptState) + strings.Join(set, "\n") + "\n" + bare(body)
}

// bare leaves out lines that are comments: the guest reads its script byte by byte.
func bare(body string) string {
	var text strings.Builder
	for line := range strings.Lines(body) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			text.WriteString(line)
		}
	}
	return text.String()
}

// quotePath is guest.Quote, but ~/ at the beginning is the account's home.
func quotePath(path string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		return `"$HOME"/` + guest.Quote(rest)
	}
	return guest.Quote(path)
}

// startScript is the script that starts a runner. Its input is not in it.
func startScript(r guest.Run, dir string) (string, error) {
	switch {
	case r.Name == "" || guest.Plain(r.Name, maxName) != r.Name:
		return "", fmt.Errorf("a runner needs a name of one line and at most %d bytes", maxName)
	case len(r.Input) > maxInput:
		return "", fmt.Errorf("an input of %d bytes: at most %d go through a guest's shell", len(r.Input), maxInput)
	}
	return programScript(scriptStart, r.Argv, r.Env, dir, "runner="+guest.Quote(r.Name))
}

// programScript is a script that runs a program: it finds dir, the arguments in $@, and a
// function that sets the environment.
func programScript(body string, argv []string, env map[string]string, dir string, set ...string) (string, error) {
	if len(argv) == 0 || argv[0] == "" {
		return "", errors.New("a runner or a command needs a program")
	}
	arguments := make([]string, len(argv))
	for i, a := range argv {
		arguments[i] = guest.Quote(a)
	}
	exports, err := guest.Exports(env)
	if err != nil {
		return "", err
	}
	set = append(set, "dir="+quotePath(dir), "set -- "+strings.Join(arguments, " "), "environment() {\n:\n"+exports+"}")
	text := script(body, set...)
	if strings.ContainsRune(text, 0) {
		return "", errors.New("a NUL byte in an argument, a variable or a directory")
	}
	if len(text) > maxScript {
		return "", fmt.Errorf("arguments and environment make a script of %d bytes, at most %d", len(text), maxScript)
	}
	return text, nil
}

// encodeInput writes bytes as printf %b reads them, with a full stop behind the last: an
// input that was cut off has none. What base64 is made of stands for itself.
func encodeInput(input []byte) string {
	var text strings.Builder
	for _, b := range input {
		switch {
		case 'a' <= b && b <= 'z', 'A' <= b && b <= 'Z', '0' <= b && b <= '9', b == '+', b == '/', b == '=', b == '-', b == '_':
			text.WriteByte(b)
		default:
			fmt.Fprintf(&text, `\0%03o`, b)
		}
	}
	text.WriteByte('.')
	return text.String()
}
