package api

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Error is a refusal by the controller, or by the client before it asks: what is wrong
// and what to do about it. On the wire it is
// {"error": …, "hint": …, "again": …}.
type Error struct {
	Status  int    `json:"-"` // of HTTP; 0: the controller was not asked
	Message string `json:"error"`
	Hint    string `json:"hint,omitempty"`
	// Again is how long to wait before the same is asked again; 0: nothing is known of it.
	Again time.Duration `json:"again,omitempty"`
}

func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + " (hint: " + e.Hint + ")"
}

// maxLine is how much of an error that is not ours is shown, in bytes.
const maxLine = 200

// readError makes an Error of a response that is not a success, whoever wrote it: a
// proxy in between answers in HTML.
func readError(r *http.Response) error {
	e := &Error{}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxError))
	if err == nil {
		err = json.Unmarshal(body, e)
	}
	if err != nil || e.Message == "" {
		line, _, _ := strings.Cut(strings.TrimSpace(strings.ToValidUTF8(string(body), "?")), "\n")
		e = &Error{
			Message: strings.TrimSpace(fmt.Sprintf("the controller answered %d %s %.*s", r.StatusCode, http.StatusText(r.StatusCode), maxLine, line)),
			Hint:    "if this is not a Paddock controller's answer, check the URL and any proxy in between",
		}
	}
	e.Status = r.StatusCode
	return e
}
