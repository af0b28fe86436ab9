package githubtest

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Delivery is one webhook in the delivery log.
type Delivery struct {
	ID         int64
	GUID       string // the same for copies and redeliveries
	Event      string // workflow_job
	Action     string // queued, waiting, in_progress, completed
	Job        fleet.JobID
	At         time.Time
	Redelivery bool
	// Status and StatusCode are what the receiver answered; 0 while it is under way.
	Status     string
	StatusCode int
	Payload    []byte // JSON, as it was signed
}

// delivery is an entry of the log, with what the log shows beside it.
type delivery struct {
	Delivery     // without the payload
	parts        envelope
	installation int64
	repository   int64
	duration     time.Duration
	headers      http.Header
}

// outgoing is a webhook that is still to be sent.
type outgoing struct {
	entry *delivery
	due   time.Time
}

// envelope is the payload of a workflow_job webhook, in GitHub's order of fields. The log
// keeps it in parts: of the 7 KB only the job's 1.5 KB are its own.
type envelope struct {
	Action       string          `json:"action"`
	Job          json.RawMessage `json:"workflow_job"`
	Deployment   json.RawMessage `json:"deployment,omitempty"`
	Repository   json.RawMessage `json:"repository"`
	Organization json.RawMessage `json:"organization,omitempty"`
	Sender       json.RawMessage `json:"sender"`
	Installation json.RawMessage `json:"installation,omitempty"`
}

// payload is the body that is signed and sent, the same each time.
func (d *delivery) payload() []byte {
	body, err := json.Marshal(d.parts)
	if err != nil {
		return nil // it was written once when it was validated
	}
	return body
}

// snapshot is the delivery as others see it.
func (d *delivery) snapshot() Delivery {
	whole := d.Delivery
	whole.Payload = d.payload()
	return whole
}

// emit writes the webhook of a job's change into the log and sends it on its way.
func (g *GitHub) emit(j *job, action string) {
	now := g.c.Now()
	entry := &delivery{
		Delivery: Delivery{
			ID: firstDeliveryID + g.id(), GUID: newUUID(now), Event: "workflow_job", Action: action, Job: j.id, At: now,
		},
		installation: j.run.repo.owner.installation, repository: j.run.repo.id,
	}
	var fate Fate
	if g.weather.Delivery != nil {
		fate = g.weather.Delivery(entry.Delivery)
	}
	parts, err := j.envelope(action, fate.Installation)
	entry.parts = parts
	if err == nil {
		err = g.schema.hook(entry.Event, action, entry.payload())
	}
	if err != nil {
		g.violations = append(g.violations, err.Error())
		return
	}
	g.launch(entry, fate)
}

// envelope writes the parts of a webhook; installation is put into it instead of the
// true id if it is not 0.
func (j *job) envelope(action string, installation int64) (envelope, error) {
	repo := j.run.repo
	if installation == 0 {
		installation = repo.owner.installation
	}
	e := envelope{Action: action, Repository: repo.raw, Organization: repo.organization, Sender: senderRaw}
	var err error
	if e.Job, err = json.Marshal(j.fields()); err != nil {
		return e, err
	}
	if j.deployment != nil {
		if e.Deployment, err = json.Marshal(j.deploymentObject()); err != nil {
			return e, err
		}
	}
	if installation != 0 {
		e.Installation, err = json.Marshal(object{"id": installation, "node_id": nodeID("Integration", installation)})
	}
	return e, err
}

// launch puts a delivery into the log and, unless the weather drops it, on its way.
func (g *GitHub) launch(entry *delivery, fate Fate) {
	g.deliveries = append(g.deliveries, entry)
	if fate.Drop {
		entry.Status, entry.StatusCode = "failed to connect to host", http.StatusBadGateway
		if fate.Silent {
			entry.Status, entry.StatusCode = "OK", http.StatusOK
		}
		return
	}
	for range fate.Copies + 1 {
		g.outgoing = append(g.outgoing, &outgoing{entry: entry, due: entry.At.Add(fate.Delay)})
	}
}

// due takes the webhooks whose time has come.
func (g *GitHub) due() []*outgoing {
	now := g.c.Now()
	var due []*outgoing
	later := g.outgoing[:0:0]
	for _, o := range g.outgoing {
		if o.due.After(now) {
			later = append(later, o)
		} else {
			due = append(due, o)
		}
	}
	g.outgoing = later
	g.underWay += len(due)
	return due
}

// patience is how long GitHub waits for the answer to a webhook.
const patience = 10 * time.Second

// send posts one webhook and writes the outcome into the log.
func (g *GitHub) send(ctx context.Context, o *outgoing) {
	g.mu.Lock()
	url, entry := g.webhook, o.entry.Delivery
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	began := g.c.Now()
	header, code, err := g.post(ctx, url, entry, o.entry.payload())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.underWay--
	o.entry.duration, o.entry.headers = g.c.Now().Sub(began), header
	o.entry.StatusCode, o.entry.Status = code, http.StatusText(code)
	if err != nil {
		o.entry.StatusCode, o.entry.Status = http.StatusBadGateway, "failed to connect to host"
		g.c.Log.Debug("a webhook was not delivered", "delivery", o.entry.GUID, "error", err)
	}
	g.touch()
}

// post sends the request as GitHub does.
func (g *GitHub) post(ctx context.Context, url string, d Delivery, payload []byte) (sent http.Header, code int, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(payload))
	if err != nil {
		return nil, 0, fmt.Errorf("deliver: %w", err)
	}
	h := request.Header
	h.Set("Content-Type", "application/json")
	h.Set("User-Agent", "GitHub-Hookshot/044aadd")
	h.Set("X-GitHub-Event", d.Event)
	h.Set("X-GitHub-Delivery", d.GUID)
	h.Set("X-GitHub-Hook-ID", "1")
	h.Set("X-GitHub-Hook-Installation-Target-Type", "integration")
	h.Set("X-GitHub-Hook-Installation-Target-ID", strconv.FormatInt(g.c.AppID, 10))
	if g.c.Secret != nil {
		h.Set("X-Hub-Signature-256", Sign(g.c.Secret, payload))
	}
	response, err := g.c.Transport.RoundTrip(request)
	if err != nil {
		return h, 0, fmt.Errorf("deliver: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	if _, err := io.Copy(io.Discard, io.LimitReader(response.Body, 1<<16)); err != nil {
		return h, 0, fmt.Errorf("deliver: read the answer: %w", err)
	}
	return h, response.StatusCode, nil
}

// Sign is the X-Hub-Signature-256 header of a payload: "sha256=" and the HMAC in hex.
func Sign(secret, payload []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write(payload) // never fails
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

// Redeliver sends a delivery again, under a new id and the same GUID, as a person does
// on the App's page or a program by POST …/attempts.
func (g *GitHub) Redeliver(id int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.delivery(id)
	if old == nil {
		return fmt.Errorf("redeliver %d: there is no such delivery", id)
	}
	g.redeliver(old)
	return nil
}

func (g *GitHub) redeliver(old *delivery) {
	again := *old
	again.ID, again.At, again.Redelivery = firstDeliveryID+g.id(), g.c.Now(), true
	again.Status, again.StatusCode = "", 0
	g.launch(&again, Fate{})
	g.touch()
}

// delivery finds a delivery; the log is in the order of ids.
func (g *GitHub) delivery(id int64) *delivery {
	at, found := slices.BinarySearchFunc(g.deliveries, id, func(d *delivery, id int64) int { return cmp.Compare(d.ID, id) })
	if !found {
		return nil
	}
	return g.deliveries[at]
}
