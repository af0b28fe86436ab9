package githubtest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// The paths of the App itself: its installations, its webhook, its deliveries.

func (g *GitHub) getApp(*call) answer {
	return ok(object{
		"id": g.c.AppID, "slug": "paddock", "node_id": nodeID("Integration", g.c.AppID), "owner": sender,
		"name": "Paddock", "description": "", "external_url": "https://example.com", "html_url": webURL + "/apps/paddock",
		"created_at": "2024-01-01T00:00:00Z", "updated_at": "2024-01-01T00:00:00Z",
		"permissions": permissions, "events": subscribed,
	})
}

func (g *GitHub) getHook(*call) answer {
	return ok(object{"content_type": "json", "insecure_ssl": "0", "url": g.webhook, "secret": "********"})
}

func (g *GitHub) patchHook(c *call) answer {
	var change struct {
		URL    *string `json:"url"`
		Secret *string `json:"secret"`
	}
	if err := json.Unmarshal(c.body, &change); err != nil {
		return refuse(http.StatusBadRequest, "Problems parsing JSON")
	}
	if change.URL != nil {
		g.webhook = *change.URL
	}
	if change.Secret != nil {
		g.c.Secret = []byte(*change.Secret)
	}
	return g.getHook(c)
}

func (g *GitHub) sortedAccounts() []*account {
	return slices.SortedFunc(maps.Values(g.accounts), func(a, b *account) int { return cmp.Compare(a.id, b.id) })
}

func (g *GitHub) listInstallations(c *call) answer {
	all := []object{}
	for _, a := range g.sortedAccounts() {
		if a.installation != 0 {
			all = append(all, g.listedInstallation(a))
		}
	}
	part, link := page(c, all)
	return answer{status: http.StatusOK, body: part, link: link}
}

// listedInstallation has an account that is a user and an enterprise at once: so the
// description of this one path has it, where that of a single installation says either.
func (g *GitHub) listedInstallation(a *account) object {
	o, both := g.installationObject(a), a.object()
	both["name"], both["slug"] = a.login, a.login
	both["created_at"], both["updated_at"] = stamp(a.since), stamp(a.since)
	o["account"] = both
	return o
}

func (g *GitHub) getInstallation(c *call) answer {
	for _, a := range g.sortedAccounts() {
		if a.installation != 0 && a.installation == c.pathID("installation_id") {
			return ok(g.installationObject(a))
		}
	}
	return notFound
}

// ownerInstallation finds the installation by organization or by repository.
func (g *GitHub) ownerInstallation(c *call) answer {
	a := g.accounts[strings.ToLower(cmp.Or(c.PathValue("org"), c.PathValue("owner")))]
	if a == nil || a.installation == 0 || (c.PathValue("org") != "" && a.kind != "Organization") {
		return notFound
	}
	if c.PathValue("repo") != "" && g.repositories[strings.ToLower(c.PathValue("owner")+"/"+c.PathValue("repo"))] == nil {
		return notFound
	}
	return ok(g.installationObject(a))
}

func (g *GitHub) postToken(c *call) answer {
	id := c.pathID("installation_id")
	for _, a := range g.sortedAccounts() {
		if a.installation == 0 || a.installation != id {
			continue
		}
		value, expires := secret("ghs_"), g.c.Now().Add(tokenLife)
		g.tokens[value] = token{installation: id, expires: expires}
		return answer{status: http.StatusCreated, body: object{
			"token": value, "expires_at": stamp(expires), "permissions": permissions, "repository_selection": "all",
		}}
	}
	return notFound
}

func (g *GitHub) listRepositories(c *call) answer {
	all := []object{}
	for _, name := range slices.Sorted(maps.Keys(g.repositories)) {
		if r := g.repositories[name]; r.owner == c.account {
			all = append(all, r.object())
		}
	}
	part, link := page(c, all)
	return answer{status: http.StatusOK, link: link, body: object{"total_count": len(all), "repositories": part}}
}

func (g *GitHub) getRateLimit(c *call) answer {
	u := g.used[bucket{c.account.installation, "core"}]
	core := object{"limit": g.c.Limit, "remaining": max(0, g.c.Limit-u.used), "reset": u.reset.Unix(), "used": u.used}
	return ok(object{"rate": core, "resources": object{"core": core, "search": core}})
}

// listDeliveries lists the log, newest first, by cursor.
func (g *GitHub) listDeliveries(c *call) answer {
	size := min(max(c.number("per_page", 30), 1), 100)
	before := int64(1) << 62
	if cursor := c.URL.Query().Get("cursor"); cursor != "" {
		id, err := strconv.ParseInt(strings.TrimPrefix(cursor, "v1_"), 10, 64)
		if err != nil {
			return refuse(http.StatusBadRequest, "Invalid cursor")
		}
		before = id
	}
	status := c.URL.Query().Get("status")
	list, link := []object{}, ""
	for _, d := range slices.Backward(g.deliveries) {
		failed := d.StatusCode >= 400
		if d.ID >= before || (status == "success" && failed) || (status == "failure" && !failed) {
			continue
		}
		if len(list) == size {
			q := c.URL.Query()
			q.Set("cursor", fmt.Sprintf("v1_%d", list[size-1]["id"]))
			link = fmt.Sprintf(`<%s%s?%s>; rel="next"`, c.base, c.URL.Path, q.Encode())
			break
		}
		list = append(list, d.item())
	}
	return answer{status: http.StatusOK, body: list, link: link}
}

// item is a delivery without its payload.
func (d *delivery) item() object {
	o := object{
		"id": d.ID, "guid": d.GUID, "delivered_at": stamp(d.At), "redelivery": d.Redelivery,
		"duration": d.duration.Seconds(), "status": d.Status, "status_code": d.StatusCode, "event": d.Event,
		"action": d.Action, "installation_id": nil, "repository_id": d.repository, "throttled_at": nil,
	}
	if d.installation != 0 {
		o["installation_id"] = d.installation
	}
	return o
}

func (g *GitHub) getDelivery(c *call) answer {
	d := g.delivery(c.pathID("delivery_id"))
	if d == nil {
		return notFound
	}
	headers := object{}
	for key, values := range d.headers {
		headers[key] = values[0]
	}
	o := d.item()
	o["url"] = g.webhook
	o["request"] = object{"headers": headers, "payload": json.RawMessage(d.payload())}
	o["response"] = object{"headers": object{}, "payload": ""}
	return ok(o)
}

func (g *GitHub) postAttempt(c *call) answer {
	d := g.delivery(c.pathID("delivery_id"))
	if d == nil {
		return notFound
	}
	g.redeliver(d)
	return answer{status: http.StatusAccepted, body: object{}}
}
