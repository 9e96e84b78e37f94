package apikey_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/apikeytest"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

func TestHashKey(t *testing.T) {
	for _, key := range []string{"", "k", keyformat.New(keyformat.Live), strings.Repeat("x", 64), strings.Repeat("x", 512)} {
		if got, want := apikey.HashKey(key), sha256.Sum256([]byte(key)); got != want {
			t.Errorf("HashKey(%d bytes) = %x, want %x", len(key), got, want)
		}
	}
}

// TestConformance: the stores do what every store must.
func TestConformance(t *testing.T) {
	t.Parallel()
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true), ('basic', false)`)
	apikeytest.TestKeyStore(t, apikeytest.Keys{
		Store: apikey.NewPostgresKeyStore(pool),
		Put: func(t *testing.T, h apikey.KeyHash, k apikey.Key) (id string) {
			err := pool.QueryRow(t.Context(), `INSERT INTO api_keys (org_id, key_hash, active, expires_at) VALUES ($1, $2, $3, $4)
				ON CONFLICT (key_hash) DO UPDATE SET org_id = excluded.org_id, active = excluded.active, expires_at = excluded.expires_at
				RETURNING id::text`, k.OrgID, h[:], k.Active, pg.NullTime(k.ExpiresAt)).Scan(&id)
			world.MustNot(t, err)
			return id
		},
		Remove: func(t *testing.T, h apikey.KeyHash) {
			testservers.Exec(t, pool, `DELETE FROM api_keys WHERE key_hash = $1`, h[:])
		},
	})
	plans := admin.NewPlans(pool)
	apikeytest.TestPlanStore(t, apikeytest.Plans{
		Store: apikey.NewPostgresPlanStore(pool),
		Put: func(t *testing.T, orgID string, p apikey.Plan) {
			world.MustNot(t, plans.Subscribe(t.Context(), orgID, p.Name, p.Status, p.EndsAt))
		},
		Remove: func(t *testing.T, orgID string) {
			testservers.Exec(t, pool, `DELETE FROM org_plans WHERE org_id = $1`, orgID)
		},
	})
}

// TestStoresAreStamped: both answers of both stores tell the snapshot that they
// were read in, and it is the statement's own.
func TestStoresAreStamped(t *testing.T) {
	w := world.NewPostgres(t)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	for name, read := range map[string]func(context.Context) error{
		"key":         func(ctx context.Context) error { _, err := w.Key(ctx, apikey.HashKey(apiKey)); return err },
		"absent key":  func(ctx context.Context) error { _, err := w.Key(ctx, apikey.HashKey("")); return err },
		"plan":        func(ctx context.Context) error { _, err := w.Plan(ctx, org.ID); return err },
		"absent plan": func(ctx context.Context) error { _, err := w.Plan(ctx, "nobody"); return err },
	} {
		t.Run(name, func(t *testing.T) {
			// One transaction that has ended before the read, one that is open during it.
			xid := func(db interface {
				QueryRow(context.Context, string, ...any) pgx.Row
			}) (x uint64) {
				if err := db.QueryRow(t.Context(), `SELECT pg_current_xact_id()::text::bigint`).Scan(&x); err != nil {
					t.Fatal(err)
				}
				return x
			}
			open, err := w.Pool.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer open.Rollback(context.WithoutCancel(t.Context())) //nolint:errcheck // the connection goes with the database
			running, ended := xid(open), xid(w.Pool)

			ctx, stamp := snapshot.Collect(t.Context())
			if err := read(ctx); err != nil && !errors.Is(err, apikey.ErrNotFound) {
				t.Fatal(err)
			}
			later := xid(w.Pool)
			got := stamp.Snapshot()
			if !got.Sees(ended) || got.Sees(running) || got.Sees(later) {
				t.Errorf("snapshot %s sees ended %d: %v, running %d: %v, later %d: %v; want true, false, false",
					got, ended, got.Sees(ended), running, got.Sees(running), later, got.Sees(later))
			}
		})
	}
}

// TestStoresCouldNotLook: what is not an answer is not ErrNotFound.
func TestStoresCouldNotLook(t *testing.T) {
	t.Parallel()
	pool := testservers.Postgres(t)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	closed, err := pgxpool.New(t.Context(), pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	empty := testservers.Postgres(t)
	testservers.Exec(t, empty, `DROP TABLE api_keys, api_key_uses, org_plans`)

	for name, c := range map[string]struct {
		ctx context.Context
		db  apikey.DB
	}{
		"cancelled":   {cancelled, pool},
		"pool closed": {t.Context(), closed},
		"no tables":   {t.Context(), empty},
	} {
		_, keyErr := apikey.NewPostgresKeyStore(c.db).Key(c.ctx, apikey.HashKey("k"))
		_, planErr := apikey.NewPostgresPlanStore(c.db).Plan(c.ctx, "org_1")
		for _, err := range []error{keyErr, planErr} {
			if err == nil || errors.Is(err, apikey.ErrNotFound) || !strings.HasPrefix(err.Error(), "apikey: reading ") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestStoresOnAnyDB: the stores work on a pool, a connection and a transaction.
func TestStoresOnAnyDB(t *testing.T) {
	w := world.NewPostgres(t)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	conn, err := w.Pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, db := range map[string]apikey.DB{"pool": w.Pool, "transaction": tx, "connection": conn.Conn()} {
		key, err := apikey.NewPostgresKeyStore(db).Key(t.Context(), apikey.HashKey(apiKey))
		if err != nil || key.ID != org.KeyID {
			t.Errorf("%s: Key = %+v, %v", name, key, err)
		}
		plan, err := apikey.NewPostgresPlanStore(db).Plan(t.Context(), org.ID)
		if err != nil || plan != org.Plan {
			t.Errorf("%s: Plan = %+v, %v", name, plan, err)
		}
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestLookupsUseIndexes shows the plans of the two statements on tables of a
// size at which a scan would hurt.
func TestLookupsUseIndexes(t *testing.T) {
	t.Parallel()
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `
		INSERT INTO plan_catalogue SELECT 'plan' || i, true FROM generate_series(1, 5) i;
		INSERT INTO org_plans (org_id, plan, status)
			SELECT 'org' || i, 'plan' || 1 + i % 5, 'active' FROM generate_series(1, 20000) i;
		INSERT INTO api_keys (org_id, key_hash)
			SELECT 'org' || i, sha256(i::text::bytea) FROM generate_series(1, 20000) i;
		ANALYZE`)
	scan := regexp.MustCompile(`"Seq Scan"[^}]*"(api_keys|org_plans)"`)
	h := apikey.HashKey("123")
	hashes := [][]byte{h[:]}
	for _, c := range []struct {
		sql   string
		arg   any
		index string
	}{
		{apikey.KeySQL[0], h[:], "api_keys_key_hash_key"},
		{apikey.KeySQL[1], hashes, "api_keys_key_hash_key"},
		{apikey.KeyAndPlanSQL[0], h[:], "api_keys_key_hash_key"},
		{apikey.KeyAndPlanSQL[0], h[:], "org_plans_pkey"},
		{apikey.KeyAndPlanSQL[1], hashes, "api_keys_key_hash_key"},
		{apikey.KeyAndPlanSQL[1], hashes, "org_plans_pkey"},
		{apikey.PlanSQL[0], "org123", "org_plans_pkey"},
		{apikey.PlanSQL[1], []string{"org123"}, "org_plans_pkey"},
	} {
		// Both ways in which a prepared statement may come to run.
		for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
			conn, err := pool.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Exec(t.Context(), "SET plan_cache_mode = "+mode); err != nil {
				t.Fatal(err)
			}
			var plan json.RawMessage
			err = conn.QueryRow(t.Context(), "EXPLAIN (ANALYZE, FORMAT JSON) "+c.sql, c.arg).Scan(&plan)
			conn.Release()
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(plan), `"Index Name": "`+c.index+`"`) || scan.Match(plan) {
				t.Errorf("%s: the lookup does not use %s alone:\n%s", mode, c.index, plan)
			}
		}
	}
}
