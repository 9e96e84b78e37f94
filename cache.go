package apikey

// The read-through cache: memory -> Redis -> store, as users see it. How a lookup
// goes and when its answer may be used is internal/readthrough; what has changed is
// internal/feed; what is in Redis is internal/shared.

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"reflect"
	"regexp"
	"slices"
	"sync/atomic"
	"time"
	"unique"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/lastused"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/shared"
)

const (
	minSecretLen = 32
	minStaleness = 100 * time.Millisecond
	absentKeys   = 1024 // held, so that a flood of made-up keys takes no memory
	redisKeyRoot = "apikey:3:"

	// A refusal needs better facts than an admission: a customer who has just paid
	// tries again at once.
	refusalStaleness = time.Second
)

// CacheOptions are the optional parts of a [Cache].
type CacheOptions struct {
	// MaxStaleness bounds how long a change can go unnoticed when its announcement
	// cannot be received: the age up to which facts then admit a request without
	// being read again. Facts that refuse one are read again after one second
	// already. At least 100 ms. Defaults to 10 s.
	MaxStaleness time.Duration

	// RefreshAfter is the age at which facts are read again although no change of
	// them was announced, and so bounds how long a change goes unnoticed that no
	// trigger announces. At least MaxStaleness. Defaults to 5 min, or MaxStaleness if
	// that is more.
	RefreshAfter time.Duration

	// StaleIfError is the age up to which facts still admit a request while the store
	// cannot be read (RFC 5861, section 4), unless a change of them was announced.
	// Such facts never refuse: what they would refuse is [ErrUnavailable]. It is also
	// the time to live of records in Redis. At least MaxStaleness. Defaults to 15 min,
	// or RefreshAfter if that is more.
	StaleIfError time.Duration

	// Namespace is part of the names of the records in Redis, which begin with
	// apikey:3: and the namespace. Caches share records if their namespaces and their
	// secrets are the same. Records of [PostgresKeyStore] and [PostgresPlanStore] also tell
	// which database, and which tables there, they are of; of other stores two that hold
	// different keys or plans must not share. Up to 64 of the characters A-Z a-z 0-9 - _ .
	// Defaults to none.
	Namespace string

	// AcceptedSecrets are more secrets that records in Redis may be sealed under, so that
	// the secret can be changed without emptying the cache: let all replicas accept the
	// new one, then use it and accept the old one, and drop that after StaleIfError. At
	// least 32 bytes each. Defaults to none.
	AcceptedSecrets [][]byte

	// MemoryEntries is the number of keys that are held in the process, each with its
	// plan. A key takes about 430 bytes, from its first use on; when there are too
	// many, one goes that was not used lately. Negative turns the layer off. Defaults
	// to 131,072.
	MemoryEntries int

	// RedisTimeout is the time that Redis has to answer; then the store is asked.
	// Defaults to 50 ms.
	RedisTimeout time.Duration

	// StoreTimeout is the time that a request waits for the store, in the queue and
	// for the answer; then it is [ErrUnavailable]. Defaults to 500 ms.
	StoreTimeout time.Duration

	// MaxBatches is the number of batches of lookups that a store is asked for at
	// once, and so of the connections that they take; further lookups wait, and go out
	// together. A store that cannot batch is asked for four times as many keys at once.
	// Redis is asked for as many batches. Defaults to 4.
	MaxBatches int

	// MaxBatchSize is the number of subjects in one batch. Defaults to 256.
	MaxBatchSize int

	// MaxQueue is the number of lookups that may wait for each store: one half are
	// for subjects that are known to exist, one half for others. A lookup that finds
	// its half full is [ErrUnavailable] at once. Defaults to 8192.
	MaxQueue int

	// Logger is told when announcements are not heard and when they are again, and when
	// Redis or a store is not asked for a while since it fails, and when it is again.
	// Defaults to none.
	Logger *slog.Logger
}

// withDefaults returns o with defaults for what is zero; o may be nil.
func (o *CacheOptions) withDefaults() CacheOptions {
	var r CacheOptions
	if o != nil {
		r = *o
	}
	r.MaxStaleness = cmp.Or(r.MaxStaleness, 10*time.Second)
	r.RefreshAfter = cmp.Or(r.RefreshAfter, max(5*time.Minute, r.MaxStaleness))
	r.StaleIfError = cmp.Or(r.StaleIfError, max(15*time.Minute, r.RefreshAfter))
	r.MemoryEntries = cmp.Or(r.MemoryEntries, 131_072)
	r.RedisTimeout = cmp.Or(r.RedisTimeout, 50*time.Millisecond)
	r.StoreTimeout = cmp.Or(r.StoreTimeout, 500*time.Millisecond)
	r.MaxBatches = cmp.Or(r.MaxBatches, 4)
	r.MaxBatchSize = cmp.Or(r.MaxBatchSize, 256)
	r.MaxQueue = cmp.Or(r.MaxQueue, 8192)
	r.Logger = cmp.Or(r.Logger, slog.New(slog.DiscardHandler))
	return r
}

var namespaceForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// check returns what is wrong with o, "" if nothing is.
func (o CacheOptions) check() string {
	switch {
	case o.MaxStaleness < minStaleness:
		return fmt.Sprintf("MaxStaleness is %v: use at least %v", o.MaxStaleness, minStaleness)
	case o.RefreshAfter < o.MaxStaleness:
		return fmt.Sprintf("RefreshAfter is %v: use at least MaxStaleness, %v", o.RefreshAfter, o.MaxStaleness)
	case o.StaleIfError < o.MaxStaleness:
		return fmt.Sprintf("StaleIfError is %v: use at least MaxStaleness, %v", o.StaleIfError, o.MaxStaleness)
	case !namespaceForm.MatchString(o.Namespace):
		return fmt.Sprintf("Namespace is %q: use up to 64 of the characters A-Z a-z 0-9 - _ .", o.Namespace)
	case slices.ContainsFunc(o.AcceptedSecrets, func(s []byte) bool { return len(s) < minSecretLen }):
		return fmt.Sprintf("AcceptedSecrets has one of less than %d bytes: use those that NewCache is given elsewhere", minSecretLen)
	case o.RedisTimeout < time.Millisecond:
		return fmt.Sprintf("RedisTimeout is %v: use at least 1ms", o.RedisTimeout)
	case o.StoreTimeout < time.Millisecond:
		return fmt.Sprintf("StoreTimeout is %v: use at least 1ms", o.StoreTimeout)
	case o.MaxBatches < 1:
		return fmt.Sprintf("MaxBatches is %d: use at least 1", o.MaxBatches)
	case o.MaxBatchSize < 1:
		return fmt.Sprintf("MaxBatchSize is %d: use at least 1", o.MaxBatchSize)
	case o.MaxQueue < 2:
		return fmt.Sprintf("MaxQueue is %d: use at least 2", o.MaxQueue)
	}
	return ""
}

// CacheStats counts what a [Cache] has done since it was made. Memory hits are
// not among it: a counter that all cores share would cost more than the hit.
type CacheStats struct {
	RedisHits      uint64 // answered by a record in Redis
	RedisMisses    uint64 // no record in Redis that may be used, or none could be had
	RedisRejected  uint64 // of the misses: the value was not sealed by us for its name
	RedisErrors    uint64 // GET or SET failed or took longer than RedisTimeout
	RedisSkipped   uint64 // GET or SET not sent, since Redis had failed several times in a row, or too many SETs waited
	RedisGets      uint64 // GETs that were sent
	RedisBatches   uint64 // round trips that they took
	StoreReads     uint64 // subjects that stores were asked for
	StoreBatches   uint64 // round trips that they took
	StoreErrors    uint64 // lookups that failed, or took longer than StoreTimeout
	StoreSkipped   uint64 // lookups not made, since the store had failed several times in a row
	QueueFull      uint64 // lookups not made, since MaxQueue others waited: for the store, or of Redis, which then counts as a miss
	QueueTimeouts  uint64 // lookups that waited for longer than their timeout while others were answered
	StoreBusy      uint64 // lookups for which all connections of the pool were in use
	StoreAbandoned uint64 // lookups under way in stores that have not returned although their time is over
	StaleUses      uint64 // admitted on facts past their time, since the store could not be read

	RedisErr error // why Redis did not answer when it was last asked; nil if it did

	StandbyReads uint64 // of the StoreReads, those that a standby answered: these facts are used by their age only

	FeedLive      bool   // announcements are known to arrive; false until Watch is under way
	FeedErr       error  // why the last session of Watch ended, or none began; nil if none was tried
	Announcements uint64 // changes that were announced
	Unannounced   uint64 // changes that were found when facts were read again, and had not been: look at the triggers
	Forged        uint64 // announcements of transactions that the server had not reached: somebody makes them up
}

// A Cache remembers what the stores behind it answered, in this process and in
// Redis. It is safe for concurrent use.
//
// Redis is not trusted and cannot fail a request: what is slow, missing or not
// sealed under the secret is a miss. Absent keys and plans are held in the
// process only, and errors nowhere.
//
// What is not in memory is looked up in batches that load makes larger. A lookup
// sees none of the values of a request's context, since it may serve many requests.
type Cache struct {
	shared   readthrough.Shared
	rdb      redis.UniversalClient
	watching atomic.Bool
	keys     *readthrough.Layer[KeyHash, keyFacts]
	plans    *readthrough.Layer[string, Plan]
}

// keyFacts are what the cache knows of a key: the key, when its use was last
// recorded, and the record of its organisation's plan, so that a request finds both
// by one look. The plan's record goes its own way: it is judged by itself, and
// replaced when it is read again.
type keyFacts struct {
	Key
	plan atomic.Pointer[readthrough.Record[Plan]] // nil: not known
	used lastused.Mark
}

// NewCache returns a Cache on rdb, which stays the caller's to close. All replicas
// share one secret of at least 32 random bytes; a new one empties the cache, unless it
// is changed as AcceptedSecrets has it. The client must have ContextTimeoutEnabled set. opts may be nil. It panics where
// one of these is not so.
//
// The age of a record that another replica read is told by the clocks of both
// machines, so they should be kept in step (NTP).
func NewCache(rdb redis.UniversalClient, secret []byte, opts *CacheOptions) *Cache {
	o := opts.withDefaults()
	switch {
	case pg.IsNil(rdb):
		panic("apikey: NewCache: rdb is nil: pass a Redis client")
	case !honoursContext(rdb):
		panic("apikey: NewCache: set ContextTimeoutEnabled: true in the options of the Redis client; " +
			"without it the client ignores deadlines, and a frozen Redis holds up requests for seconds")
	case len(secret) < minSecretLen:
		panic(fmt.Sprintf("apikey: NewCache: the secret has %d bytes: use at least %d random ones", len(secret), minSecretLen))
	}
	if fault := o.check(); fault != "" {
		panic("apikey: NewCache: CacheOptions." + fault)
	}

	limits := func(timeout time.Duration) batch.Limits {
		return batch.Limits{AtOnce: o.MaxBatches, Size: o.MaxBatchSize, Queue: o.MaxQueue / 2, Budget: timeout}
	}
	c := &Cache{rdb: rdb}
	c.shared.Log = feed.NewLog(o.MaxStaleness, o.StaleIfError, o.Logger)
	c.shared.Redis = shared.New(rdb, sealed.NewSealer(secret, o.AcceptedSecrets...), limits(o.RedisTimeout), o.StaleIfError, o.Logger)
	c.shared.Batches = limits(o.StoreTimeout)
	c.shared.Logger = o.Logger
	c.shared.Limits = readthrough.Limits{
		MaxRefusalStaleness: min(o.MaxStaleness, refusalStaleness), MaxStaleness: o.MaxStaleness,
		RefreshAfter: o.RefreshAfter, StaleIfError: o.StaleIfError,
	}

	root := redisKeyRoot
	if o.Namespace != "" {
		root += o.Namespace + ":"
	}
	seed := maphash.MakeSeed()
	c.plans = readthrough.NewLayer(&c.shared, readthrough.Kind[string, Plan]{
		Name: func(orgID string) string { return root + "plan:" + orgID },
		Hash: func(orgID string) uint64 { return maphash.String(seed, orgID) },
		Topics: func(orgID string, p *Plan) (feed.Topic, feed.Topic) {
			return feed.PlanTopic(orgID), feed.TierTopic(p.Name)
		},
		Admits: func(p *Plan, now time.Time) bool { return p.AllowsAPI(now) },
		Same:   func(a, b *Plan) bool { return a.equal(*b) },
		Append: func(b []byte, p *Plan) []byte { return appendPlan(b, *p) },
		Decode: func(d *sealed.Decoder, rec *readthrough.Record[Plan]) { rec.Value = decodePlan(d) },
	}, o.MemoryEntries, o.MemoryEntries)
	keyID := func(h KeyHash) uint64 { return binary.BigEndian.Uint64(h[:]) }
	c.keys = readthrough.NewLayer(&c.shared, readthrough.Kind[KeyHash, keyFacts]{
		Name: func(h KeyHash) string { return root + "key:" + hex.EncodeToString(h[:]) },
		Hash: keyID,
		Topics: func(h KeyHash, _ *keyFacts) (feed.Topic, feed.Topic) {
			t := feed.KeyTopic(keyID(h))
			return t, t
		},
		Admits: func(k *keyFacts, now time.Time) bool { return k.Live(now) },
		Same:   func(a, b *keyFacts) bool { return a.equal(b.Key) },
		Append: appendKey,
		Decode: c.decodeKey,
	}, o.MemoryEntries, absentKeys)
	return c
}

// honoursContext reports whether a deadline ends a command of rdb. A client of
// the caller's own making is taken at its word.
func honoursContext(rdb redis.UniversalClient) bool {
	switch client := rdb.(type) {
	case *redis.Client:
		return client.Options().ContextTimeoutEnabled
	case *redis.ClusterClient:
		return client.Options().ContextTimeoutEnabled
	case *redis.Ring:
		return client.Options().ContextTimeoutEnabled
	}
	return true
}

// Stats returns the counters as they are now.
func (c *Cache) Stats() CacheStats {
	r, s := c.shared.Redis.Stats(), &c.shared.Stats
	return CacheStats{
		RedisHits:      s.Hits.Load(),
		RedisMisses:    s.Misses.Load(),
		RedisRejected:  r.Rejected.Load(),
		RedisErrors:    r.Errors.Load(),
		RedisSkipped:   r.Skipped.Load(),
		RedisGets:      r.Gets.Load(),
		RedisBatches:   r.Batches.Load(),
		StoreReads:     s.Reads.Load(),
		StoreBatches:   s.Batches.Load(),
		StoreErrors:    s.Errors.Load(),
		StoreSkipped:   s.Skipped.Load(),
		StoreBusy:      s.Busy.Load(),
		StoreAbandoned: uint64(s.Abandoned.Load()),
		QueueFull:      s.Queue.Full.Load() + r.Queue.Full.Load(),
		QueueTimeouts:  s.Queue.Waited.Load() + r.Queue.Waited.Load(),
		RedisErr:       c.shared.Redis.Fault(),
		StandbyReads:   s.Standby.Load(),
		StaleUses:      s.StaleUses.Load(),
		FeedLive:       c.shared.Log.Live(clock.At(time.Now())),
		FeedErr:        c.shared.Log.Fault(),
		Announcements:  c.shared.Log.Announcements(),
		Unannounced:    c.shared.Log.Unannounced(),
		Forged:         c.shared.Log.Forged(),
	}
}

// Watch follows the changes that the triggers of the migrations announce, until
// ctx ends; then it returns nil. While it does, a change takes effect as soon as
// it is announced, and facts are used for up to RefreshAfter. Otherwise, and
// while it cannot, MaxStaleness is the bound. Faults do not end it: it tries
// again, and [Cache.Stats] tells.
//
// The pool must lead to the server that the stores read from, the primary, and not
// through a pooler such as PgBouncer. One connection more is made as those of the pool
// are, without its hooks but for BeforeConnect, and listens; now and then the pool is
// asked which server it leads to. It is an error to watch twice at a time.
func (c *Cache) Watch(ctx context.Context, pool *pgxpool.Pool) error {
	if pool == nil {
		return errors.New("apikey: Cache.Watch: pool is nil: pass the pool that the stores read from")
	}
	if !c.watching.CompareAndSwap(false, true) {
		return errors.New("apikey: Cache.Watch: this Cache is being watched already")
	}
	defer c.watching.Store(false)
	feed.Follow(ctx, pool, c.shared.Log)
	return nil
}

// A CachedRecord is what Redis holds of a key or a plan, for people to look at.
type CachedRecord[V Key | Plan] struct {
	Name     string    // in Redis
	Found    bool      // false: Redis holds none, and all below is zero
	Rejected bool      // it is not sealed by us for its name, and all below is zero
	Value    V         // what it says
	ReadAt   time.Time // when the store was read
	Snapshot string    // the pg_snapshot that it was read in; "" if the store does not stamp
	Plan     *Plan     // of a key: its organisation's plan, if the record has that too; else nil
}

// InspectKey returns the record of a key in Redis, whatever it is worth; the error
// is that Redis could not be read.
func (c *Cache) InspectKey(_ context.Context, h KeyHash) (CachedRecord[Key], error) {
	name, rec, err := c.keys.Inspect(h)
	r, err := inspected(name, rec, err, func(k *keyFacts) Key { return k.Key })
	if rec != nil {
		if plan := rec.Value.plan.Load(); plan != nil {
			r.Plan = &plan.Value
		}
	}
	return r, err
}

// InspectPlan returns the record of an organisation's plan in Redis, as
// [Cache.InspectKey] does.
func (c *Cache) InspectPlan(_ context.Context, orgID string) (CachedRecord[Plan], error) {
	name, rec, err := c.plans.Inspect(orgID)
	return inspected(name, rec, err, func(p *Plan) Plan { return *p })
}

func inspected[F any, V Key | Plan](name string, rec *readthrough.Record[F], err error, value func(*F) V) (CachedRecord[V], error) {
	r := CachedRecord[V]{Name: name}
	switch {
	case errors.Is(err, shared.ErrRejected):
		r.Found, r.Rejected = true, true
	case err != nil:
		return r, fmt.Errorf("apikey: reading %s from Redis: %w", name, err)
	case rec != nil:
		r.Found, r.Value = true, value(&rec.Value)
		r.ReadAt, r.Snapshot = rec.ReadAt.Time(), rec.Snapshot.String()
	}
	return r, nil
}

// Keys returns next behind the cache. All key stores behind one Cache share its
// records, so they must hold the same keys. A [BatchKeyStore] is asked for many keys
// at once. It panics if next is nil.
func (c *Cache) Keys(next KeyStore) KeyStore {
	if pg.IsNil(next) {
		panic("apikey: Cache.Keys: next is nil: pass the KeyStore to read through to")
	}
	return cachedKeys{c, next, readthrough.NewStore(c.keys, keyReader(next))}
}

// Plans returns next behind the cache. All plan stores behind one Cache share its
// records, so they must hold the same plans. A [BatchPlanStore] is asked for many
// plans at once. It panics if next is nil.
func (c *Cache) Plans(next PlanStore) PlanStore {
	if pg.IsNil(next) {
		panic("apikey: Cache.Plans: next is nil: pass the PlanStore to read through to")
	}
	return cachedPlans{cache: c, next: next, store: readthrough.NewStore(c.plans, planReader(next))}
}

// cachedKeys is a key store behind a cache.
type cachedKeys struct {
	cache *Cache
	next  KeyStore
	store *readthrough.Store[KeyHash, keyFacts]
}

// Key implements [KeyStore].
func (k cachedKeys) Key(ctx context.Context, h KeyHash) (Key, error) {
	rec, err := answer(ctx, k.cache.keys, h, k.store)
	if err != nil {
		return Key{}, err
	}
	return rec.Value.Key, nil
}

func (k cachedKeys) recall(h KeyHash, now clock.Instant) *readthrough.Record[keyFacts] {
	return k.cache.keys.Recall(h, now)
}

func (k cachedKeys) fetch(ctx context.Context, h KeyHash) (*readthrough.Record[keyFacts], Source, error) {
	rec, source, err := k.cache.keys.Fetch(ctx, h, nil, k.store)
	return rec, Source(source), err
}

// joined returns k, but so that a lookup of a key reads the plan of its organisation
// too, if the plan store behind p reads the same database. All others are asked
// separately: a plan never comes from tables that they do not read.
func (k cachedKeys) joined(p cachedPlans) cachedKeys {
	keys, ok1 := k.next.(*PostgresKeyStore)
	plans, ok2 := p.next.(*PostgresPlanStore)
	if ok1 && ok2 && sameDB(keys.db.DB, plans.db.DB) {
		k.store = readthrough.NewStore(k.cache.keys, k.cache.joinedReader(keys))
	}
	return k
}

func sameDB(a, b DB) bool {
	return reflect.TypeOf(a) == reflect.TypeOf(b) && reflect.TypeOf(a).Comparable() && a == b
}

// cachedPlans is a plan store behind a cache.
type cachedPlans struct {
	cache *Cache
	next  PlanStore
	store *readthrough.Store[string, Plan]

	linked bool // keys come from the same cache, and their records lead to those of plans
}

// Plan implements [PlanStore].
func (p cachedPlans) Plan(ctx context.Context, orgID string) (Plan, error) {
	rec, err := answer(ctx, p.cache.plans, orgID, p.store)
	if err != nil {
		return Plan{}, err
	}
	return rec.Value, nil
}

func (p cachedPlans) recall(key *keyFacts, now clock.Instant) *readthrough.Record[Plan] {
	plans := p.cache.plans
	if !p.linked {
		return plans.Recall(key.OrgID, now)
	}
	if rec := key.plan.Load(); rec != nil && plans.Usable(key.OrgID, rec, now) {
		return rec
	}
	rec := plans.Recall(key.OrgID, now) // another key of the organisation may have read it again
	if rec != nil {
		key.plan.Store(rec)
	}
	return rec
}

func (p cachedPlans) fetch(ctx context.Context, key *keyFacts) (*readthrough.Record[Plan], Source, error) {
	var known *readthrough.Record[Plan]
	if p.linked {
		known = key.plan.Load()
	}
	rec, source, err := p.cache.plans.Fetch(ctx, key.OrgID, known, p.store)
	if err == nil && p.linked {
		key.plan.Store(rec)
	}
	return rec, Source(source), err
}

// answer answers as a store does.
func answer[S comparable, V any](ctx context.Context, l *readthrough.Layer[S, V], subject S, store *readthrough.Store[S, V]) (*readthrough.Record[V], error) {
	rec := l.Recall(subject, clock.At(time.Now()))
	if rec == nil {
		var err error
		if rec, _, err = l.Fetch(ctx, subject, nil, store); err != nil {
			return nil, err
		}
	}
	if !rec.Found {
		return nil, ErrNotFound
	}
	return rec, nil
}

// keyReader reads keys, and no plans.
func keyReader(next KeyStore) readthrough.Reader[KeyHash, keyFacts, Key] {
	r := readthrough.Reader[KeyHash, keyFacts, Key]{
		Name:  "keys",
		One:   one(next.Key),
		Fill:  func(rec *readthrough.Record[keyFacts], k Key) { rec.Value.Key = compactKey(k) },
		Adopt: func(rec *readthrough.Record[keyFacts]) { rec.Value.plan.Store(nil) }, // it may be from other tables
	}
	if batch, ok := next.(BatchKeyStore); ok {
		r.Many = batch.Keys
	}
	_, r.Trusted = next.(*PostgresKeyStore)
	return r
}

// joinedReader reads keys and their plans.
func (c *Cache) joinedReader(next *PostgresKeyStore) readthrough.Reader[KeyHash, keyFacts, keyAndPlan] {
	return readthrough.Reader[KeyHash, keyFacts, keyAndPlan]{
		Name: "keys",
		Many: next.keysAndPlans,
		Fill: func(rec *readthrough.Record[keyFacts], f keyAndPlan) {
			rec.Value.Key = compactKey(f.key)
			plan := c.plans.NewRecord(f.key.OrgID, rec.Stamp)
			if f.plan != nil {
				plan.Found, plan.Value = true, compactPlan(*f.plan)
			}
			rec.Value.plan.Store(plan)
		},
		Trusted: true,
	}
}

func planReader(next PlanStore) readthrough.Reader[string, Plan, Plan] {
	r := readthrough.Reader[string, Plan, Plan]{
		Name: "plans",
		One:  one(next.Plan),
		Fill: func(rec *readthrough.Record[Plan], p Plan) { rec.Value = compactPlan(p) },
	}
	if batch, ok := next.(BatchPlanStore); ok {
		r.Many = batch.Plans
	}
	_, r.Trusted = next.(*PostgresPlanStore)
	return r
}

// one is the method of a store, with ErrNotFound as a value.
func one[S, F any](look func(context.Context, S) (F, error)) func(context.Context, S) (F, bool, error) {
	return func(ctx context.Context, subject S) (F, bool, error) {
		fact, err := look(ctx, subject)
		if errors.Is(err, ErrNotFound) {
			return fact, false, nil
		}
		return fact, err == nil, err
	}
}

// compactKey returns k in less memory.
func compactKey(k Key) Key {
	ids := k.ID + k.OrgID // one allocation for both
	k.ID, k.OrgID = ids[:len(k.ID)], ids[len(k.ID):]
	return k
}

// compactPlan returns p in less memory: there are few tiers and statuses.
func compactPlan(p Plan) Plan {
	p.Name = unique.Make(p.Name).Value()
	if i := slices.Index(planStatuses, p.Status); i >= 0 {
		p.Status = planStatuses[i]
	}
	return p
}

// The form of keys and plans in Redis. A key's record holds the facts of its plan if
// they were read together and there is a plan.

func appendKey(b []byte, k *keyFacts) []byte {
	b = sealed.AppendString(b, k.ID)
	b = sealed.AppendString(b, k.OrgID)
	b = sealed.AppendBool(b, k.Active)
	b = sealed.AppendTime(b, k.ExpiresAt)
	plan := k.plan.Load()
	if plan == nil || !plan.Found {
		return sealed.AppendBool(b, false)
	}
	return appendPlan(sealed.AppendBool(b, true), plan.Value)
}

func (c *Cache) decodeKey(d *sealed.Decoder, rec *readthrough.Record[keyFacts]) {
	rec.Value.Key = compactKey(Key{ID: d.String(), OrgID: d.String(), Active: d.Bool(), ExpiresAt: d.Time()})
	if d.Bool() {
		plan := c.plans.NewRecord(rec.Value.OrgID, rec.Stamp)
		plan.Found, plan.Value = true, decodePlan(d)
		rec.Value.plan.Store(plan)
	}
}

func appendPlan(b []byte, p Plan) []byte {
	b = sealed.AppendString(b, p.Name)
	b = sealed.AppendString(b, string(p.Status))
	b = sealed.AppendBool(b, p.APIAccess)
	return sealed.AppendTime(b, p.EndsAt)
}

func decodePlan(d *sealed.Decoder) Plan {
	return compactPlan(Plan{Name: d.String(), Status: PlanStatus(d.String()), APIAccess: d.Bool(), EndsAt: d.Time()})
}
