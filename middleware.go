// Package apikey authenticates the API keys of organisations in front of any
// net/http handler, and answers the requests that it refuses with the error
// envelope that customers program against.
//
//	keys, plans := apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool)
//	cache := apikey.NewCache(rdb, secret, nil)
//	go cache.Watch(ctx, pool)
//	auth := apikey.New(keys, plans, &apikey.Options{Cache: cache})
//	http.ListenAndServe(addr, auth.Handler(mux))
//
// A request passes three questions, in this order. Does its Authorization header
// hold a key? Is the key live? Does the plan of the organisation it belongs to
// include the API? A handler behind the middleware finds the organisation with
// [OrgFromContext].
//
// Stores answer with facts: a [Key], a [Plan], or [ErrNotFound]. The verdict is
// reached for each request, with the clock. What a store cannot find out is never
// a refusal: it is [ErrUnavailable], status 503.
//
// A [Cache] stands between the middleware and its stores. It remembers facts in
// the process and in Redis, each with the time and the Postgres snapshot it was
// read in, and judges them when they are used: a fact that a change has overtaken
// is read again. [Cache.Watch] hears of the changes, which the database announces
// itself, so a plain UPDATE takes effect on every replica within some 20 milliseconds.
//
// Keys are made and looked after by package admin, by whoever issues them.
package apikey

// The way in: header -> key -> plan -> organisation in the context, or a refusal.
// Where the facts come from is keystore.go, planstore.go and cache.go; how a
// refusal is written is envelope.go.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/trackpilots/apikey/internal/bearer"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/readthrough"
)

// An Org is an authenticated organisation: who the request is from, by which
// key, and on which plan.
type Org struct {
	ID    string
	KeyID string
	Plan  Plan
}

// A Source is where facts were found.
type Source string

// The places where facts are found, from near to far.
const (
	SourceMemory = Source(readthrough.Memory) // this process
	SourceRedis  = Source(readthrough.Redis)
	SourceStore  = Source(readthrough.Database) // PostgreSQL, or a store of your own
	SourceStale  = Source(readthrough.Stale)    // memory or Redis, past their time, since the store could not be read
)

// farther returns the farther of two places.
func farther(a, b Source) Source {
	for _, s := range []Source{SourceStale, SourceStore, SourceRedis, SourceMemory} {
		if a == s || b == s {
			return s
		}
	}
	return ""
}

// CodeCanceled is the Code of a [Decision] that the client did not wait for, so that
// clients that hang up do not look like an outage. No client is answered with it.
const CodeCanceled = "CANCELED"

// A Decision is what became of one request.
type Decision struct {
	Code     string        // "" if admitted, else the Code of the refusal, or CodeCanceled
	Err      error         // nil if admitted, else the refusal, with its cause if it was ErrUnavailable
	OrgID    string        // "" unless a key was found
	KeyID    string        // "" unless a key was found
	Source   Source        // where the facts were found, the farther place if two; "" if none were
	Duration time.Duration // how long the decision took
}

// Options are the optional parts of a [Middleware].
type Options struct {
	// Cache remembers what the stores answer. All Middlewares with one Cache share its
	// records, so their stores must hold the same keys and plans. A [BatchKeyStore] or
	// [BatchPlanStore] is asked for many at once; where both stores are of this package
	// and on one DB, a key and its plan are read together. Defaults to none: the stores
	// are asked for each request.
	Cache *Cache

	// Realm is the realm of the WWW-Authenticate challenge: printable ASCII
	// without quote and backslash. Defaults to "api".
	Realm string

	// ErrorHandler answers a request that is refused. The error is or wraps one of
	// the *Error values of this package. It must write a response: one that writes
	// nothing sends status 200. Defaults to [WriteError].
	ErrorHandler func(w http.ResponseWriter, r *http.Request, err error)

	// LastUsed records when keys were last admitted. Defaults to none.
	LastUsed *LastUsed

	// Observe is called with every decision, before the handler runs, for metrics
	// and audit. It must be safe for concurrent use, and requests wait for it.
	// Defaults to none.
	Observe func(ctx context.Context, d Decision)
}

// A Middleware admits the requests of organisations whose key is live and whose
// plan includes the API, and refuses all others. It is safe for concurrent use.
type Middleware struct {
	keys  keySource
	plans planSource
	opts  Options
}

// A keySource is a key store as a request asks it: first for what costs no waiting,
// then for what does.
type keySource interface {
	// recall returns what is known here, or nil.
	recall(h KeyHash, now clock.Instant) *readthrough.Record[keyFacts]
	fetch(ctx context.Context, h KeyHash) (*readthrough.Record[keyFacts], Source, error)
}

// A planSource is the same for plans. A request has the key of the organisation.
type planSource interface {
	recall(key *keyFacts, now clock.Instant) *readthrough.Record[Plan]
	fetch(ctx context.Context, key *keyFacts) (*readthrough.Record[Plan], Source, error)
}

// uncachedKeys and uncachedPlans are stores without a cache.
type (
	uncachedKeys  struct{ KeyStore }
	uncachedPlans struct{ PlanStore }
)

func (uncachedKeys) recall(KeyHash, clock.Instant) *readthrough.Record[keyFacts] { return nil }

func (s uncachedKeys) fetch(ctx context.Context, h KeyHash) (*readthrough.Record[keyFacts], Source, error) {
	rec := new(readthrough.Record[keyFacts])
	var err error
	rec.Value.Key, rec.Found, err = one(s.Key)(ctx, h)
	return rec, SourceStore, err
}

func (uncachedPlans) recall(*keyFacts, clock.Instant) *readthrough.Record[Plan] { return nil }

func (s uncachedPlans) fetch(ctx context.Context, key *keyFacts) (*readthrough.Record[Plan], Source, error) {
	rec := new(readthrough.Record[Plan])
	var err error
	rec.Value, rec.Found, err = one(s.Plan)(ctx, key.OrgID)
	return rec, SourceStore, err
}

// New returns a Middleware on the two stores; opts may be nil. It panics on a nil
// store and on options that cannot work.
func New(keys KeyStore, plans PlanStore, opts *Options) *Middleware {
	if pg.IsNil(keys) || pg.IsNil(plans) {
		panic("apikey: New: a store is nil: pass a KeyStore and a PlanStore")
	}
	m := &Middleware{keys: uncachedKeys{keys}, plans: uncachedPlans{plans}}
	if opts != nil {
		m.opts = *opts
	}
	if m.opts.Cache != nil {
		m.keys, m.plans = m.opts.Cache.sources(keys, plans)
	}
	if m.opts.Realm == "" {
		m.opts.Realm = defaultRealm
	}
	for _, c := range []byte(m.opts.Realm) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			panic(fmt.Sprintf("apikey: New: Options.Realm %q: use printable ASCII without quote and backslash", m.opts.Realm))
		}
	}
	if m.opts.ErrorHandler == nil {
		m.opts.ErrorHandler = WriteError
	}
	return m
}

// Handler returns a handler that calls next for the requests that it admits, with
// the organisation in their context, and answers all others itself. Its method
// value is a func(http.Handler) http.Handler. It panics if next is nil.
//
// Every request is authenticated, whatever its method and path: wrap what is to
// be protected and nothing else. That means the router as a whole, since routers
// tend to answer 404 and 405 without the middleware that is mounted inside them.
// CORS belongs outside: a preflight carries no key.
func (m *Middleware) Handler(next http.Handler) http.Handler {
	if pg.IsNil(next) {
		panic("apikey: Middleware.Handler: next is nil: pass the handler to protect")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if m.opts.Realm != defaultRealm {
			r = r.WithContext(context.WithValue(r.Context(), realmKey{}, m.opts.Realm))
		}
		org, err := m.Authenticate(r)
		if err != nil {
			m.opts.ErrorHandler(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(ContextWithOrg(r.Context(), org)))
	})
}

// Authenticate decides on r without answering it. The error is nil, or is or
// wraps one of the *Error values of this package; then the Org is zero.
//
//   - No Authorization field: [ErrAuthorizationHeaderMissing]. Keys in other
//     fields, the query, cookies or the body do not count.
//   - Another scheme than Bearer, or none: [ErrInvalidAPIKeySchema].
//   - Bearer and nothing else: [ErrAPIKeyMissing].
//   - A repeated field, a key that is not one token68 of at most 512 bytes, or
//     one that is unknown, deactivated, deleted or expired: [ErrInvalidAPIKey].
//   - A live key whose plan does not pass: [ErrPlanExpired].
//   - A store could not look: [ErrUnavailable], wrapping the cause.
func (m *Middleware) Authenticate(r *http.Request) (Org, error) {
	return m.AuthenticateHeader(r.Context(), r.Header["Authorization"])
}

// AuthenticateHeader is [Middleware.Authenticate] for requests that are no *http.Request,
// such as those of gRPC. It takes the values of their Authorization header or metadata.
func (m *Middleware) AuthenticateHeader(ctx context.Context, values []string) (Org, error) {
	if m.opts.Observe == nil {
		org, _, err := m.decide(ctx, values)
		if err != nil {
			return Org{}, err
		}
		return org, nil
	}

	start := time.Now()
	org, source, err := m.decide(ctx, values)
	d := Decision{Err: err, OrgID: org.ID, KeyID: org.KeyID, Source: source, Duration: time.Since(start)}
	if e, ok := errors.AsType[*Error](err); ok {
		d.Code = e.Code
		if e.Code == ErrUnavailable.Code && errors.Is(ctx.Err(), context.Canceled) {
			d.Code = CodeCanceled
		}
		org = Org{}
	}
	m.opts.Observe(ctx, d)
	return org, err
}

// decide is Authenticate, but names the organisation as soon as it is known, and
// tells where its facts were found. It reads the clock once for all that is known
// here, since that costs as much as finding it.
func (m *Middleware) decide(ctx context.Context, values []string) (org Org, source Source, err error) {
	apiKey, fault := bearer.Key(values)
	if fault != bearer.None {
		return org, "", headerFaults[fault]
	}

	hash, now := HashKey(apiKey), time.Now()
	at := clock.At(now)
	source = SourceMemory
	key := m.keys.recall(hash, at)
	if key == nil {
		// Only now: what is known here has passed before.
		if !keyformat.Plausible(apiKey) {
			return org, "", ErrInvalidAPIKey
		}
		if key, source, err = m.keys.fetch(ctx, hash); err != nil {
			return org, source, unavailable(err)
		}
		now = time.Now()
		at = clock.At(now)
	}
	if !key.Found {
		return org, source, ErrInvalidAPIKey
	}
	facts := &key.Value
	if facts.OrgID == "" {
		return org, source, unavailable(errors.New("apikey: the KeyStore returned a key without OrgID"))
	}
	org.ID, org.KeyID = facts.OrgID, facts.ID
	if !facts.Live(now) {
		return org, source, ErrInvalidAPIKey // before the plan: a dead key learns nothing of it
	}

	plan := m.plans.recall(facts, at)
	if plan == nil {
		var from Source
		if plan, from, err = m.plans.fetch(ctx, facts); err != nil {
			return org, source, unavailable(err)
		}
		source, now = farther(source, from), time.Now()
	}
	org.Plan = plan.Value
	if !plan.Found || !org.Plan.AllowsAPI(now) {
		return org, source, ErrPlanExpired
	}
	if m.opts.LastUsed != nil {
		m.opts.LastUsed.uses.Note(&facts.used, facts.ID, now)
	}
	return org, source, nil
}

func unavailable(cause error) error { return fmt.Errorf("%w: %w", ErrUnavailable, cause) }

// headerFaults are the refusals of requests without a well-formed key.
var headerFaults = map[bearer.Fault]*Error{
	bearer.Missing: ErrAuthorizationHeaderMissing,
	bearer.Scheme:  ErrInvalidAPIKeySchema,
	bearer.NoKey:   ErrAPIKeyMissing,
	bearer.Invalid: ErrInvalidAPIKey,
}

// orgContext is a context.WithValue for the one value, in one allocation.
type orgContext struct {
	context.Context
	org Org
}

type orgKey struct{}

func (c *orgContext) Value(key any) any {
	if key == (orgKey{}) {
		return &c.org
	}
	return c.Context.Value(key)
}

// OrgFromContext returns the organisation that the request behind ctx belongs
// to, and whether there is one. It is safe with any context, nil included.
func OrgFromContext(ctx context.Context) (Org, bool) {
	if ctx == nil {
		return Org{}, false
	}
	org, ok := ctx.Value(orgKey{}).(*Org)
	if !ok {
		return Org{}, false
	}
	return *org, true
}

// ContextWithOrg returns a copy of ctx in which [OrgFromContext] finds org: for
// tests of handlers that stand behind a [Middleware]. A nil ctx counts as
// [context.Background].
func ContextWithOrg(ctx context.Context, org Org) context.Context {
	if ctx == nil {
		ctx = context.Background()
	}
	return &orgContext{ctx, org}
}
