package apikey

import (
	"context"
	"time"

	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// What the tests look at that users do not.
var (
	BearerKey = bearerKey
	KeySQL    = keySQL
	PlanSQL   = planSQL
)

// RedisNames returns the names of the records of a key and a plan in Redis.
func (c *Cache) RedisNames(h KeyHash, orgID string) (key, plan string) {
	return c.keys.name(h), c.plans.name(orgID)
}

// FetchKey is what follows when a key was not found in memory.
func (c *Cache) FetchKey(ctx context.Context, h KeyHash, load func(context.Context, KeyHash) (Key, error)) (Key, error) {
	rec, _, err := c.keys.fetch(ctx, h, load)
	if err != nil {
		return Key{}, err
	}
	return rec.value, nil
}

// Log is what the cache knows of changes.
func (c *Cache) Log() *feed.Log { return c.log }

// KeyUsable is the rule, for a key that was read at a time in snap.
func (c *Cache) KeyUsable(h KeyHash, key Key, found bool, snap snapshot.Snapshot, readAt, now time.Time) bool {
	return c.keys.usable(h, &record[Key]{value: key, found: found, snapshot: snap, readAt: readAt}, now)
}
