package world

import (
	"crypto/rand"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/testservers"
)

// Postgres is a world in a database of its own. Its organisations are
// rows of a table such as users have, which the keys refer to.
type Postgres struct {
	*apikey.PostgresKeyStore
	*apikey.PostgresPlanStore
	Pool *pgxpool.Pool
}

// NewPostgres returns a world in a new database.
func NewPostgres(t testing.TB) *Postgres {
	t.Helper()
	return NewPostgresOn(t, testservers.Postgres(t))
}

// NewPostgresOn returns a world in a database that has all migrations applied.
func NewPostgresOn(t testing.TB, pool *pgxpool.Pool) *Postgres {
	t.Helper()
	testservers.Exec(t, pool, `
		CREATE TABLE organisations (id text PRIMARY KEY);
		ALTER TABLE api_keys ADD FOREIGN KEY (org_id) REFERENCES organisations ON DELETE CASCADE;
		ALTER TABLE org_plans ADD FOREIGN KEY (org_id) REFERENCES organisations ON DELETE CASCADE;
		INSERT INTO plan_catalogue VALUES ('starter', true), ('basic', false)`)
	return &Postgres{apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), pool}
}

// Enrol implements [World].
func (w *Postgres) Enrol(t testing.TB, k KeyState, p PlanState) (string, apikey.Org) {
	t.Helper()
	apiKey := keyformat.New(keyformat.Live)
	hash := apikey.HashKey(apiKey)
	org := apikey.Org{ID: "org_" + rand.Text()}
	testservers.Exec(t, w.Pool, `INSERT INTO organisations VALUES ($1)`, org.ID)
	if plan, ok := PlanFacts()[p]; ok {
		if p == Downgraded { // the way there counts too
			testservers.Exec(t, w.Pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ($1, 'starter', 'active')`, org.ID)
		}
		testservers.Exec(t, w.Pool, `INSERT INTO org_plans (org_id, plan, status, ends_at) VALUES ($1, $2, $3, $4)
			ON CONFLICT (org_id) DO UPDATE SET plan = excluded.plan, status = excluded.status, ends_at = excluded.ends_at`,
			org.ID, plan.Name, plan.Status, pg.NullTime(plan.EndsAt))
		org.Plan = plan
	}
	if k == Unknown {
		return apiKey, org
	}
	err := w.Pool.QueryRow(t.Context(),
		`INSERT INTO api_keys (org_id, key_hash) VALUES ($1, $2) RETURNING id::text`, org.ID, hash[:]).Scan(&org.KeyID)
	if err != nil {
		t.Fatal(err)
	}
	switch k {
	case Expired:
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET expires_at = now() WHERE id = $1`, org.KeyID)
	case Unexpired:
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET expires_at = now() + '1 day' WHERE id = $1`, org.KeyID)
	case Deactivated:
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	case Deleted:
		testservers.Exec(t, w.Pool, `DELETE FROM api_keys WHERE id = $1`, org.KeyID)
	case OrgDeleted:
		testservers.Exec(t, w.Pool, `DELETE FROM organisations WHERE id = $1`, org.ID)
	}
	return apiKey, org
}
