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
// The middleware asks three questions of each request, in this order. Does the
// Authorization header hold a key? Is the key live? Does the plan of its organisation
// include the API? Handlers behind the middleware get the organisation from
// [OrgFromContext].
//
// Stores return facts: a [Key], a [Plan], or [ErrNotFound]. The middleware decides, for
// each request and by the clock. If a store cannot be read, the answer is [ErrUnavailable]
// with status 503, and never a refusal.
//
// A [Cache] between the middleware and its stores keeps facts in the process and in Redis,
// each with the time and the PostgreSQL snapshot that it was read in. A fact that is older
// than a change is read again. The triggers of the migrations announce every change, and
// [Cache.Watch] listens, so that a plain UPDATE takes effect on every replica within about
// 20 milliseconds.
//
// Package admin creates keys and manages keys and plans. Package apikeyclient is for
// clients of the API, and package apikeytest for tests.
package apikey

// The path of a request: header -> key -> plan -> organisation in the context, or a
// refusal. The facts come from keystore.go, planstore.go and cache.go; envelope.go writes
// refusals.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/bearer"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/readthrough"
)

// An Org is an authenticated organisation, with the key of the request and the plan.
type Org struct {
	ID    string
	KeyID string
	Plan  Plan
}

// A Source is the place where the facts of a decision were found.
type Source string

// The sources, from near to far.
const (
	SourceMemory = Source(readthrough.Memory) // this process
	SourceRedis  = Source(readthrough.Redis)
	SourceStore  = Source(readthrough.Database) // PostgreSQL, or a store of your own
	SourceStale  = Source(readthrough.Stale)    // memory or Redis: out of date, but the store could not be read
)

// farther returns the farther of two sources.
func farther(a, b Source) Source {
	for _, s := range []Source{SourceStale, SourceStore, SourceRedis, SourceMemory} {
		if a == s || b == s {
			return s
		}
	}
	return ""
}

// CodeCanceled is the Code of a [Decision] if the client hung up before the key could be
// looked up, so that such clients do not look like an outage. It is never sent.
const CodeCanceled = "CANCELED"

// A Decision is the outcome of one request.
type Decision struct {
	Code     string        // "" if admitted, else the Code of the refusal, or CodeCanceled
	Err      error         // nil if admitted, else the refusal; ErrUnavailable wraps its cause
	OrgID    string        // "" unless a key was found
	KeyID    string        // "" unless a key was found
	Source   Source        // of the key or the plan, whichever was farther; "" if neither was looked up
	Duration time.Duration // how long the decision took
}

// Options are the optional parts of a [Middleware].
type Options struct {
	// Cache keeps what the stores return. All Middlewares with the same Cache share its
	// records, so their stores must hold the same keys and plans. The Cache reads many keys
	// at once from a [BatchKeyStore], and many plans from a [BatchPlanStore]. If both stores
	// are the Postgres stores of this package, on the same DB, one statement reads a key
	// and its plan. Defaults to nil: every request reads from the stores.
	Cache *Cache

	// Realm is the realm of the WWW-Authenticate challenge: printable ASCII
	// without quote and backslash. Defaults to "api".
	Realm string

	// ErrorHandler answers a refused request. The error is or wraps one of the *Error
	// values of this package. It must write a response; if it writes nothing, net/http
	// sends status 200. Defaults to [WriteError].
	ErrorHandler func(w http.ResponseWriter, r *http.Request, err error)

	// LastUsed records when keys were last admitted. Defaults to nil: nothing is recorded.
	LastUsed *LastUsed

	// Observe is called with every decision, before the handler runs, for metrics and
	// audit logs. It must be safe for concurrent use and should be fast, since the
	// request waits for it. Defaults to nil: decisions are not observed.
	Observe func(ctx context.Context, d Decision)
}

// A Middleware admits the requests of organisations whose key is live and whose
// plan includes the API, and refuses all others. It is safe for concurrent use.
type Middleware struct {
	keys  keySource
	plans planSource
	opts  Options
}

// A keySource is where the middleware gets keys: from memory at once (recall), or from
// Redis or the store (fetch).
type keySource interface {
	// recall returns nil if memory has no record that may be used.
	recall(h KeyHash, now clock.Instant) *readthrough.Record[keyFacts]
	fetch(ctx context.Context, h KeyHash) (*readthrough.Record[keyFacts], Source, error)
}

// A planSource is the same for the plan of a key's organisation.
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
	rec, err := apart(func() (rec *readthrough.Record[keyFacts], err error) {
		rec = new(readthrough.Record[keyFacts])
		rec.Value.Key, rec.Found, err = one(s.Key)(ctx, h)
		return rec, err
	})
	return rec, SourceStore, err
}

func (uncachedPlans) recall(*keyFacts, clock.Instant) *readthrough.Record[Plan] { return nil }

func (s uncachedPlans) fetch(ctx context.Context, key *keyFacts) (*readthrough.Record[Plan], Source, error) {
	rec, err := apart(func() (rec *readthrough.Record[Plan], err error) {
		rec = new(readthrough.Record[Plan])
		rec.Value, rec.Found, err = one(s.Plan)(ctx, key.OrgID)
		return rec, err
	})
	return rec, SourceStore, err
}

// apart calls look on a goroutine of its own, which a store may end. If look panics, so does
// apart: without a cache that is for the server to log.
func apart[T any](look func() (T, error)) (T, error) {
	var panicked any
	value, err := batch.Run(func() (T, error) {
		defer func() { panicked = recover() }()
		return look()
	})
	if panicked != nil {
		panic(panicked)
	}
	return value, err
}

// New returns a Middleware that uses the two stores. opts may be nil. New panics if a
// store is nil or an option is invalid.
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

// Handler returns a handler that calls next for admitted requests, with the organisation
// in their context, and answers all others itself. Its method value is a
// func(http.Handler) http.Handler. Handler panics if next is nil.
//
// It authenticates every request, whatever the method and path. Wrap the router as a
// whole: many routers answer 404 and 405 without calling the middleware that is mounted
// inside them. Put CORS outside, since a preflight request carries no key.
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

// Authenticate decides on r and does not answer it. If r is refused, the Org is zero and
// the error is or wraps one of the *Error values of this package:
//
//   - [ErrAuthorizationHeaderMissing]: there is no Authorization header. A key in another
//     header, the query, a cookie or the body does not count.
//   - [ErrInvalidAPIKeySchema]: the scheme is not Bearer.
//   - [ErrAPIKeyMissing]: nothing follows Bearer.
//   - [ErrInvalidAPIKey]: the header is repeated, or the key is not a token68 of at most
//     512 bytes, or is unknown, deactivated, deleted or expired.
//   - [ErrPlanExpired]: the key is live, and the plan does not pass [Plan.AllowsAPI].
//   - [ErrUnavailable]: a store could not be read. It wraps the cause.
func (m *Middleware) Authenticate(r *http.Request) (Org, error) {
	return m.AuthenticateHeader(r.Context(), r.Header["Authorization"])
}

// AuthenticateHeader is like [Middleware.Authenticate] for requests without an
// *http.Request, such as those of gRPC. values are those of the Authorization header.
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

// decide returns the organisation as soon as it is known, even if the request is refused,
// and the source of the facts. It reads the clock once for everything in memory: reading
// the clock costs as much as the rest.
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
		// Only now: a key in memory has passed this check before.
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

// OrgFromContext returns the organisation of an authenticated request, and whether ctx has
// one. ctx may be nil.
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

// ContextWithOrg returns a copy of ctx in which [OrgFromContext] finds org. It is for tests
// of handlers. If ctx is nil, [context.Background] is used.
func ContextWithOrg(ctx context.Context, org Org) context.Context {
	if ctx == nil {
		ctx = context.Background()
	}
	return &orgContext{ctx, org}
}
