package apikey

// The read-through cache: memory -> Redis -> store. Facts are kept with the time
// and the Postgres snapshot they were read in, and judged when they are used, by
// what has been announced since: see layer.usable. So nothing that arrives late
// or out of order can do harm, and nothing needs to be deleted.

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/sony/gobreaker/v2"
	"golang.org/x/sync/singleflight"

	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/lastused"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/table"
)

const (
	minSecretLen = 32
	minStaleness = 100 * time.Millisecond

	redisBudget  = 50 * time.Millisecond  // for one GET or SET
	storeBudget  = 500 * time.Millisecond // for one lookup
	storeSlots   = 8                      // lookups at once
	slotWait     = 100 * time.Millisecond // for one of them
	pendingSets  = 64                     // SETs at once; beyond, the record stays in memory only
	absentSlots  = 1024                   // so a flood of made-up keys takes no memory
	redisKeyRoot = "apikey:1:"

	// A refusal needs better facts than an admission: a customer who has just paid
	// tries again at once.
	refusalStaleness = time.Second

	// What fails this often in a row is not asked for a while, and then by one
	// request at a time, so that an outage does not cost every request its budget.
	// Of a Redis Cluster one shard may be down, and the others of use.
	storeBreakAfter = 3
	redisBreakAfter = 10
	breakFor        = time.Second
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

	// MemoryEntries is the number of keys, and also of plans, that are held in the
	// process. It is rounded up to a power of two; negative turns the layer off.
	// Defaults to 32,768.
	MemoryEntries int
}

// CacheStats counts what a [Cache] has done since it was made. Memory hits are
// not among it: a counter that all cores share would cost more than the hit.
type CacheStats struct {
	RedisHits     uint64 // answered by a record in Redis
	RedisMisses   uint64 // no record in Redis that may be used
	RedisRejected uint64 // of the misses: the value was not sealed by us for its name
	RedisErrors   uint64 // GET or SET failed or took over 50 ms
	RedisSkipped  uint64 // GET or SET not sent, since Redis had failed several times in a row
	StoreReads    uint64 // lookups in a store
	StoreErrors   uint64 // could not look: the lookup failed, took over 500 ms, or had to wait too long for its turn
	StoreSkipped  uint64 // lookups not made, since the store had failed several times in a row
	StaleUses     uint64 // admitted on facts past their time, since the store could not be read

	FeedLive      bool   // announcements are known to arrive; false until Watch is under way
	FeedErr       error  // why the last session of Watch ended, or none began; nil if none was tried
	Announcements uint64 // changes that were announced
	Unannounced   uint64 // changes that were found when facts were read again, and had not been: look at the triggers
}

// A Cache remembers what the stores behind it answered, in this process and in
// Redis. It is safe for concurrent use.
//
// Redis is not trusted and cannot fail a request: what is slow, missing or not
// sealed under the secret is a miss. Absent keys and plans are held in the
// process only, and errors nowhere.
type Cache struct {
	rdb                 redis.UniversalClient
	sealer              *sealed.Sealer
	log                 *feed.Log
	watching            atomic.Bool
	maxStaleness        time.Duration // of facts that admit
	maxRefusalStaleness time.Duration // of facts that refuse
	refreshAfter        time.Duration
	staleIfError        time.Duration
	redis               *gobreaker.CircuitBreaker[[]byte]
	slots, sets         chan struct{}
	keys                *layer[KeyHash, Key]
	plans               *layer[string, Plan]

	redisHits, redisMisses, redisRejected, redisErrors, redisSkipped atomic.Uint64
	storeReads, storeErrors, storeSkipped, staleUses                 atomic.Uint64
}

// NewCache returns a Cache on rdb, which stays the caller's to close. All replicas
// share one secret of at least 32 random bytes; a new one empties the cache. The
// client must have ContextTimeoutEnabled set. opts may be nil. It panics where
// one of these is not so.
//
// The age of a record that another replica read is told by the clocks of both
// machines, so they should be kept in step (NTP).
func NewCache(rdb redis.UniversalClient, secret []byte, opts *CacheOptions) *Cache {
	var o CacheOptions
	if opts != nil {
		o = *opts
	}
	if o.MaxStaleness == 0 {
		o.MaxStaleness = 10 * time.Second
	}
	if o.RefreshAfter == 0 {
		o.RefreshAfter = max(5*time.Minute, o.MaxStaleness)
	}
	if o.StaleIfError == 0 {
		o.StaleIfError = max(15*time.Minute, o.RefreshAfter)
	}
	if o.MemoryEntries == 0 {
		o.MemoryEntries = 32_768
	}
	switch {
	case isNil(rdb):
		panic("apikey: NewCache: rdb is nil: pass a Redis client")
	case !honoursContext(rdb):
		panic("apikey: NewCache: set ContextTimeoutEnabled: true in the options of the Redis client; " +
			"without it the client ignores deadlines, and a frozen Redis holds up requests for seconds")
	case len(secret) < minSecretLen:
		panic(fmt.Sprintf("apikey: NewCache: the secret has %d bytes: use at least %d random ones", len(secret), minSecretLen))
	case o.MaxStaleness < minStaleness:
		panic(fmt.Sprintf("apikey: NewCache: CacheOptions.MaxStaleness is %v: use at least %v", o.MaxStaleness, minStaleness))
	case o.RefreshAfter < o.MaxStaleness:
		panic(fmt.Sprintf("apikey: NewCache: CacheOptions.RefreshAfter is %v: use at least MaxStaleness, %v", o.RefreshAfter, o.MaxStaleness))
	case o.StaleIfError < o.MaxStaleness:
		panic(fmt.Sprintf("apikey: NewCache: CacheOptions.StaleIfError is %v: use at least MaxStaleness, %v", o.StaleIfError, o.MaxStaleness))
	}

	c := &Cache{
		rdb:                 rdb,
		sealer:              sealed.NewSealer(secret),
		log:                 feed.NewLog(o.MaxStaleness),
		maxStaleness:        o.MaxStaleness,
		maxRefusalStaleness: min(o.MaxStaleness, refusalStaleness),
		refreshAfter:        o.RefreshAfter,
		staleIfError:        o.StaleIfError,
		redis:               newBreaker[[]byte](redisBreakAfter, redis.Nil),
		slots:               make(chan struct{}, storeSlots),
		sets:                make(chan struct{}, pendingSets),
	}
	c.keys = &layer[KeyHash, Key]{
		cache:  c,
		store:  newBreaker[*record[Key]](storeBreakAfter, nil),
		name:   func(h KeyHash) string { return redisKeyRoot + "key:" + hex.EncodeToString(h[:]) },
		topic:  func(h KeyHash) string { return "key " + hex.EncodeToString(h[:8]) },
		admits: Key.live,
		encode: encodeKey,
		decode: decodeKey,
	}
	c.keys.makeTables(o.MemoryEntries, func(h KeyHash) uint64 { return binary.LittleEndian.Uint64(h[:]) })
	c.plans = &layer[string, Plan]{
		cache:  c,
		store:  newBreaker[*record[Plan]](storeBreakAfter, nil),
		name:   func(orgID string) string { return redisKeyRoot + "plan:" + orgID },
		topic:  func(orgID string) string { return "plan " + orgID },
		admits: Plan.AllowsAPI,
		encode: encodePlan,
		decode: decodePlan,
	}
	seed := maphash.MakeSeed()
	c.plans.makeTables(o.MemoryEntries, func(orgID string) uint64 { return maphash.String(seed, orgID) })
	return c
}

// newBreaker returns a breaker that takes all errors but one for failures.
func newBreaker[T any](after uint32, answer error) *gobreaker.CircuitBreaker[T] {
	return gobreaker.NewCircuitBreaker[T](gobreaker.Settings{
		Timeout:      breakFor,
		ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= after },
		IsSuccessful: func(err error) bool { return err == nil || errors.Is(err, answer) },
	})
}

// skipped reports whether err is a breaker's word that it did not ask.
func skipped(err error) bool {
	return errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests)
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
	return CacheStats{
		RedisHits:     c.redisHits.Load(),
		RedisMisses:   c.redisMisses.Load(),
		RedisRejected: c.redisRejected.Load(),
		RedisErrors:   c.redisErrors.Load(),
		RedisSkipped:  c.redisSkipped.Load(),
		StoreReads:    c.storeReads.Load(),
		StoreErrors:   c.storeErrors.Load(),
		StoreSkipped:  c.storeSkipped.Load(),
		StaleUses:     c.staleUses.Load(),
		FeedLive:      c.log.Live(c.log.State(), time.Now()),
		FeedErr:       c.log.Fault(),
		Announcements: c.log.Announcements(),
		Unannounced:   c.log.Unannounced(),
	}
}

// Watch follows the changes that the triggers of the migrations announce, until
// ctx ends; then it returns nil. While it does, a change takes effect as soon as
// it is announced, and facts are used for up to RefreshAfter. Otherwise, and
// while it cannot, MaxStaleness is the bound. Faults do not end it: it tries
// again, and [Cache.Stats] tells.
//
// The pool must be the one that the stores read from, on the primary. One of its
// connections is taken out for LISTEN, and four times in MaxStaleness a NOTIFY
// goes through it. A pooler in transaction mode does not deliver announcements;
// the bound is MaxStaleness then. It is an error to watch twice at a time.
func (c *Cache) Watch(ctx context.Context, pool *pgxpool.Pool) error {
	if pool == nil {
		return errors.New("apikey: Cache.Watch: pool is nil: pass the pool that the stores read from")
	}
	if !c.watching.CompareAndSwap(false, true) {
		return errors.New("apikey: Cache.Watch: this Cache is being watched already")
	}
	defer c.watching.Store(false)
	feed.Follow(ctx, pool, c.log)
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
}

// InspectKey returns the record of a key in Redis, whatever it is worth; the error
// is that Redis could not be read.
func (c *Cache) InspectKey(ctx context.Context, h KeyHash) (CachedRecord[Key], error) {
	return inspect(ctx, c.keys, h)
}

// InspectPlan returns the record of an organisation's plan in Redis, as
// [Cache.InspectKey] does.
func (c *Cache) InspectPlan(ctx context.Context, orgID string) (CachedRecord[Plan], error) {
	return inspect(ctx, c.plans, orgID)
}

func inspect[S comparable, V Key | Plan](ctx context.Context, l *layer[S, V], subject S) (CachedRecord[V], error) {
	r := CachedRecord[V]{Name: l.name(subject)}
	value, err := l.cache.rdb.Get(ctx, r.Name).Bytes()
	if errors.Is(err, redis.Nil) {
		return r, nil
	}
	if err != nil {
		return r, fmt.Errorf("apikey: reading %s from Redis: %w", r.Name, err)
	}
	r.Found = true
	rec := l.open(r.Name, value)
	if rec == nil {
		r.Rejected = true
		return r, nil
	}
	r.Value, r.ReadAt, r.Snapshot = rec.value, rec.readAt, rec.snapshot.String()
	return r, nil
}

// Keys returns next behind the cache. All key stores behind one Cache share its
// records, so they must hold the same keys. It panics if next is nil.
func (c *Cache) Keys(next KeyStore) KeyStore {
	if isNil(next) {
		panic("apikey: Cache.Keys: next is nil: pass the KeyStore to read through to")
	}
	return cachedKeys{cached[KeyHash, Key]{c.keys, next.Key}}
}

// Plans returns next behind the cache. All plan stores behind one Cache share its
// records, so they must hold the same plans. It panics if next is nil.
func (c *Cache) Plans(next PlanStore) PlanStore {
	if isNil(next) {
		panic("apikey: Cache.Plans: next is nil: pass the PlanStore to read through to")
	}
	return cachedPlans{cached[string, Plan]{c.plans, next.Plan}}
}

// cached is a store behind a layer.
type cached[S comparable, V any] struct {
	*layer[S, V]
	load func(context.Context, S) (V, error)
}

func (c cached[S, V]) fetch(ctx context.Context, subject S) (*record[V], Source, error) {
	return c.layer.fetch(ctx, subject, c.load)
}

// answer answers as a store does.
func (c cached[S, V]) answer(ctx context.Context, subject S) (V, error) {
	rec := c.recall(subject, time.Now())
	if rec == nil {
		var err error
		if rec, _, err = c.fetch(ctx, subject); err != nil {
			var none V
			return none, err
		}
	}
	if !rec.found {
		return rec.value, ErrNotFound
	}
	return rec.value, nil
}

type cachedKeys struct{ cached[KeyHash, Key] }

// Key implements [KeyStore].
func (k cachedKeys) Key(ctx context.Context, h KeyHash) (Key, error) { return k.answer(ctx, h) }

type cachedPlans struct{ cached[string, Plan] }

// Plan implements [PlanStore].
func (p cachedPlans) Plan(ctx context.Context, orgID string) (Plan, error) {
	return p.answer(ctx, orgID)
}

// A layer is the cache of one kind of facts: S is what they are looked up by,
// V what is known.
type layer[S comparable, V any] struct {
	cache   *Cache
	store   *gobreaker.CircuitBreaker[*record[V]]
	name    func(S) string // in Redis
	topic   func(S) string // in announcements
	admits  func(V, time.Time) bool
	encode  func([]byte, V) []byte
	decode  func(*sealed.Decoder) V
	found   *table.Table[S, record[V]]
	absent  *table.Table[S, record[V]] // apart, so that it cannot push out what was found
	flights singleflight.Group
}

// A record is what one read told.
type record[V any] struct {
	value    V
	found    bool
	snapshot snapshot.Snapshot          // of the reading statement; zero if the store has none
	readAt   time.Time                  // before the statement was sent
	cleared  atomic.Pointer[feed.State] // the last state of the log in which it was not refuted
	used     lastused.Mark
}

// newRecord is the record of a store's answer, without a stamp. The error is that
// the store could not look.
func newRecord[V any](value V, err error) (*record[V], error) {
	switch {
	case err == nil:
		return &record[V]{value: value, found: true}, nil
	case errors.Is(err, ErrNotFound):
		return new(record[V]), nil
	}
	return nil, err
}

func (l *layer[S, V]) makeTables(entries int, hash func(S) uint64) {
	l.found = table.New[S, record[V]](entries, hash)
	l.absent = table.New[S, record[V]](min(entries, absentSlots), hash)
}

// usable reports whether rec may decide a request at now. It may not if a change
// is announced that it has not seen. Otherwise it may while it is young, and
// longer while every change is known to be announced.
func (l *layer[S, V]) usable(subject S, rec *record[V], now time.Time) bool {
	log := l.cache.log
	state := log.State()
	if l.refuted(subject, rec, state) {
		return false
	}
	age := feed.Age(rec.readAt, now)
	return age < l.cache.maxRefusalStaleness ||
		age < l.cache.refreshAfter && log.Live(state, now) && state.Covers(rec.snapshot, rec.readAt) ||
		age < l.cache.maxStaleness && rec.found && l.admits(rec.value, now)
}

// usableIfError reports whether rec, although not usable, may admit a request at
// now because the store cannot be read.
func (l *layer[S, V]) usableIfError(subject S, rec *record[V], now time.Time) bool {
	return rec.found && l.admits(rec.value, now) && feed.Age(rec.readAt, now) < l.cache.staleIfError &&
		!l.refuted(subject, rec, l.cache.log.State())
}

// refuted reports whether in state a change is announced that rec has not seen.
func (l *layer[S, V]) refuted(subject S, rec *record[V], state *feed.State) bool {
	if rec.cleared.Load() == state {
		return false
	}
	if l.cache.log.Refuted(l.topic(subject), rec.snapshot) {
		return true
	}
	rec.cleared.Store(state)
	return false
}

// recall returns the record in memory that may decide a request at now, or nil.
func (l *layer[S, V]) recall(subject S, now time.Time) *record[V] {
	rec := l.held(subject)
	if rec == nil || !l.usable(subject, rec, now) {
		return nil
	}
	return rec
}

// held returns the record in memory, whatever it is worth, or nil.
func (l *layer[S, V]) held(subject S) *record[V] {
	if rec := l.found.Get(subject); rec != nil {
		return rec
	}
	return l.absent.Get(subject)
}

// remember puts rec in the memory.
func (l *layer[S, V]) remember(subject S, rec *record[V]) {
	if rec.found {
		l.found.Put(subject, rec)
		return
	}
	l.absent.Put(subject, rec)
	l.found.Delete(subject) // recall looks there first
}

// fetch gets the facts of subject from Redis or by load, and tells where they are
// from. All who ask for one subject at the same time share one flight; a caller
// that goes away leaves it.
func (l *layer[S, V]) fetch(ctx context.Context, subject S, load func(context.Context, S) (V, error)) (*record[V], Source, error) {
	name := l.name(subject)
	for asked := time.Now(); ; {
		landed := l.flights.DoChan(name, func() (any, error) {
			f := flight[V]{started: time.Now()}
			err := l.fly(context.WithoutCancel(ctx), &f, subject, name, load)
			return f, err
		})
		select {
		case result := <-landed:
			if result.Err != nil {
				return nil, "", result.Err
			}
			// A flight that had started before this request may have missed a change that
			// was announced before it. The next one cannot have.
			f := result.Val.(flight[V])
			now := time.Now()
			if !f.started.Before(asked) || l.usable(subject, f.rec, now) ||
				f.source == SourceStale && l.usableIfError(subject, f.rec, now) {
				return f.rec, f.source, nil
			}
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
	}
}

// A flight is when it started, what it brought, and from where.
type flight[V any] struct {
	started time.Time
	rec     *record[V]
	source  Source
}

// fly is one flight. It runs on a goroutine of its own, where a panic would end
// the process.
func (l *layer[S, V]) fly(
	ctx context.Context, f *flight[V], subject S, name string, load func(context.Context, S) (V, error),
) (err error) {
	defer func() {
		if p := recover(); p != nil {
			l.cache.storeErrors.Add(1)
			err = fmt.Errorf("apikey: the store panicked: %v", p)
		}
	}()
	if rec := l.recall(subject, f.started); rec != nil { // the flight before this one has just landed
		f.rec, f.source = rec, SourceMemory
		return nil
	}
	inRedis, usable := l.get(ctx, subject, name)
	if usable {
		f.rec, f.source = inRedis, SourceRedis
		l.remember(subject, inRedis)
		return nil
	}
	read, err := l.read(ctx, subject, load)
	if err != nil {
		stale := l.latest(subject, inRedis)
		if stale == nil || !l.usableIfError(subject, stale, time.Now()) {
			return err
		}
		l.cache.staleUses.Add(1)
		f.rec, f.source = stale, SourceStale
		l.remember(subject, stale)
		return nil
	}
	f.rec, f.source = read, SourceStore
	l.compare(subject, read)
	l.remember(subject, read)
	if read.found {
		l.set(ctx, name, read)
	}
	return nil
}

// latest returns the later of the records in memory and in Redis, or nil.
func (l *layer[S, V]) latest(subject S, inRedis *record[V]) *record[V] {
	held := l.held(subject)
	if held == nil || inRedis != nil && inRedis.readAt.After(held.readAt) {
		return inRedis
	}
	return held
}

// read asks the store.
func (l *layer[S, V]) read(ctx context.Context, subject S, load func(context.Context, S) (V, error)) (*record[V], error) {
	turn := time.NewTimer(slotWait)
	defer turn.Stop()
	select {
	case l.cache.slots <- struct{}{}:
		defer func() { <-l.cache.slots }()
	case <-turn.C:
		l.cache.storeErrors.Add(1)
		return nil, fmt.Errorf("apikey: %d lookups were under way for %v", storeSlots, slotWait)
	}
	rec, err := l.store.Execute(func() (*record[V], error) {
		l.cache.storeReads.Add(1)
		ctx, cancel := context.WithTimeout(ctx, storeBudget)
		defer cancel()
		ctx, stamp := snapshot.Collect(ctx)
		readAt := time.Now()
		rec, err := newRecord(load(ctx, subject))
		if err != nil {
			return nil, err
		}
		rec.snapshot, rec.readAt = stamp.Snapshot(), readAt
		return rec, nil
	})
	switch {
	case skipped(err):
		l.cache.storeSkipped.Add(1)
		return nil, fmt.Errorf("apikey: the store failed %d times in a row and is not asked for %v: %w", storeBreakAfter, breakFor, err)
	case err != nil:
		l.cache.storeErrors.Add(1)
	}
	return rec, err
}

// compare looks for a change that nothing announced: other facts than those in
// memory, which no announcement has refuted while all should have been received.
func (l *layer[S, V]) compare(subject S, rec *record[V]) {
	old := l.held(subject)
	if old == nil || old.found == rec.found && bytes.Equal(l.encode(nil, old.value), l.encode(nil, rec.value)) {
		return
	}
	log, topic := l.cache.log, l.topic(subject)
	if log.State().Covers(old.snapshot, old.readAt) && !log.Refuted(topic, old.snapshot) {
		log.Suspect(topic, old.snapshot, time.Now())
	}
}

// get returns the record in Redis, nil if there is none that we sealed, and
// whether it is usable.
func (l *layer[S, V]) get(ctx context.Context, subject S, name string) (rec *record[V], usable bool) {
	value, err := l.cache.redis.Execute(func() ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, redisBudget)
		defer cancel()
		return l.cache.rdb.Get(ctx, name).Bytes()
	})
	switch {
	case skipped(err):
		l.cache.redisSkipped.Add(1)
		return nil, false
	case errors.Is(err, redis.Nil):
		l.cache.redisMisses.Add(1)
		return nil, false
	case err != nil:
		l.cache.redisErrors.Add(1)
		return nil, false
	}
	if rec = l.open(name, value); rec == nil {
		l.cache.redisRejected.Add(1)
	}
	// A record from the future comes from a replica whose clock is ahead, and would
	// live too long.
	now := time.Now()
	if rec != nil && feed.Age(rec.readAt, now) < 0 {
		rec = nil
	}
	if rec == nil || !l.usable(subject, rec, now) {
		l.cache.redisMisses.Add(1)
		return rec, false
	}
	l.cache.redisHits.Add(1)
	return rec, true
}

// set puts rec in Redis without holding up the flight. When Redis is too slow to
// keep up, or away, other replicas read for themselves.
func (l *layer[S, V]) set(ctx context.Context, name string, rec *record[V]) {
	select {
	case l.cache.sets <- struct{}{}:
	default:
		return
	}
	go func() {
		defer func() { <-l.cache.sets }()
		_, err := l.cache.redis.Execute(func() ([]byte, error) {
			ctx, cancel := context.WithTimeout(ctx, redisBudget)
			defer cancel()
			return nil, l.cache.rdb.Set(ctx, name, l.seal(name, rec), l.cache.staleIfError).Err()
		})
		switch {
		case skipped(err):
			l.cache.redisSkipped.Add(1)
		case err != nil:
			l.cache.redisErrors.Add(1)
		}
	}()
}

func (l *layer[S, V]) seal(name string, rec *record[V]) []byte {
	body := sealed.AppendTime(nil, rec.readAt)
	body = sealed.AppendString(body, rec.snapshot.String())
	return l.cache.sealer.Seal(name, l.encode(body, rec.value))
}

// open is the inverse of seal; nil for a value that seal did not make.
func (l *layer[S, V]) open(name string, value []byte) *record[V] {
	body, ok := l.cache.sealer.Open(name, value)
	if !ok {
		return nil
	}
	d := sealed.NewDecoder(body)
	rec := &record[V]{found: true, readAt: d.Time()}
	if text := d.String(); text != "" {
		snap, err := snapshot.Parse(text)
		if err != nil {
			return nil
		}
		rec.snapshot = snap
	}
	rec.value = l.decode(d)
	if !d.Done() {
		return nil
	}
	return rec
}

func encodeKey(b []byte, k Key) []byte {
	b = sealed.AppendString(b, k.ID)
	b = sealed.AppendString(b, k.OrgID)
	b = sealed.AppendBool(b, k.Active)
	return sealed.AppendTime(b, k.ExpiresAt)
}

func decodeKey(d *sealed.Decoder) Key {
	return Key{ID: d.String(), OrgID: d.String(), Active: d.Bool(), ExpiresAt: d.Time()}
}

func encodePlan(b []byte, p Plan) []byte {
	b = sealed.AppendString(b, p.Name)
	b = sealed.AppendString(b, string(p.Status))
	b = sealed.AppendBool(b, p.APIAccess)
	return sealed.AppendTime(b, p.EndsAt)
}

func decodePlan(d *sealed.Decoder) Plan {
	return Plan{Name: d.String(), Status: PlanStatus(d.String()), APIAccess: d.Bool(), EndsAt: d.Time()}
}
