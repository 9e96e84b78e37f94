package demo

// The organisations of the demo, and the stores that hold their keys and plans.

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/faultproxy"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/localserver"
)

// The tiers of the demo.
const (
	starter = "demo-starter" // includes the API
	basic   = "demo-basic"   // does not
)

// A row is a key that the page shows, and its organisation.
type row struct {
	n      int // identifies it
	about  string
	apiKey string
	hash   apikey.KeyHash
	keyID  string // "" until it is stored
	orgID  string

	key  apikey.Key   // to begin with
	plan *apikey.Plan // to begin with; nil: none
}

// facts are what a store holds of the rows.
type facts struct {
	keys  map[apikey.KeyHash]apikey.Key
	plans map[string]apikey.Plan
}

// code returns the answer to a request with the key of r; "" if it is admitted.
func (f facts) code(r *row, now time.Time) string {
	key, found := f.keys[r.hash]
	if !found || !key.Live(now) {
		return apikey.ErrInvalidAPIKey.Code
	}
	if plan, found := f.plans[r.orgID]; !found || !plan.AllowsAPI(now) {
		return apikey.ErrPlanExpired.Code
	}
	return ""
}

// A store holds the keys and plans of the demo.
type store interface {
	// open returns the stores of a replica, behind links, and a function that follows
	// changes until its context ends; nil if nothing announces them.
	open(ctx context.Context, l *links) (replicaStores, error)

	// facts reads all rows, past the links.
	facts(ctx context.Context, rows []*row) (facts, error)

	// change makes a change. For the new keys of "rotate" and "create" it returns a row.
	change(ctx context.Context, action string, r *row) (*row, error)

	// close removes what the demo has stored.
	close() error
}

// replicaStores are what a replica reads from.
type replicaStores struct {
	keys  apikey.KeyStore
	plans apikey.PlanStore
	watch func(context.Context, *apikey.Cache)
	close func()
}

// The changes that can be made, as the page names them.
const (
	deactivate = "deactivate"
	activate   = "activate"
	remove     = "delete"
	expire     = "expire"
	rotate     = "rotate"
	create     = "create"
	renew      = "renew"
	endPlan    = "expire-plan"
	downgrade  = "downgrade"
	closeTier  = "tier-loses-api"
	openTier   = "tier-gets-api"
)

// done is how the page says that a change was made.
var done = map[string]string{
	deactivate: "key deactivated", activate: "key activated", remove: "key deleted", expire: "key expired", rotate: "key rotated",
	create: "key created", renew: "plan renewed", endPlan: "plan expired", downgrade: "plan downgraded",
	closeTier: "tier without the API", openTier: "tier with the API",
}

// overlap is how long the old key works after "rotate".
const overlap = 5 * time.Second

var errNoAction = errors.New("there is no such change")

// openStore opens the store that config asks for, and puts the rows in it.
func openStore(ctx context.Context, config Config, rows []*row, s *setting) (store, error) {
	s.MaxStaleness = 5 * time.Second
	s.RealFeed = true
	switch {
	case config.Postgres != nil:
		s.Store = "PostgreSQL, at --database-url"
		s.Psql = fmt.Sprintf("psql -h %s -p %d -U %s %s", config.Postgres.ConnConfig.Host, config.Postgres.ConnConfig.Port,
			config.Postgres.ConnConfig.User, config.Postgres.ConnConfig.Database)
		return openPostgres(ctx, config.Postgres, rows, nil)
	case !config.InMemory:
		server, url, err := localserver.StartPostgres()
		if err == nil {
			s.Store = "PostgreSQL, a temporary server that the demo has started"
			s.Psql = "psql '" + url + "'"
			return openTemporary(ctx, server, url, rows)
		}
		s.Simulated = append(s.Simulated, "PostgreSQL: keys and plans are in memory, since no server could be started ("+err.Error()+"). --database-url uses one that runs.")
	default:
		s.Simulated = append(s.Simulated, "PostgreSQL: keys and plans are in memory, as --in-memory says.")
	}
	// Nothing announces changes, so that they are noticed by reading again.
	s.Store, s.RealFeed, s.MaxStaleness = "memory", false, time.Second
	s.Simulated = append(s.Simulated, fmt.Sprintf("Announcements: there are none without PostgreSQL. A change takes effect when facts are read again, after up to %v (MaxStaleness). With PostgreSQL it takes milliseconds.", s.MaxStaleness))
	return openMemory(rows), nil
}

// memory is a store without a server. Faults of the database are injected.
type memory struct {
	mu   sync.Mutex
	held facts
	n    int // keys so far
}

func openMemory(rows []*row) *memory {
	m := &memory{held: facts{map[apikey.KeyHash]apikey.Key{}, map[string]apikey.Plan{}}}
	for _, r := range rows {
		m.add(r, r.key)
		if r.plan != nil {
			m.held.plans[r.orgID] = *r.plan
		}
	}
	return m
}

// add adds the key of a row.
func (m *memory) add(r *row, key apikey.Key) {
	m.n++
	r.keyID = fmt.Sprintf("demo-key-%d", m.n)
	key.ID, key.OrgID = r.keyID, r.orgID
	m.held.keys[r.hash] = key
}

// read reads one fact, as far as the link to the database allows.
func read[S comparable, V any](ctx context.Context, m *memory, database *link, held map[S]V, subject S) (v V, err error) {
	switch database.present() {
	case faultproxy.Down:
		return v, errors.New("the demo has broken the database")
	case faultproxy.Slow:
		select {
		case <-time.After(faultproxy.SlowBy):
		case <-ctx.Done():
			return v, ctx.Err()
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	v, found := held[subject]
	if !found {
		return v, apikey.ErrNotFound
	}
	return v, nil
}

func (m *memory) open(_ context.Context, l *links) (replicaStores, error) {
	return replicaStores{
		keys: apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
			return read(ctx, m, l.database, m.held.keys, h)
		}),
		plans: apikey.PlanStoreFunc(func(ctx context.Context, orgID string) (apikey.Plan, error) {
			return read(ctx, m, l.database, m.held.plans, orgID)
		}),
		close: func() {},
	}, nil
}

func (m *memory) facts(context.Context, []*row) (facts, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return facts{maps.Clone(m.held.keys), maps.Clone(m.held.plans)}, nil
}

func (m *memory) change(_ context.Context, action string, r *row) (created *row, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key, there := m.held.keys[r.hash]
	switch action {
	case deactivate, activate, remove, expire, rotate:
		if !there {
			return nil, errDeleted
		}
	}
	switch action {
	case deactivate:
		key.Active = false
	case activate:
		key.Active, key.ExpiresAt = true, time.Time{}
	case expire:
		key.ExpiresAt = time.Now()
	case rotate:
		key.ExpiresAt = time.Now().Add(overlap)
	case renew:
		m.held.plans[r.orgID] = apikey.Plan{Name: starter, Status: apikey.PlanActive, APIAccess: m.includesAPI()}
	case endPlan:
		m.held.plans[r.orgID] = apikey.Plan{Name: starter, Status: apikey.PlanExpired, APIAccess: m.includesAPI()}
	case downgrade:
		m.held.plans[r.orgID] = apikey.Plan{Name: basic, Status: apikey.PlanActive}
	case closeTier, openTier:
		for orgID, plan := range m.held.plans {
			if plan.Name == starter {
				plan.APIAccess = action == openTier
				m.held.plans[orgID] = plan
			}
		}
	case remove, create:
	default:
		return nil, errNoAction
	}
	if there {
		m.held.keys[r.hash] = key
	}
	if action == remove {
		delete(m.held.keys, r.hash)
	}
	if action == rotate || action == create {
		created = newRow(r.orgID, "", keyformat.New(keyformat.Test))
		m.add(created, apikey.Key{Active: true})
	}
	return created, nil
}

// includesAPI reports whether the tier starter includes the API at present. The caller holds
// the lock.
func (m *memory) includesAPI() bool {
	for _, plan := range m.held.plans {
		if plan.Name == starter {
			return plan.APIAccess
		}
	}
	return true
}

func (m *memory) close() error { return nil }

var errDeleted = errors.New("this key has been deleted: create a new one")

// newRow returns a row for a new key.
func newRow(orgID, keyID, apiKey string) *row {
	return &row{about: "created on this page", apiKey: apiKey, hash: apikey.HashKey(apiKey), keyID: keyID, orgID: orgID}
}
