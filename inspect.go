package apikey

// What Redis holds, for those who look why a key is refused.

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/shared"
)

// A CachedRecord is the record of a key or a plan in Redis, for tools that explain
// decisions.
type CachedRecord[V Key | Plan] struct {
	Name     string    // in Redis
	Found    bool      // false: Redis holds none, and all below is zero
	Rejected bool      // it is not sealed by us for its name, and all below is zero
	Value    V         // what it says
	ReadAt   time.Time // when the store was read
	Snapshot string    // the pg_snapshot that it was read in; "" if the store does not stamp
	Plan     *Plan     // of a key: its organisation's plan, if the record has that too; else nil
}

// InspectKey returns the record of a key in Redis, also one that may not be used. The
// error is that Redis could not be read.
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
