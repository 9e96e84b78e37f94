package apikey_test

// The worlds that tests of the whole request path run in: organisations in every
// state that the contract with customers knows, in memory and in Postgres.

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// A keyState is what has become of a key.
type keyState string

const (
	live        keyState = "live"
	unexpired   keyState = "expires tomorrow"
	expired     keyState = "expired"
	deactivated keyState = "deactivated"
	deleted     keyState = "deleted"
	orgDeleted  keyState = "organisation deleted"
	unknown     keyState = "unknown"
)

var keyStates = []keyState{live, unexpired, expired, deactivated, deleted, orgDeleted, unknown}

func (s keyState) admits() bool { return s == live || s == unexpired }

// A planState is why an organisation is, or is not, let in. The refused ones are
// the reasons of the contract, "Why this happens", and what it leaves open.
type planState string

const (
	paid           planState = "paid"
	endsTomorrow   planState = "ends tomorrow"
	ended          planState = "ended, still marked active"
	statusExpired  planState = "expired"
	freeTier       planState = "free tier"
	paymentFailed  planState = "payment failed"
	pending        planState = "pending"
	pastDue        planState = "past due"
	downgraded     planState = "downgraded"
	cancelled      planState = "cancelled"
	noSubscription planState = "no subscription"
	unknownStatus  planState = "unknown status"
)

const (
	starter = "starter" // includes the API
	basic   = "basic"   // does not
)

// plans is what a store knows in each state; noSubscription has no entry.
func planFacts() map[planState]apikey.Plan {
	yesterday := time.Now().Add(-24 * time.Hour).UTC().Truncate(time.Microsecond)
	tomorrow := yesterday.Add(48 * time.Hour)
	return map[planState]apikey.Plan{
		paid:          {Name: starter, Status: apikey.PlanActive, APIAccess: true},
		endsTomorrow:  {Name: starter, Status: apikey.PlanActive, APIAccess: true, EndsAt: tomorrow},
		ended:         {Name: starter, Status: apikey.PlanActive, APIAccess: true, EndsAt: yesterday},
		statusExpired: {Name: starter, Status: apikey.PlanExpired, APIAccess: true, EndsAt: yesterday},
		freeTier:      {Name: basic, Status: apikey.PlanActive},
		paymentFailed: {Name: starter, Status: apikey.PlanPaymentFailed, APIAccess: true},
		pending:       {Name: starter, Status: apikey.PlanPending, APIAccess: true},
		pastDue:       {Name: starter, Status: apikey.PlanPastDue, APIAccess: true, EndsAt: tomorrow},
		downgraded:    {Name: basic, Status: apikey.PlanActive, EndsAt: tomorrow},
		cancelled:     {Name: starter, Status: apikey.PlanCancelled, APIAccess: true, EndsAt: tomorrow},
		unknownStatus: {Name: starter, Status: "ACTIVE", APIAccess: true},
	}
}

var planStates = []planState{
	paid, endsTomorrow, ended, statusExpired, freeTier, paymentFailed, pending, pastDue,
	downgraded, cancelled, noSubscription, unknownStatus,
}

func (s planState) admits() bool { return s == paid || s == endsTomorrow }

// wantCode is the answer to a well-formed request, "" for admitted.
func wantCode(k keyState, p planState) string {
	switch {
	case !k.admits():
		return "INVALID_API_KEY"
	case !p.admits():
		return "PLAN_EXPIRED"
	}
	return ""
}

// sized returns how much of something a test does: little at the desk, where one wants
// to go on soon, and a lot in CI.
func sized(desk, ci int) int {
	if os.Getenv("CI") != "" {
		return ci
	}
	return desk
}

// A world has a key and an organisation in any state.
type world interface {
	apikey.KeyStore
	apikey.PlanStore
	// enrol makes a new organisation with one key, and returns the key, and the Org
	// that a handler is to see if the two states admit.
	enrol(t testing.TB, k keyState, p planState) (string, apikey.Org)
}

// A memoryWorld is a world without servers. Its zero value is empty.
type memoryWorld struct {
	mu    sync.Mutex
	n     int
	keys  map[apikey.KeyHash]apikey.Key
	plans map[string]apikey.Plan
	err   error // the answer to everything, if not nil
	reads int
}

func newMemoryWorld() *memoryWorld {
	return &memoryWorld{keys: map[apikey.KeyHash]apikey.Key{}, plans: map[string]apikey.Plan{}}
}

func (w *memoryWorld) Key(_ context.Context, h apikey.KeyHash) (apikey.Key, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reads++
	return lookup(w.keys, h, w.err)
}

func (w *memoryWorld) Plan(_ context.Context, orgID string) (apikey.Plan, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reads++
	return lookup(w.plans, orgID, w.err)
}

func lookup[K comparable, V any](m map[K]V, k K, err error) (V, error) {
	v, ok := m[k]
	if err == nil && !ok {
		err = apikey.ErrNotFound
	}
	return v, err
}

func (w *memoryWorld) enrol(_ testing.TB, k keyState, p planState) (string, apikey.Org) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	apiKey := keyformat.New(keyformat.Test)
	org := apikey.Org{ID: fmt.Sprintf("org_%d", w.n), KeyID: fmt.Sprintf("key_%d", w.n)}
	key := apikey.Key{ID: org.KeyID, OrgID: org.ID, Active: true}
	switch k {
	case expired:
		key.ExpiresAt = time.Now().Add(-24 * time.Hour)
	case unexpired:
		key.ExpiresAt = time.Now().Add(24 * time.Hour)
	case deactivated:
		key.Active = false
	}
	if k != unknown && k != deleted && k != orgDeleted {
		w.keys[apikey.HashKey(apiKey)] = key
	}
	if plan, ok := planFacts()[p]; ok && k != orgDeleted {
		w.plans[org.ID], org.Plan = plan, plan
	}
	return apiKey, org
}

// set changes the world under its lock.
func (w *memoryWorld) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *memoryWorld) readCount() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.reads
}

// errStore is a store's "could not look".
var errStore = errors.New("connection refused")

// A postgresWorld is a world in a database of its own. Its organisations are
// rows of a table such as users have, which the keys refer to.
type postgresWorld struct {
	*apikey.PostgresKeyStore
	*apikey.PostgresPlanStore
	pool *pgxpool.Pool
}

func newPostgresWorld(t testing.TB) *postgresWorld {
	t.Helper()
	return newPostgresWorldOn(t, testservers.Postgres(t))
}

func newPostgresWorldOn(t testing.TB, pool *pgxpool.Pool) *postgresWorld {
	t.Helper()
	testservers.Exec(t, pool, `
		CREATE TABLE organisations (id text PRIMARY KEY);
		ALTER TABLE api_keys ADD FOREIGN KEY (org_id) REFERENCES organisations ON DELETE CASCADE;
		ALTER TABLE org_plans ADD FOREIGN KEY (org_id) REFERENCES organisations ON DELETE CASCADE;
		INSERT INTO plan_catalogue VALUES ('starter', true), ('basic', false)`)
	return &postgresWorld{apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), pool}
}

func (w *postgresWorld) enrol(t testing.TB, k keyState, p planState) (string, apikey.Org) {
	t.Helper()
	apiKey := keyformat.New(keyformat.Live)
	hash := apikey.HashKey(apiKey)
	org := apikey.Org{ID: "org_" + rand.Text()}
	testservers.Exec(t, w.pool, `INSERT INTO organisations VALUES ($1)`, org.ID)
	if plan, ok := planFacts()[p]; ok {
		if p == downgraded { // the way there counts too
			testservers.Exec(t, w.pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ($1, 'starter', 'active')`, org.ID)
		}
		testservers.Exec(t, w.pool, `INSERT INTO org_plans (org_id, plan, status, ends_at) VALUES ($1, $2, $3, $4)
			ON CONFLICT (org_id) DO UPDATE SET plan = excluded.plan, status = excluded.status, ends_at = excluded.ends_at`,
			org.ID, plan.Name, plan.Status, pg.NullTime(plan.EndsAt))
		org.Plan = plan
	}
	if k == unknown {
		return apiKey, org
	}
	err := w.pool.QueryRow(t.Context(),
		`INSERT INTO api_keys (org_id, key_hash) VALUES ($1, $2) RETURNING id::text`, org.ID, hash[:]).Scan(&org.KeyID)
	if err != nil {
		t.Fatal(err)
	}
	switch k {
	case expired:
		testservers.Exec(t, w.pool, `UPDATE api_keys SET expires_at = now() WHERE id = $1`, org.KeyID)
	case unexpired:
		testservers.Exec(t, w.pool, `UPDATE api_keys SET expires_at = now() + '1 day' WHERE id = $1`, org.KeyID)
	case deactivated:
		testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	case deleted:
		testservers.Exec(t, w.pool, `DELETE FROM api_keys WHERE id = $1`, org.KeyID)
	case orgDeleted:
		testservers.Exec(t, w.pool, `DELETE FROM organisations WHERE id = $1`, org.ID)
	}
	return apiKey, org
}

// contract returns the bodies of the customers' documentation by code, compact.
func contract(t testing.TB) map[string]string {
	t.Helper()
	text, err := os.ReadFile("testdata/trackpilots-errors.txt")
	if err != nil {
		t.Fatal(err)
	}
	bodies := map[string]string{
		// The sixth code: an outage, which the documentation does not know.
		"SERVICE_UNAVAILABLE": `{"success":false,"statusCode":503,"statusMessage":"Service unavailable","data":null,` +
			`"error":{"message":"Authentication is temporarily unavailable","code":"SERVICE_UNAVAILABLE"}}`,
	}
	for _, block := range regexp.MustCompile(`(?ms)^\{\n  "success".*?^\}`).FindAll(text, -1) {
		var compact bytes.Buffer
		var body struct{ Error struct{ Code string } }
		if err := errors.Join(json.Compact(&compact, block), json.Unmarshal(block, &body)); err != nil {
			t.Fatal(err)
		}
		if earlier, ok := bodies[body.Error.Code]; ok && earlier != compact.String() {
			t.Fatalf("the contract contradicts itself on %s", body.Error.Code)
		}
		bodies[body.Error.Code] = compact.String()
	}
	if len(bodies) != 6 {
		t.Fatalf("found %d codes in the contract, want 5", len(bodies)-1)
	}
	return bodies
}

// wantHeaders is section for section what a refusal carries.
func wantHeaders(code string, body string) http.Header {
	h := http.Header{
		"Content-Type":           {"application/json; charset=utf-8"},
		"Content-Length":         {fmt.Sprint(len(body))},
		"Cache-Control":          {"no-store"},
		"X-Content-Type-Options": {"nosniff"},
		"Vary":                   {"Authorization"},
	}
	switch code {
	case "API_KEY_MISSING":
		h.Set("WWW-Authenticate", `Bearer realm="api", error="invalid_request"`)
	case "INVALID_API_KEY":
		h.Set("WWW-Authenticate", `Bearer realm="api", error="invalid_token"`)
	case "SERVICE_UNAVAILABLE":
		h.Set("Retry-After", "1")
	default:
		h.Set("WWW-Authenticate", `Bearer realm="api"`)
	}
	return h
}

// wantStatus is the status of a code.
func wantStatus(code string) int {
	switch code {
	case "":
		return http.StatusOK
	case "SERVICE_UNAVAILABLE":
		return http.StatusServiceUnavailable
	}
	return http.StatusUnauthorized
}
