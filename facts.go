package apikey

// Keys and plans as the cache sees them: how they are read from stores, kept in memory, and
// encoded for Redis.

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"sync/atomic"
	"unique"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/lastused"
	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/sealed"
)

// keyFacts are what the cache keeps for a key: the key, when its use was last recorded, and
// the record of its organisation's plan, so that a request finds both with one lookup in
// memory. Whether the plan may be used is decided separately; when it is read again, the
// new record takes its place here.
type keyFacts struct {
	Key
	plan atomic.Pointer[readthrough.Record[Plan]] // nil: not known
	used lastused.Mark
}

// sources returns the two stores with the cache in front. If both are Postgres stores on
// the same DB, a lookup of a key reads its plan, too. Otherwise plans are read from the plan
// store alone: the key store may not use the same tables.
func (c *Cache) sources(keys KeyStore, plans PlanStore) (cachedKeys, cachedPlans) {
	k := cachedKeys{c.keys, readthrough.NewStore(c.keys, keyReader(keys))}
	p := planReader(plans)
	if ours, ok := keys.(*PostgresKeyStore); ok {
		if theirs, ok := plans.(*PostgresPlanStore); ok && sameDB(ours.db.DB(), theirs.db.DB()) {
			joined := c.joinedReader(ours)
			joined.Tables = new(readthrough.Tables)
			p.Tables = joined.Tables // plans are seldom read by themselves
			k.store = readthrough.NewStore(c.keys, joined)
		}
	}
	return k, cachedPlans{c.plans, readthrough.NewStore(c.plans, p)}
}

func sameDB(a, b DB) bool {
	return reflect.TypeOf(a) == reflect.TypeOf(b) && reflect.TypeOf(a).Comparable() && a == b
}

// cachedKeys is a key store with the cache in front.
type cachedKeys struct {
	layer *readthrough.Layer[KeyHash, keyFacts]
	store *readthrough.Store[KeyHash, keyFacts]
}

func (k cachedKeys) recall(h KeyHash, now clock.Instant) *readthrough.Record[keyFacts] {
	return k.layer.Recall(h, now)
}

func (k cachedKeys) fetch(ctx context.Context, h KeyHash) (*readthrough.Record[keyFacts], Source, error) {
	rec, source, err := k.layer.Fetch(ctx, h, nil, k.store)
	return rec, Source(source), err
}

// cachedPlans is a plan store with the cache in front. It looks at the plan in the record of
// the key first.
type cachedPlans struct {
	layer *readthrough.Layer[string, Plan]
	store *readthrough.Store[string, Plan]
}

func (p cachedPlans) recall(key *keyFacts, now clock.Instant) *readthrough.Record[Plan] {
	if rec := key.plan.Load(); rec != nil && p.layer.Usable(key.OrgID, rec, now) {
		return rec
	}
	rec := p.layer.Recall(key.OrgID, now) // it may have been read again for another key
	if rec != nil {
		key.plan.Store(rec)
	}
	return rec
}

func (p cachedPlans) fetch(ctx context.Context, key *keyFacts) (*readthrough.Record[Plan], Source, error) {
	rec, source, err := p.layer.Fetch(ctx, key.OrgID, key.plan.Load(), p.store)
	if err == nil {
		key.plan.Store(rec)
	}
	return rec, Source(source), err
}

// keyReader reads keys without plans.
func keyReader(next KeyStore) readthrough.Reader[KeyHash, keyFacts, Key] {
	r := readthrough.Reader[KeyHash, keyFacts, Key]{
		Name:  "keys",
		One:   one(next.Key),
		Fill:  func(rec *readthrough.Record[keyFacts], k Key) { rec.Value.Key = compactKey(k) },
		Adopt: func(rec *readthrough.Record[keyFacts]) { rec.Value.plan.Store(nil) }, // a replica with another plan store may have written it
	}
	if batch, ok := next.(BatchKeyStore); ok {
		r.Many = batch.Keys
	}
	_, r.Trusted = next.(*PostgresKeyStore)
	return r
}

// joinedReader reads keys with their plans.
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

// one turns ErrNotFound of a store's method into a bool.
func one[S, F any](look func(context.Context, S) (F, error)) func(context.Context, S) (F, bool, error) {
	return func(ctx context.Context, subject S) (F, bool, error) {
		fact, err := look(ctx, subject)
		if errors.Is(err, ErrNotFound) {
			return fact, false, nil
		}
		return fact, err == nil, err
	}
}

// compactKey returns k with both ids in one allocation, to save memory.
func compactKey(k Key) Key {
	ids := k.ID + k.OrgID
	k.ID, k.OrgID = ids[:len(k.ID)], ids[len(k.ID):]
	return k
}

// compactPlan returns p with shared strings, to save memory: there are few tiers and
// statuses.
func compactPlan(p Plan) Plan {
	p.Name = unique.Make(p.Name).Value()
	if i := slices.Index(planStatuses, p.Status); i >= 0 {
		p.Status = planStatuses[i]
	}
	return p
}

// The encoding of keys and plans for Redis. The record of a key includes the plan if it was
// read with the key and exists.

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
