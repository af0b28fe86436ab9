package guest

import (
	"bytes"
	"regexp"
	"strings"
	"unicode"
)

// maxLine bounds the part of an output line that is looked at, in bytes: the line that
// names a job is short, and a runner may print without ever ending a line.
const maxLine = 2 << 10

// The lines by which a runner says that it has a job. GitHub's prints
// "2026-01-02 03:04:05Z: Running job: build"; github-act-runner "Running Job 'build'",
// behind "NAME ( URL ): " since one process may serve several registrations.
var (
	busyLine    = regexp.MustCompile(`^(?:[0-9][0-9T:. -]*Z: )?Running job: (.+)$`)
	busyLineAct = regexp.MustCompile(`^(?:\S+ \( \S+ \): )?Running Job '(.+)'$`)
)

// parseBusy returns the job's name if line says that a job began.
func parseBusy(line string) (job string, ok bool) {
	line = strings.TrimRightFunc(line, unicode.IsSpace)
	for _, pattern := range []*regexp.Regexp{busyLine, busyLineAct} {
		if m := pattern.FindStringSubmatch(line); m != nil {
			return clip(m[1], maxText), true
		}
	}
	return "", false
}

// output takes what a runner prints: it keeps the tail and reports the first job. It
// holds ringSize, 2 maxTail and maxLine bytes at most, however much is printed. Not for concurrent
// use: os/exec writes from one goroutine when stdout and stderr are the same writer.
type output struct {
	busy func(job string) // called once
	said bool
	line []byte // the line being printed, cut at maxLine
	last []byte // the end of all output, cut at twice maxTail and trimmed when read
	ring ring   // more of it, for who follows it
}

// Write never fails: a runner is not stopped because its output is not understood.
func (o *output) Write(p []byte) (int, error) {
	o.keep(p)
	o.ring.write(p)
	for rest := p; !o.said && len(rest) > 0; {
		piece, after, ended := bytes.Cut(rest, []byte{'\n'})
		o.line = append(o.line, piece[:min(len(piece), maxLine-len(o.line))]...)
		if rest = after; ended {
			o.endLine()
		}
	}
	return len(p), nil
}

func (o *output) keep(p []byte) {
	o.last = append(o.last, p[max(0, len(p)-maxTail):]...)
	if len(o.last) > 2*maxTail { // copies every 4 KiB of output, not on every write
		o.last = append(o.last[:0], o.last[len(o.last)-maxTail:]...)
	}
}

func (o *output) endLine() {
	if job, ok := parseBusy(string(o.line)); ok {
		o.said = true
		o.busy(job)
	}
	o.line = o.line[:0]
}

// tail returns the last 4 KiB of output as valid UTF-8.
func (o *output) tail() string {
	return strings.ToValidUTF8(string(o.last[max(0, len(o.last)-maxTail):]), "\uFFFD")
}
