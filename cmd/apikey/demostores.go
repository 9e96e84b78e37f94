package main

// What the demo's stores are filled with, in memory and in PostgreSQL.

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/pg"
)

// memoryStores returns stores that hold the examples and never change.
func memoryStores(examples []example) (apikey.KeyStore, apikey.PlanStore) {
	keys, plans := map[apikey.KeyHash]apikey.Key{}, map[string]apikey.Plan{}
	for i, e := range examples {
		if e.apiKey == "" {
			continue
		}
		e.key.ID = fmt.Sprintf("demo-key-%d", i+1)
		keys[apikey.HashKey(e.apiKey)] = e.key
		if e.plan != nil {
			plans[e.key.OrgID] = *e.plan
		}
	}
	return apikey.KeyStoreFunc(func(_ context.Context, h apikey.KeyHash) (apikey.Key, error) { return find(keys, h) }),
		apikey.PlanStoreFunc(func(_ context.Context, orgID string) (apikey.Plan, error) { return find(plans, orgID) })
}

func find[K comparable, V any](m map[K]V, k K) (V, error) {
	v, ok := m[k]
	if !ok {
		return v, apikey.ErrNotFound
	}
	return v, nil
}

// seed puts the examples into the database.
func seed(ctx context.Context, pool *pgxpool.Pool, examples []example) error {
	err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		var b pgx.Batch
		b.Queue(`INSERT INTO plan_catalogue (name, api_access) VALUES ($1, true), ($2, false) ON CONFLICT DO NOTHING`, demoStarter, demoBasic)
		for _, e := range examples {
			if e.apiKey == "" {
				continue
			}
			h := apikey.HashKey(e.apiKey)
			b.Queue(`INSERT INTO api_keys (org_id, name, key_hash, active, expires_at) VALUES ($1, 'demo', $2, $3, $4)`,
				e.key.OrgID, h[:], e.key.Active, pg.NullTime(e.key.ExpiresAt))
			if e.plan != nil {
				b.Queue(`INSERT INTO org_plans (org_id, plan, status, ends_at) VALUES ($1, $2, $3, $4)
					ON CONFLICT (org_id) DO UPDATE SET plan = excluded.plan, status = excluded.status, ends_at = excluded.ends_at`,
					e.key.OrgID, e.plan.Name, e.plan.Status, pg.NullTime(e.plan.EndsAt))
			}
		}
		return tx.SendBatch(ctx, &b).Close()
	})
	if err != nil {
		return fmt.Errorf("seeding: %w", err)
	}
	return nil
}

// unseed removes what seed put there. A tier that another demo still uses stays.
func unseed(ctx context.Context, pool *pgxpool.Pool, examples []example) error {
	var hashes [][]byte
	var orgs []string
	for _, e := range examples {
		if e.apiKey != "" {
			h := apikey.HashKey(e.apiKey)
			hashes, orgs = append(hashes, h[:]), append(orgs, e.key.OrgID)
		}
	}
	var b pgx.Batch
	b.Queue(`DELETE FROM api_keys WHERE key_hash = ANY ($1)`, hashes)
	b.Queue(`DELETE FROM org_plans o WHERE org_id = ANY ($1) AND NOT EXISTS (SELECT FROM api_keys k WHERE k.org_id = o.org_id)`, orgs)
	b.Queue(`DELETE FROM plan_catalogue c WHERE name IN ($1, $2) AND NOT EXISTS (SELECT FROM org_plans o WHERE o.plan = c.name)`,
		demoStarter, demoBasic)
	if err := pool.SendBatch(ctx, &b).Close(); err != nil {
		return fmt.Errorf("removing the demo's rows: %w", err)
	}
	return nil
}
