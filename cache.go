package apikey

// The read-through cache: memory -> Redis -> store. This file has its options, statistics
// and wiring. facts.go describes keys and plans to it. internal/readthrough looks up and
// decides what may be used, internal/feed hears of changes, internal/shared talks to Redis.

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
	absentKeys   = 1024 // in memory at most, so that made-up keys do not fill it

	// Facts that refuse are read again sooner than facts that admit, since a customer who
	// has just paid tries again at once.
	refusalStaleness = time.Second
)

// CacheOptions are the optional parts of a [Cache].
type CacheOptions struct {
	// MaxStaleness is how long a change may go unnoticed while announcements cannot be
	// heard. Facts older than this are then read again before they admit a request. Facts
	// that refuse one are read again after a second. At least 100 ms. Defaults to 10 s.
	MaxStaleness time.Duration

	// RefreshAfter is how long a change may go unnoticed that is never announced, as when
	// triggers are disabled. Facts older than this are always read again. At least
	// MaxStaleness. Defaults to 5 min, or MaxStaleness if that is longer.
	RefreshAfter time.Duration

	// StaleIfError is how long known good keys are admitted while the store cannot be read
	// (RFC 5861, section 4), unless a change was announced. Facts that are out of date
	// never refuse a request: it is answered with [ErrUnavailable]. At least MaxStaleness.
	// Defaults to 15 min, or RefreshAfter if that is longer. Records in Redis live for
	// StaleIfError or RefreshAfter, whichever is longer.
	StaleIfError time.Duration

	// Namespace is part of the names of records in Redis: apikey:3:namespace:... Caches with
	// the same namespace and secret share records. Records of the Postgres stores name their
	// database and tables, and are used for these only. If you use stores of your own, give
	// each set of keys and plans its own namespace. Up to 64 of the characters
	// A-Z a-z 0-9 - _ . Defaults to "".
	Namespace string

	// AcceptedSecrets are further secrets under which records in Redis are accepted. They
	// let you change the secret without emptying the cache: first let all replicas accept
	// the new secret, then let them use it and accept the old one, and drop the old one
	// after StaleIfError. At least 32 bytes each. Defaults to none.
	AcceptedSecrets [][]byte

	// MemoryEntries is the number of keys that the process keeps in memory, each with its
	// plan, in about 430 bytes, and some 9 more for each transaction that was writing when it
	// was read. Memory grows as keys are used; when it is full, keys that
	// were not used lately make room. If negative, nothing is kept. Defaults to 131,072.
	MemoryEntries int

	// RedisTimeout is how long a request waits for Redis before the store is asked: more
	// than a round trip. Connecting may take longer. Defaults to 50 ms.
	RedisTimeout time.Duration

	// StoreTimeout is how long a request waits for the store, including the time in the
	// queue, before it is answered with [ErrUnavailable]. Defaults to 500 ms.
	StoreTimeout time.Duration

	// MaxBatches is the number of batches that a store looks up at the same time, and so
	// the number of connections in use. Further lookups wait and form the next batches. A
	// store that cannot look up batches is asked for four times as many single keys. The
	// number for each node of Redis is the same. Defaults to 4.
	MaxBatches int

	// MaxBatchSize is the number of keys or plans in a batch. Defaults to 256.
	MaxBatchSize int

	// MaxQueue is the number of lookups that may wait for each store: half of them for keys
	// and plans that are known to exist, half for others. If its half is full, a request is
	// answered with [ErrUnavailable] at once. Defaults to 8192.
	MaxQueue int

	// Logger logs when announcements are no longer heard (and again every minute), when a
	// node of Redis (for reading, or for writing) or a store is not used for a while because
	// it fails, and when each is back. At level Debug it logs every change that is announced.
	// Defaults to nil: nothing is logged.
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

// CacheStats are the counters of a [Cache] since it was made. Memory hits are not counted:
// a counter that all cores share would cost more than the hit.
//
// A GET is a read of a record in Redis; it is sent as GETRANGE.
type CacheStats struct {
	RedisHits      uint64 // records from Redis that were used
	RedisMisses    uint64 // lookups for which Redis had no record that could be used
	RedisRejected  uint64 // of the misses, records that no replica with this secret has written under this name
	RedisErrors    uint64 // GETs and SETs that failed or took longer than RedisTimeout
	RedisSkipped   uint64 // GETs and SETs not sent, because a node failed several times in a row, too many SETs waited or a record was too long
	RedisGets      uint64 // GETs sent
	RedisBatches   uint64 // round trips of these GETs
	StoreReads     uint64 // keys and plans that were read from stores
	StoreBatches   uint64 // round trips of these reads
	StoreErrors    uint64 // lookups that failed or took longer than StoreTimeout
	StoreSkipped   uint64 // lookups not made, because the store failed several times in a row
	QueueFull      uint64 // lookups not made, because MaxQueue others waited (for Redis: a miss)
	QueueTimeouts  uint64 // lookups that waited in the queue until their time was over
	StoreBusy      uint64 // lookups that found no place: all connections of the pool in use, or no room on the server
	StoreAbandoned uint64 // lookups that stores have not returned from although their time is over; not a counter
	StaleUses      uint64 // lookups answered with facts that are out of date, because the store could not be read

	// RedisErr is why reading from Redis or writing to it has failed, on any of its nodes;
	// nil once that has succeeded on that node again.
	RedisErr error

	StandbyReads uint64 // of the StoreReads, those from a standby; they are used for MaxStaleness only

	FeedLive      bool   // announcements are known to arrive; false until Watch runs
	FeedErr       error  // why the last session of Watch ended or could not begin; nil if none did
	Announcements uint64 // changes announced
	Unannounced   uint64 // changes found by reading that were never announced: check the triggers
	Forged        uint64 // announcements of transactions that do not exist: somebody sends NOTIFY by hand
	Unknown       uint64 // announcements of a newer version; they count as changes of everything
}

// A Cache keeps what stores return, in this process and in Redis. It is safe for
// concurrent use.
//
// Redis is not trusted, and cannot make a request fail: a record that is slow, missing or
// not sealed under the secret is a miss. That a key or plan does not exist is kept in the
// process only. Errors are not kept.
//
// Lookups are sent in batches, which are larger under load. Since a lookup may serve many
// requests, it does not see the values of their contexts.
type Cache struct {
	shared   readthrough.Shared
	rdb      redis.UniversalClient
	watching atomic.Bool
	keys     *readthrough.Layer[KeyHash, keyFacts]
	plans    *readthrough.Layer[string, Plan]
}

// NewCache returns a Cache that uses rdb, which the caller closes later. The options of rdb
// must have ContextTimeoutEnabled set. secret is at least 32 random bytes, the same for all
// replicas; AcceptedSecrets says how to change it. opts may be nil. NewCache panics if an
// argument is invalid.
//
// Keep the clocks of all machines synchronised (NTP): they tell the age of records that
// other replicas have written.
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
	oldest := max(o.RefreshAfter, o.StaleIfError) // of records that may be used
	c := &Cache{rdb: rdb}
	c.shared.Log = feed.NewLog(o.MaxStaleness, oldest, o.Logger)
	c.shared.Redis = shared.New(rdb, sealed.NewSealer(secret, o.AcceptedSecrets...), limits(o.RedisTimeout), oldest, o.Logger)
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
		Topics: func(orgID string, p *Plan) [3]feed.Topic {
			own := feed.PlanTopic(orgID)
			switch {
			case p.Name == "": // absent
				return [3]feed.Topic{own, own, feed.NewPlansTopic()}
			case p.AllowsAPI(time.Now()):
				return [3]feed.Topic{own, own, feed.TierTopic(p.Name)}
			}
			return [3]feed.Topic{own, feed.NewPlansTopic(), feed.TierTopic(p.Name)} // it may be deleted unnoticed, and made anew
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
		Topics: func(h KeyHash, k *keyFacts) [3]feed.Topic {
			own := feed.KeyTopic(keyID(h))
			switch {
			case k.OrgID == "": // absent
				return [3]feed.Topic{own, own, feed.NewKeysTopic()}
			case k.Live(time.Now()):
				return [3]feed.Topic{own, own, feed.KeysOfTopic(k.OrgID)}
			}
			return [3]feed.Topic{own, feed.NewKeysTopic(), feed.KeysOfTopic(k.OrgID)} // it may be deleted unnoticed, and made anew
		},
		Admits: func(k *keyFacts, now time.Time) bool { return k.Live(now) },
		Same:   func(a, b *keyFacts) bool { return a.equal(b.Key) },
		Append: appendKey,
		Decode: c.decodeKey,
	}, o.MemoryEntries, absentKeys)
	return c
}

// honoursContext reports whether rdb gives up when a context ends. For unknown types of
// clients it returns true.
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

// Ready waits until announcements are known to arrive for the first time, which takes some
// hundred milliseconds after [Cache.Watch] was called. If ctx ends first, it returns an error
// with the cause and the last fault of Watch. The cache can be used earlier; it then reads
// from the store more often.
func (c *Cache) Ready(ctx context.Context) error {
	select {
	case <-c.shared.Log.WentLive():
		return nil
	case <-ctx.Done():
		return fmt.Errorf("apikey: announcements are not heard: %w", errors.Join(context.Cause(ctx), c.shared.Log.Fault()))
	}
}

// Stats returns the current counters.
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
		Unknown:        c.shared.Log.Unknown(),
	}
}

// Watch listens for changes until ctx ends, and then returns nil. While it listens, a
// change takes effect as soon as it is announced, and unchanged facts are used for up to
// RefreshAfter. While it cannot listen, it tries again, and facts are used for MaxStaleness;
// [Cache.Stats] tells. Watch returns an error only if pool is nil or the Cache is being
// watched already.
//
// pool must lead to the primary that the stores read from, without a pooler such as
// PgBouncer in between. Watch opens a connection of its own with the settings of the pool
// and its BeforeConnect, but without its other hooks. Now and then it asks through the pool
// which server that leads to.
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
