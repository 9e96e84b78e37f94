package apikey

import (
	"context"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// What the tests look at that users do not.
var (
	KeySQL        = keySQL.both()
	KeyAndPlanSQL = keyAndPlanSQL.both()
	PlanSQL       = planSQL.both()
)

// both are the statements for one subject, and for many.
func (s lookupSQL) both() [2]string { return [2]string{s.one, s.many} }

// RedisNames returns the names of the records of a key and a plan in Redis.
func (c *Cache) RedisNames(h KeyHash, orgID string) (key, plan string) {
	return c.keys.Name(h), c.plans.Name(orgID)
}

// A CachedKeyStore is a key store behind a cache, without a request.
type CachedKeyStore struct{ source cachedKeys }

// KeysBehind returns store behind the cache.
func (c *Cache) KeysBehind(store KeyStore) CachedKeyStore {
	keys, _ := c.sources(store, PlanStoreFunc(nil))
	return CachedKeyStore{keys}
}

// Key implements [KeyStore].
func (s CachedKeyStore) Key(ctx context.Context, h KeyHash) (Key, error) {
	rec := s.source.recall(h, clock.At(time.Now()))
	if rec == nil {
		return s.Fetch(ctx, h)
	}
	return answer(rec)
}

// Fetch is what follows when a key was not found in memory.
func (s CachedKeyStore) Fetch(ctx context.Context, h KeyHash) (Key, error) {
	rec, _, err := s.source.fetch(ctx, h)
	if err != nil {
		return Key{}, err
	}
	return answer(rec)
}

func answer(rec *readthrough.Record[keyFacts]) (Key, error) {
	if !rec.Found {
		return Key{}, ErrNotFound
	}
	return rec.Value.Key, nil
}

// Log is what the cache knows of changes.
func (c *Cache) Log() *feed.Log { return c.shared.Log }

// KeyUsable is the rule, for a key that was read at a time in snap.
func (c *Cache) KeyUsable(h KeyHash, key Key, found bool, snap snapshot.Snapshot, readAt, now time.Time) bool {
	rec := c.keys.NewRecord(h, readthrough.Stamp{Snapshot: snap, ReadAt: clock.At(readAt)})
	rec.Value.Key, rec.Found = key, found
	return c.keys.Usable(h, rec, clock.At(now))
}
