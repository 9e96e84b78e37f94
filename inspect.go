package apikey

// Reading records in Redis as they are, to explain why a key is refused.

import (
	"errors"
	"fmt"
	"time"

	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/shared"
)

// A CachedRecord is the record of a key or a plan in Redis. It is for tools such as the
// command's explain.
type CachedRecord[V Key | Plan] struct {
	Name     string    // its name in Redis
	Found    bool      // if false, the fields below are zero
	Rejected bool      // if true, it is not sealed under the secret, and the fields below are zero
	Value    V         // the key or plan
	ReadAt   time.Time // when it was read from the store
	Snapshot string    // the pg_snapshot that it was read in; "" for stores that do not tell
	Plan     *Plan     // the plan in the record of a key; nil if there is none
}

// InspectKey returns the record of a key in Redis, even if the cache would not use it. An
// error means that Redis could not be read within RedisTimeout.
func (c *Cache) InspectKey(h KeyHash) (CachedRecord[Key], error) {
	name, rec, err := c.keys.Inspect(h)
	r, err := inspected(name, rec, err, func(k *keyFacts) Key { return k.Key })
	if rec != nil {
		if plan := rec.Value.plan.Load(); plan != nil {
			r.Plan = &plan.Value
		}
	}
	return r, err
}

// InspectPlan is like [Cache.InspectKey] for the plan of an organisation.
func (c *Cache) InspectPlan(orgID string) (CachedRecord[Plan], error) {
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
