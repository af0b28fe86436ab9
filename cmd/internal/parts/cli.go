package parts

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/store"
)

// CLIFile is the file in the data directory that the command line reads.
const CLIFile = "cli.json"

const (
	// cliLife is how long the local command line's token is good; it is replaced
	// access.RenewBefore before that.
	cliLife = 90 * 24 * time.Hour
	// cliMaker is who is said to have made it.
	cliMaker = "local command line"
)

// leaveTokenForCLI writes what the command line on this host needs; whoever can read
// the data directory is the fleet's admin anyway, since the fleet key is in it. The token
// is in the ledger like any other, so that it is listed and can be revoked. One from
// before is used again; if it is about to end or was revoked, another takes its place.
func (c *Control) leaveTokenForCLI(ctx context.Context, now time.Time) error {
	path := filepath.Join(c.c.Config.Data, CLIFile)
	here := Endpoint{URL: c.local, Certificate: c.hash}
	verifier, err := c.key.Verifier()
	if err != nil {
		return err
	}
	former, _ := ReadEndpoint(path) // none, or a damaged one, is replaced
	who, err := verifier.Verify(former.Token, now, nil)
	if err == nil && who.Role == access.Admin && who.ExpiresAt.Sub(now) > access.RenewBefore {
		ledger, err := c.store.ReadLedger(ctx)
		if err != nil {
			return fmt.Errorf("look for the local command line's token: %w", err)
		}
		if slices.ContainsFunc(ledger.Tokens, func(t store.TokenRecord) bool { return t.ID == who.ID }) {
			here.Token = former.Token
			return writeFile(path, here)
		}
	}
	id := access.Identity{ID: access.NewID(), Role: access.Admin, Subject: "local", IssuedAt: now, ExpiresAt: now.Add(cliLife).Truncate(time.Second)}
	token, err := c.key.Sign(id)
	if err != nil {
		return err
	}
	if _, err := c.store.UpdateLedger(ctx, func(l *store.Ledger) error {
		if who.ID != "" { // else there was none that this fleet has signed
			l.Tokens = slices.DeleteFunc(l.Tokens, func(t store.TokenRecord) bool { return t.ID == who.ID })
			if l.Revoked == nil {
				l.Revoked = map[string]time.Time{}
			}
			l.Revoked[who.ID] = who.ExpiresAt
		}
		l.Tokens = append(l.Tokens, store.TokenRecord{
			ID: id.ID, Name: id.Subject, Role: string(id.Role), CreatedAt: now, ExpiresAt: id.ExpiresAt, CreatedBy: cliMaker,
		})
		return nil
	}); err != nil {
		return fmt.Errorf("record the local command line's token: %w", err)
	}
	here.Token = string(token)
	return writeFile(path, here)
}

// keepTokenForCLI replaces the token before it ends, while the controller runs.
func (c *Control) keepTokenForCLI(ctx context.Context) error {
	tick := time.NewTicker(24 * time.Hour)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			if err := c.leaveTokenForCLI(ctx, now); err != nil {
				c.c.Log.Warn("the local command line's token could not be renewed yet", "error", err)
			}
		}
	}
}
