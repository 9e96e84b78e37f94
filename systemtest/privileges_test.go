package systemtest

// What a login of the database can make of the functions that have the rights of their owner.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
	"github.com/trackpilots/apikey/migrations"
)

// A stage is a database with an owner of the tables, who is no superuser, a login that may
// connect and make temporary objects, as everybody may, and a server for both alone: roles
// belong to all databases of a server.
type stage struct {
	super, owner *pgxpool.Pool
	intruderURL  string
}

// newStage makes a stage before the tables are there. prepare is run by a superuser.
func newStage(t *testing.T, prepare string) *stage {
	t.Helper()
	server := testservers.StartPostgres(t)
	s := &stage{super: testservers.Pool(t, server.URL)}
	testservers.Exec(t, s.super, `CREATE ROLE tables_owner LOGIN; CREATE ROLE intruder LOGIN; CREATE ROLE anon; ALTER SCHEMA public OWNER TO tables_owner; `+prepare)
	s.owner, s.intruderURL = testservers.Pool(t, asRole(t, server.URL, "tables_owner")), asRole(t, server.URL, "intruder")
	return s
}

// write makes every kind of change as the owner, and announces.
func (s *stage) write(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	keys, plans := admin.NewKeys(s.owner), admin.NewPlans(s.owner)
	world.MustNot(t, plans.DefineTier(ctx, "starter", true))
	world.MustNot(t, plans.Subscribe(ctx, "org", "starter", apikey.PlanActive, time.Now().Add(time.Hour)))
	world.MustNot(t, plans.SetStatus(ctx, "org", apikey.PlanPastDue))
	for range 3 {
		key, _, err := keys.Create(ctx, "org", admin.NewKey{Name: "n", ExpiresAt: time.Now().Add(time.Hour)})
		world.MustNot(t, err)
		world.MustNot(t, keys.Deactivate(ctx, "org", key.ID))
	}
	// Many, so that what is done once in a thousand times is done.
	testservers.Exec(t, s.owner, `INSERT INTO apikey_outbox (kind, subject, at) SELECT 'plan', i::text, now() - interval '2 hours' FROM generate_series(1, 100) i`)
	testservers.Exec(t, s.owner, `DO $$ BEGIN FOR i IN 1..8000 LOOP UPDATE org_plans SET ends_at = clock_timestamp(); COMMIT; END LOOP; END $$`)
	testservers.Exec(t, s.owner, `INSERT INTO api_keys (org_id, key_hash) SELECT 'bulk', sha256(i::text::bytea) FROM generate_series(1, 2500) i`)
	testservers.Exec(t, s.owner, `UPDATE api_keys SET active = false; DELETE FROM api_keys; INSERT INTO plan_catalogue VALUES ('gone', true); DELETE FROM plan_catalogue WHERE name = 'gone'`)
	testservers.Exec(t, s.owner, `INSERT INTO apikey_outbox (kind, subject) SELECT 'plan', i::text FROM generate_series(1, 20000) i`)
	for range 4 { // a backlog, and what is left of it
		testservers.Exec(t, s.owner, `SELECT apikey_announce()`)
		testservers.Exec(t, s.owner, `INSERT INTO apikey_outbox (kind) VALUES ('plans')`)
	}
	var is bool
	world.MustNot(t, s.owner.QueryRow(ctx, `SELECT `+feed.AnnouncerSQL).Scan(&is))
	if _, err := migrations.Missing(ctx, s.owner); err != nil {
		t.Error(err)
	}

	// And what services and dashboards do.
	key, secret, err := keys.Create(ctx, "another", admin.NewKey{})
	world.MustNot(t, err)
	world.MustNot(t, plans.Subscribe(ctx, "another", "starter", apikey.PlanActive, time.Time{}))
	r := world.NewWatchedReplica(t, s.owner, testservers.Redis(t), world.NewSecret(), nil)
	r.WantCode(t, secret.Reveal(), world.Admitted)
	uses := apikey.NewLastUsed(s.owner, time.Nanosecond)
	used := world.Replica{Middleware: apikey.New(apikey.NewPostgresKeyStore(s.owner), apikey.NewPostgresPlanStore(s.owner), &apikey.Options{LastUsed: uses})}
	used.WantCode(t, secret.Reveal(), world.Admitted)
	ended, cancel := context.WithCancel(ctx)
	cancel()
	world.MustNot(t, uses.Run(ended))
	rotated, _, err := keys.Rotate(ctx, "another", key.ID, time.Now().Add(time.Hour), admin.NewKey{})
	world.MustNot(t, err)
	world.MustNot(t, keys.Expire(ctx, "another", rotated.ID, time.Now().Add(time.Minute)))
	_, err = keys.DeactivateAll(ctx, "another")
	world.MustNot(t, err)
	_, _, err = keys.List(ctx, "another", admin.Page{Limit: 1})
	world.MustNot(t, err)
	_, err = keys.Find(ctx, key.ID)
	world.MustNot(t, err)
	_, err = keys.Prune(ctx, time.Now().Add(-time.Hour))
	world.MustNot(t, err)
	world.MustNot(t, errors.Join(plans.SetTier(ctx, "another", "starter"), plans.SetEnd(ctx, "another", time.Now()), keys.Delete(ctx, "another", key.ID)))
}

// spied returns who ran the intruder's code.
func (s *stage) spied(t *testing.T) []string {
	t.Helper()
	rows, err := s.super.Query(t.Context(), `SELECT DISTINCT role || ': ' || what FROM spied WHERE role <> 'intruder' ORDER BY 1`)
	world.MustNot(t, err)
	spied, err := pgx.CollectRows(rows, pgx.RowTo[string])
	world.MustNot(t, err)
	return spied
}

// spySQL is a table to which whatever runs the intruder's code leaves its role.
const spySQL = `CREATE TABLE spied (role text, what text); GRANT INSERT, SELECT ON spied TO PUBLIC; `

// spyTypes are types of the operands in our SQL.
var spyTypes = []string{
	"boolean", "int2", "int4", "int8", "oid", "numeric", "float8", "text", "name", "varchar", "bytea", "xid", "xid8", "timestamptz", "interval", "regclass", "regnamespace", "uuid", "pg_snapshot", "char", "anyelement", "anyarray",
}

// TestWritableSchema: in a schema where everybody may create objects, as was the default of
// public up to PostgreSQL 14, an intruder adds every operator and function that ours could be
// taken for. Nobody runs them: not who migrates, nor who writes, nor who announces.
func TestWritableSchema(t *testing.T) {
	t.Parallel()
	s := newStage(t, spySQL+`GRANT CREATE, USAGE ON SCHEMA public TO PUBLIC`)
	intruder := testservers.Pool(t, s.intruderURL)
	for op, result := range map[string]string{
		"=": "boolean", "<>": "boolean", "<": "boolean", ">": "boolean", "<=": "boolean", ">=": "boolean", "~": "boolean", "~~": "boolean", "||": "text", "+": "", "-": "", "*": "", "/": "",
	} {
		for _, left := range spyTypes {
			var batch strings.Builder
			for _, right := range spyTypes {
				name := fmt.Sprintf("spy_%x_%s_%s", op, left, right)
				fmt.Fprintf(&batch, `DO $do$ BEGIN
					CREATE FUNCTION %s(a %s, b %s) RETURNS %s LANGUAGE plpgsql AS $$ BEGIN INSERT INTO spied VALUES (current_user, '%[1]s'); RETURN NULL; END $$;
					CREATE OPERATOR public.%[5]s (LEFTARG = %[2]s, RIGHTARG = %[3]s, FUNCTION = %[1]s);
				EXCEPTION WHEN OTHERS THEN NULL; END $do$; `, name, left, right, cmp.Or(result, left), op) // some pairs are not allowed
			}
			testservers.Exec(t, intruder, batch.String())
		}
	}
	var operators int
	if err := s.super.QueryRow(t.Context(), `SELECT count(*) FROM pg_operator WHERE oprnamespace OPERATOR(pg_catalog.=) 'public'::regnamespace::oid`).Scan(&operators); err != nil || operators < 4000 {
		t.Fatalf("%d operators, %v", operators, err)
	}
	for _, fn := range []string{
		"now", "random", "encode", "sha256", "substring", "convert_to", "concat_ws", "pg_notify", "set_config", "current_setting", "nullif", "coalesce", "hashtext", "to_regclass",
		"quote_ident", "pg_get_userbyid", "octet_length", "char_length", "isfinite", "aclexplode", "acldefault", "format", "extract", "date_part", "gen_random_uuid", "current_schema",
	} {
		for _, args := range []string{"", "name", "varchar", "char", "int2", "int4", "oid", "float8", "name, name", "text, name", "varchar, text", "bytea, int4, int2", "varchar, name"} {
			testservers.Exec(t, intruder, fmt.Sprintf(`DO $do$ BEGIN
				CREATE FUNCTION public.%s(%s) RETURNS text LANGUAGE plpgsql AS $$ BEGIN INSERT INTO spied VALUES (current_user, '%[1]s(%[2]s)'); RETURN NULL; END $$;
				EXCEPTION WHEN OTHERS THEN NULL; END $do$`, fn, args))
		}
	}
	world.MustNot(t, migrations.Apply(t.Context(), s.owner))
	if spied := s.spied(t); len(spied) > 0 {
		t.Fatalf("while migrating, code of the intruder ran as %q", spied)
	}
	s.write(t)
	if spied := s.spied(t); len(spied) > 0 {
		t.Errorf("code of the intruder ran as %q", spied)
	}

	// The trap works: who uses these operators runs them.
	testservers.Exec(t, s.owner, `SELECT 1::float8 < 1::numeric`)
	if spied := s.spied(t); len(spied) != 1 || !strings.HasPrefix(spied[0], "tables_owner: spy_") {
		t.Errorf("the trap has caught %q", spied)
	}
}

// TestIntruder: a login that may connect, and another one that may also announce, try what
// PostgreSQL lets everybody do.
func TestIntruder(t *testing.T) {
	t.Parallel()
	s := newStage(t, spySQL)
	world.MustNot(t, migrations.Apply(t.Context(), s.owner))
	r := world.NewWatchedReplica(t, s.owner, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	conn, err := pgx.Connect(t.Context(), s.intruderURL)
	world.MustNot(t, err)
	defer conn.Close(t.Context())
	do := func(sql string) error { _, err := conn.Exec(t.Context(), sql); return err }
	refused := func(sql string) {
		t.Helper()
		var e *pgconn.PgError
		if err := do(sql); err == nil {
			t.Errorf("allowed: %s", sql)
		} else if e, _ = err.(*pgconn.PgError); e == nil || e.Code != "42501" { //nolint:errorlint // of Exec
			t.Errorf("%s: %v, want permission denied", sql, err)
		}
	}

	refused(`SELECT apikey_announce()`)
	refused(`INSERT INTO apikey_outbox (kind) VALUES ('all')`)
	refused(`SELECT * FROM apikey_outbox`)
	refused(`UPDATE apikey_settings SET announce_every = '1 minute'`)
	refused(`TRUNCATE apikey_announced`)
	refused(`SELECT apikey_tidy()`)

	// Temporary types, tables and casts that our functions could be taken in by.
	world.MustNot(t, do(`CREATE FUNCTION pg_temp.spy(v anyelement) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.spied VALUES (current_user, 'a temporary type'); RETURN true; END $$`))
	for _, typ := range []string{"text", "integer", "int4", "bigint", "int8", "xid8", "pg_snapshot", "interval", "boolean", "bool", "apikey_announced"} {
		if err := do(`CREATE DOMAIN pg_temp.` + typ + ` AS pg_catalog.varchar CHECK (pg_temp.spy(VALUE))`); err != nil {
			t.Logf("%s: %v", typ, err) // a keyword
		}
	}
	world.MustNot(t, do(`CREATE TEMP TABLE mine (org_id pg_catalog.text, key_hash bytea, name pg_catalog.text)`))
	for _, table := range []string{"apikey_outbox", "apikey_settings"} {
		world.MustNot(t, do(`CREATE TEMP TABLE `+table+` (LIKE mine)`))
	}
	for _, fn := range []string{"apikey_announce_key()", "apikey_announce_plan()", "apikey_announce_tier()", "apikey_announce_all('" + strings.Repeat("x", 8000) + "')"} {
		refused(`CREATE TRIGGER t AFTER INSERT ON mine FOR EACH ROW EXECUTE FUNCTION public.` + fn)
	}
	testservers.Exec(t, s.owner, `GRANT EXECUTE ON FUNCTION apikey_announce() TO intruder`) // a service that was taken over
	for range 3 {
		testservers.Exec(t, s.owner, `INSERT INTO apikey_outbox (kind) VALUES ('plans')`)
		world.MustNot(t, do(`SELECT public.apikey_announce()`))
	}
	if spied := s.spied(t); len(spied) > 0 {
		t.Errorf("code of the intruder ran as %q", spied)
	}

	// What everybody may send: the feed goes on, and changes take effect.
	for _, payload := range []string{"orgs 10 x", "all 10 and more", "key 10", "?later 10", "x"} {
		world.MustNot(t, do(`NOTIFY apikey_changes, '`+payload+`'`))
	}
	world.WaitFor(t, func() bool { s := r.Cache.Stats(); return s.FeedLive && s.Unknown >= 2 })

	// An announcement tells an intruder who listens nothing about whom it concerns.
	world.MustNot(t, do(`LISTEN apikey_changes`))
	plans := admin.NewPlans(s.owner)
	world.MustNot(t, plans.DefineTier(t.Context(), "secret-tier", true))
	world.MustNot(t, plans.Subscribe(t.Context(), "secret-org", "secret-tier", apikey.PlanActive, time.Time{}))
	for heard := 0; heard < 3; {
		n, err := conn.WaitForNotification(t.Context())
		world.MustNot(t, err)
		if strings.Contains(n.Payload, "secret") {
			t.Errorf("heard %q", n.Payload)
		}
		if !strings.HasPrefix(n.Payload, "?") && !strings.HasPrefix(n.Payload, "orgs") {
			heard++
		}
	}
}

// TestPrivileges: what PUBLIC, and the roles that a platform gives everything by default, may do
// with what the migrations make.
func TestPrivileges(t *testing.T) {
	t.Parallel()
	s := newStage(t, `ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO anon; ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO anon, PUBLIC;
		ALTER DEFAULT PRIVILEGES FOR ROLE tables_owner GRANT ALL ON TABLES TO anon; ALTER DEFAULT PRIVILEGES FOR ROLE tables_owner GRANT ALL ON FUNCTIONS TO anon`)
	world.MustNot(t, migrations.Apply(t.Context(), s.owner))
	query := func(sql string) []string {
		t.Helper()
		rows, err := s.super.Query(t.Context(), sql)
		world.MustNot(t, err)
		found, err := pgx.CollectRows(rows, pgx.RowTo[string])
		world.MustNot(t, err)
		return found
	}
	// Whatever is in the schema is ours, so that the next table or function cannot slip in.
	objects := query(`SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
		UNION ALL SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1`)
	want := []string{
		"api_key_uses", "api_keys", "apikey_announce()", "apikey_announce_all()", "apikey_announce_key()", "apikey_announce_plan()", "apikey_announce_tier()",
		"apikey_announced", "apikey_migrations", "apikey_outbox", "apikey_settings", "apikey_tidy()", "org_plans", "plan_catalogue",
	}
	if !slices.Equal(objects, want) {
		t.Errorf("the migrations make %q, want %q", objects, want)
	}
	if open := query(`SELECT format('%s: %s', oid::regprocedure, a) FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner))) a
		WHERE pronamespace = 'public'::regnamespace AND a.grantee <> proowner
		UNION ALL SELECT format('%s: %s', oid::regclass, a) FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner))) a
		WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND a.grantee <> relowner`); len(open) > 0 {
		t.Errorf("others may use %q", open)
	}
	if loose := query(`SELECT format('%s: %s', oid::regprocedure, proconfig) FROM pg_proc
		WHERE pronamespace = 'public'::regnamespace AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)`); len(loose) > 0 {
		t.Errorf("functions with the search_path of whoever calls them: %q", loose)
	}
}

// TestMadeBefore: where everybody may create tables, what an intruder has made under the name of the
// table of migrations does not run its code as who migrates, or looks whether he has to.
func TestMadeBefore(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ sql, drop, want string }{
		"a table with a trigger": {`CREATE TABLE apikey_migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now());
			CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO spied VALUES (current_user, 'a trigger'); RETURN NULL; END $$;
			CREATE TRIGGER t AFTER INSERT ON apikey_migrations FOR EACH ROW EXECUTE FUNCTION spy()`, `DROP TABLE apikey_migrations`, "belongs to intruder"},
		"a view": {`CREATE FUNCTION spy() RETURNS text LANGUAGE plpgsql AS $$ BEGIN INSERT INTO spied VALUES (current_user, 'a view'); RETURN '0001_apikey.sql'; END $$;
			CREATE VIEW apikey_migrations AS SELECT spy() AS name`, `DROP VIEW apikey_migrations`, "is not a table that Apply has made"},
		"row security": {`CREATE TABLE apikey_migrations (name text PRIMARY KEY); INSERT INTO apikey_migrations VALUES ('0001_apikey.sql');
			CREATE FUNCTION spy() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN INSERT INTO spied VALUES (current_user, 'a policy'); RETURN true; END $$;
			ALTER TABLE apikey_migrations ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON apikey_migrations USING (spy())`, `DROP TABLE apikey_migrations`, "is not a table that Apply has made"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, spySQL+`GRANT CREATE, USAGE ON SCHEMA public TO PUBLIC`)
			testservers.Exec(t, testservers.Pool(t, s.intruderURL), c.sql+`; GRANT ALL ON apikey_migrations TO PUBLIC`)
			for _, pool := range []*pgxpool.Pool{s.owner, s.super} {
				_, _ = migrations.Missing(t.Context(), pool)
				if err := migrations.Apply(t.Context(), pool); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("Apply = %v, want an error that says that it %s", err, c.want)
				}
			}
			if spied := s.spied(t); len(spied) > 0 {
				t.Errorf("code of the intruder ran as %q", spied)
			}
			testservers.Exec(t, s.super, c.drop)
			world.MustNot(t, migrations.Apply(t.Context(), s.owner))
			world.MustNot(t, migrations.Apply(t.Context(), s.super)) // nothing is missing
		})
	}
}

// TestForgedMany: a login without rights announces more than can be verified, and more for one subject
// than can be compared. The session ends, requests do not wait for that, and nothing of it stays.
func TestForgedMany(t *testing.T) {
	t.Parallel()
	for name, payload := range map[string]string{
		"all": `'all ' || (1::bigint << 40) + i`, "one key": `'key ' || (1::bigint << 40) + i || ' 0011223344556677'`,
		"all, soon": `'all ' || pg_current_xact_id()::text::bigint + 1000 + i`, "many keys": `'key ' || pg_current_xact_id()::text::bigint + 1000 + i % 1000 || ' ' || lpad(to_hex(i), 16, '0')`,
	} {
		t.Run(name, func(t *testing.T) {
			w := world.NewPostgres(t)
			r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: 5 * time.Second})
			apiKey, _ := w.Enrol(t, world.Live, world.Paid)
			r.WantCode(t, apiKey, world.Admitted)
			over := make(chan struct{})
			longest := make(chan time.Duration)
			go func() {
				var most time.Duration
				for {
					select {
					case <-over:
						longest <- most
						return
					default:
					}
					start := time.Now()
					r.Ask(apiKey)
					most = max(most, time.Since(start))
					time.Sleep(time.Millisecond)
				}
			}()
			testservers.Exec(t, w.Pool, `SELECT count(pg_notify('apikey_changes', `+payload+`)) FROM generate_series(1, 120000) i`)
			world.WaitFor(t, func() bool {
				err := r.Cache.Stats().FeedErr
				return err != nil && strings.Contains(err.Error(), "more is announced")
			})
			world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
			close(over)
			if most := <-longest; most > 3*time.Second {
				t.Errorf("a request took %v", most)
			}
			world.WaitFor(t, func() bool { // a read or two until what is forged is found out
				before := r.Cache.Stats().StoreReads
				for range 100 {
					r.WantCode(t, apiKey, world.Admitted)
				}
				return r.Cache.Stats().StoreReads-before < 3
			})
		})
	}
}
