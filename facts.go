package apikey

// What the cache knows of keys and plans: how they are read, kept, judged, and written to
// Redis.

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

// keyFacts are what the cache knows of a key: the key, when its use was last
// recorded, and the record of its organisation's plan, so that a request finds both
// by one look. The plan's record goes its own way: it is judged by itself, and
// replaced when it is read again.
type keyFacts struct {
	Key
	plan atomic.Pointer[readthrough.Record[Plan]] // nil: not known
	used lastused.Mark
}

// sources returns the stores behind the cache. A lookup of a key reads the plan of its
// organisation too, if both stores are ours and on one DB. All others are asked
// separately: a plan never comes from tables that they do not read.
func (c *Cache) sources(keys KeyStore, plans PlanStore) (cachedKeys, cachedPlans) {
	k := cachedKeys{c.keys, readthrough.NewStore(c.keys, keyReader(keys))}
	if ours, ok := keys.(*PostgresKeyStore); ok {
		if theirs, ok := plans.(*PostgresPlanStore); ok && sameDB(ours.db.DB, theirs.db.DB) {
			k.store = readthrough.NewStore(c.keys, c.joinedReader(ours))
		}
	}
	return k, cachedPlans{c.plans, readthrough.NewStore(c.plans, planReader(plans))}
}

func sameDB(a, b DB) bool {
	return reflect.TypeOf(a) == reflect.TypeOf(b) && reflect.TypeOf(a).Comparable() && a == b
}

// cachedKeys is a key store behind a cache.
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

// cachedPlans is a plan store behind the same cache: the record of a key leads to that of
// its plan.
type cachedPlans struct {
	layer *readthrough.Layer[string, Plan]
	store *readthrough.Store[string, Plan]
}

func (p cachedPlans) recall(key *keyFacts, now clock.Instant) *readthrough.Record[Plan] {
	if rec := key.plan.Load(); rec != nil && p.layer.Usable(key.OrgID, rec, now) {
		return rec
	}
	rec := p.layer.Recall(key.OrgID, now) // another key of the organisation may have read it again
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
