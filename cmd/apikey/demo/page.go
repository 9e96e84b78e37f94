package demo

// The page, and what its buttons do.

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
)

//go:embed page
var files embed.FS

const (
	sendEvery    = 200 * time.Millisecond
	refreshEvery = time.Second // also shows what somebody changes in psql
	changesKept  = 8
	hurryFor     = 10 * time.Second // after a change
)

// A change is a change of a key or plan, and when the replicas have answered by it.
type change struct {
	N      int         `json:"n"` // counts them
	What   string      `json:"what"`
	Want   string      `json:"want"` // the answer from then on
	Same   bool        `json:"same"` // as before, so that there is nothing to measure
	Millis [3]*float64 `json:"millis"`

	apiKey    string    // whose answers change; "": none do
	begin, at time.Time // when the store was asked, and when it had returned
}

// handler serves the page at /, and the API at /v1/.
func (d *demo) handler() http.Handler {
	page, _ := fs.Sub(files, "page") // it is embedded
	assets := http.FileServerFS(page)
	ui := http.NewServeMux()
	ui.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "+
			"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		assets.ServeHTTP(w, r)
	})
	ui.Handle("GET /demo.css", assets)
	ui.Handle("GET /demo.js", assets)
	ui.HandleFunc("GET /demo/events", d.events)
	ui.HandleFunc("POST /demo/choose", d.action(d.choose))
	ui.HandleFunc("POST /demo/change", d.action(d.change))
	ui.HandleFunc("POST /demo/fault", d.action(func(r *http.Request) error {
		if r.FormValue("part") == announcementPart && !d.setting.RealFeed {
			return errors.New("there are no announcements without PostgreSQL")
		}
		return d.links.set(r.FormValue("part"), r.FormValue("state"))
	}))
	ui.HandleFunc("POST /demo/restart", d.action(func(r *http.Request) error {
		i, err := strconv.Atoi(r.FormValue("replica"))
		if err != nil || i < 0 || i >= len(d.replicas) {
			return errors.New("there is no such replica")
		}
		d.changing.Lock()
		defer d.changing.Unlock()
		return d.replicas[i].restart(d.running)
	}))

	root := http.NewServeMux()
	root.HandleFunc("/v1/", func(w http.ResponseWriter, r *http.Request) { d.replicas[0].running.Load().api.ServeHTTP(w, r) })
	root.Handle("/outage/v1/", http.StripPrefix("/outage", d.outage))
	root.Handle("/", http.NewCrossOriginProtection().Handler(d.ownHost(ui)))
	return root
}

// ownHost refuses requests under other names than those of this machine, if the demo is for
// this machine only: a page of another site may have its name lead here.
func (d *demo) ownHost(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		ip := net.ParseIP(host)
		if d.setting.Loopback && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			http.Error(w, "this demo answers to localhost only", http.StatusForbidden)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		next.ServeHTTP(w, r)
	})
}

// action answers with what is wrong, "" if nothing is.
func (d *demo) action(do func(*http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var text string
		if err := do(r); err != nil {
			text = err.Error()
		}
		writeJSON(w, map[string]string{"error": text})
	}
}

func (d *demo) chosenKey() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.chosen.apiKey
}

// choose lets the replicas be asked for another key.
func (d *demo) choose(r *http.Request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, one := range d.rows {
		if strconv.Itoa(one.n) == r.FormValue("row") {
			d.chosen = one
			return nil
		}
	}
	return errors.New("there is no such key")
}

// change makes a change, and has the replicas watched until they answer by it.
func (d *demo) change(r *http.Request) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	d.hurry.Store(true) // an answer may change before the store has returned
	defer d.hurry.Store(false)
	action, begin := r.FormValue("action"), time.Now()
	d.mu.Lock()
	target := d.chosen
	before := d.known.code(target, begin)
	d.mu.Unlock()
	created, err := d.store.change(r.Context(), action, target)
	c := &change{What: target.orgID + ", " + done[action], at: time.Now(), begin: begin}
	if err != nil {
		return err
	}
	if created != nil {
		d.mu.Lock()
		created.n = len(d.rows) + 1
		d.rows = append(d.rows, created)
		d.chosen, target, before = created, created, "none"
		d.mu.Unlock()
	}
	if err := d.refresh(context.WithoutCancel(r.Context())); err != nil {
		return fmt.Errorf("the change was made, but its effect is not known: %w", err)
	}
	d.mu.Lock()
	c.Want, c.apiKey = d.known.code(target, c.at), target.apiKey
	if c.Same = c.Want == before; c.Same {
		c.apiKey = ""
	}
	d.made++
	c.N = d.made
	d.changes = append([]*change{c}, d.changes[:min(len(d.changes), changesKept-1)]...)
	d.mu.Unlock()
	for _, one := range d.replicas {
		one.mu.Lock()
		latest := one.latest
		one.mu.Unlock()
		d.answered(one.index, latest)
	}
	return nil
}

// answered notes an answer of a replica, and reports whether the next one is wanted soon,
// since the replica does not answer by the last change yet.
func (d *demo) answered(index int, a answer) (soon bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.changes) == 0 {
		return d.hurry.Load()
	}
	c := d.changes[0]
	if c.apiKey != a.apiKey || c.Millis[index] != nil {
		return d.hurry.Load()
	}
	if a.code != c.Want || a.since.Before(c.begin) {
		return time.Since(c.at) < hurryFor
	}
	c.Millis[index] = new(max(0, float64(a.since.Sub(c.at).Microseconds())/1000))
	return d.hurry.Load()
}

// refresh reads what the store holds.
func (d *demo) refresh(ctx context.Context) error {
	d.mu.Lock()
	rows := slices.Clone(d.rows)
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, refreshEvery)
	defer cancel()
	known, err := d.store.facts(ctx, rows)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.known = known
	return nil
}

func (d *demo) keepRefreshing(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(refreshEvery):
			_ = d.refresh(ctx) // if it fails, then the next time
		}
	}
}

// A rowJSON is a key with its plan, as the page shows it.
type rowJSON struct {
	N         int    `json:"n"`
	About     string `json:"about"`
	Org       string `json:"org"`
	Key       string `json:"key"`
	KeyState  string `json:"keyState"`
	PlanState string `json:"planState"`
	Code      string `json:"code"`
	Chosen    bool   `json:"chosen"`
}

// An event is what the page is sent again and again.
type event struct {
	Setting  *setting          `json:"setting,omitempty"` // in the first one
	MadeUp   string            `json:"madeUp,omitempty"`  // in the first one: a key that is in no store
	Rows     []rowJSON         `json:"rows"`
	Links    map[string]string `json:"links"`
	Changes  []*change         `json:"changes"`
	Replicas []replicaJSON     `json:"replicas"`
}

type replicaJSON struct {
	Name    string            `json:"name"`
	Samples []sample          `json:"samples"`
	Counts  map[string]uint64 `json:"counts"`
	Live    bool              `json:"live"`
	Fault   string            `json:"fault"`
}

// events streams what happens.
func (d *demo) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	out := http.NewResponseController(w)
	sent := make([]uint64, len(d.replicas))
	first := true
	for {
		e := d.snapshot(sent)
		if first {
			first = false
			e.Setting, e.MadeUp = &d.setting, keyformat.New(keyformat.Test)
		}
		body, err := json.Marshal(e)
		if err != nil {
			return
		}
		_ = out.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := fmt.Fprintf(w, "data: %s\n\n", body); err != nil || out.Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-time.After(sendEvery):
		}
	}
}

// snapshot returns the present state, with the samples that were not sent yet.
func (d *demo) snapshot(sent []uint64) event {
	e := event{Links: d.links.states()}
	for i, r := range d.replicas {
		samples := r.since(sent[i])
		if len(samples) > 0 {
			sent[i] = samples[len(samples)-1].N
		}
		stats := r.running.Load().cache.Stats()
		one := replicaJSON{Name: replicaNames[i : i+1], Samples: samples, Live: stats.FeedLive, Counts: counts(stats)}
		if stats.FeedErr != nil && !stats.FeedLive {
			one.Fault = stats.FeedErr.Error()
		}
		e.Replicas = append(e.Replicas, one)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	for _, r := range d.rows {
		e.Rows = append(e.Rows, rowJSON{
			N: r.n, About: r.about, Org: r.orgID, Key: r.apiKey,
			KeyState: d.known.keyState(r, now), PlanState: d.known.planState(r, now), Code: d.known.code(r, now), Chosen: r == d.chosen,
		})
	}
	for _, c := range d.changes {
		copied := *c
		e.Changes = append(e.Changes, &copied)
	}
	return e
}

func (f facts) keyState(r *row, now time.Time) string {
	key, found := f.keys[r.hash]
	switch {
	case !found:
		return "deleted"
	case !key.Active:
		return "deactivated"
	case !key.Live(now):
		return "expired"
	case !key.ExpiresAt.IsZero():
		return fmt.Sprintf("live, ends in %d s", int(key.ExpiresAt.Sub(now).Seconds())+1)
	}
	return "live"
}

func (f facts) planState(r *row, now time.Time) string {
	plan, found := f.plans[r.orgID]
	if !found {
		return "no plan"
	}
	text := fmt.Sprintf("%s, %s", plan.Name, plan.Status)
	switch {
	case !plan.APIAccess:
		text += ", without the API"
	case !plan.EndsAt.IsZero() && !now.Before(plan.EndsAt):
		text += ", has ended"
	}
	return text
}

// counts are the statistics that the page shows.
func counts(s apikey.CacheStats) map[string]uint64 {
	return map[string]uint64{
		"Announcements": s.Announcements, "StoreReads": s.StoreReads, "StoreErrors": s.StoreErrors, "StoreSkipped": s.StoreSkipped,
		"StaleUses": s.StaleUses, "RedisHits": s.RedisHits, "RedisMisses": s.RedisMisses, "RedisErrors": s.RedisErrors,
		"RedisSkipped": s.RedisSkipped, "RedisRejected": s.RedisRejected, "Unannounced": s.Unannounced, "QueueFull": s.QueueFull,
	}
}
