package apikey

// The read-through cache: memory -> Redis -> store, as users see it. What it knows of keys
// and plans is facts.go. How a lookup goes and when its answer may be used is
// internal/readthrough; what has changed is internal/feed; what is in Redis is
// internal/shared.

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/shared"
)

const (
	minStaleness = 100 * time.Millisecond
	absentKeys   = 1024 // held, so that a flood of made-up keys takes no memory

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
	// Redis or a store is not asked for a while since it fails, and when it is again; at
	// level Debug, of each change that is announced. While announcements are not heard it is
	// reminded once a minute.
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
	r.RedisTimeout = cmp.Or(r.RedisTimeout, shared.DefaultTimeout)
	r.StoreTimeout = cmp.Or(r.StoreTimeout, 500*time.Millisecond)
	r.MaxBatches = cmp.Or(r.MaxBatches, 4)
	r.MaxBatchSize = cmp.Or(r.MaxBatchSize, 256)
	r.MaxQueue = cmp.Or(r.MaxQueue, 8192)
	r.Logger = cmp.Or(r.Logger, slog.New(slog.DiscardHandler))
	return r
}

// check returns what is wrong with o, "" if nothing is.
func (o CacheOptions) check() string {
	switch {
	case o.MaxStaleness < minStaleness:
		return fmt.Sprintf("MaxStaleness is %v: use at least %v", o.MaxStaleness, minStaleness)
	case o.RefreshAfter < o.MaxStaleness:
		return fmt.Sprintf("RefreshAfter is %v: use at least MaxStaleness, %v", o.RefreshAfter, o.MaxStaleness)
	case o.StaleIfError < o.MaxStaleness:
		return fmt.Sprintf("StaleIfError is %v: use at least MaxStaleness, %v", o.StaleIfError, o.MaxStaleness)
	case !shared.ValidNamespace(o.Namespace):
		return fmt.Sprintf("Namespace is %q: use up to 64 of the characters A-Z a-z 0-9 - _ .", o.Namespace)
	case slices.ContainsFunc(o.AcceptedSecrets, func(s []byte) bool { return len(s) < sealed.MinSecretLen }):
		return fmt.Sprintf("AcceptedSecrets has one of less than %d bytes: use those that NewCache is given elsewhere", sealed.MinSecretLen)
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

// NewCache returns a Cache on rdb, which the caller closes. All replicas share one secret
// of at least 32 random bytes. A new secret empties the cache, unless it is changed as
// AcceptedSecrets says. The client must have ContextTimeoutEnabled set. opts may be nil.
// NewCache panics if one of these is not so.
//
// Keep the clocks of all machines in step (NTP): the age of a record that another replica
// read depends on both.
func NewCache(rdb redis.UniversalClient, secret []byte, opts *CacheOptions) *Cache {
	o := opts.withDefaults()
	switch {
	case pg.IsNil(rdb):
		panic("apikey: NewCache: rdb is nil: pass a Redis client")
	case !honoursContext(rdb):
		panic("apikey: NewCache: set ContextTimeoutEnabled: true in the options of the Redis client; " +
			"without it the client ignores deadlines, and a frozen Redis holds up requests for seconds")
	case len(secret) < sealed.MinSecretLen:
		panic(fmt.Sprintf("apikey: NewCache: the secret has %d bytes: use at least %d random ones", len(secret), sealed.MinSecretLen))
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

	root := shared.Root
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

// honoursContext reports whether a deadline ends a command of rdb. Of clients of other
// types it is assumed.
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

// Ready waits until announcements have been heard for the first time, and then returns nil.
// If ctx ends before, it returns the cause, and the fault of [Cache.Watch] if there was one.
// A service may use the cache before, at the price of more lookups.
func (c *Cache) Ready(ctx context.Context) error {
	select {
	case <-c.shared.Log.WentLive():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("apikey: announcements are not heard: %w", errors.Join(context.Cause(ctx), c.shared.Log.Fault()))
	}
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
// The pool must lead to the server and database that the stores read from, the primary,
// and not through a pooler such as PgBouncer. Watch makes a connection of its own, with
// the settings of the pool and its BeforeConnect, but without its other hooks. Now and
// then it asks the pool which server it leads to. It is an error to watch twice at a
// time.
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
