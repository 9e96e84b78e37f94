package migrations_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/migrations"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

func TestFS(t *testing.T) {
	if err := fstest.TestFS(migrations.FS, "0001_apikey.sql"); err != nil {
		t.Error(err)
	}
	files, err := migrations.FS.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for i, file := range files {
		if want := regexp.MustCompile(fmt.Sprintf(`^%04d_[a-z0-9_]+\.sql$`, i+1)); !want.MatchString(file.Name()) {
			t.Errorf("%s does not match %s", file.Name(), want)
		}
	}
}

// TestApplyAgain: what has been applied is not applied again, and data stay.
func TestApplyAgain(t *testing.T) {
	pool := testservers.Postgres(t) // applies once
	testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true)`)
	for range 2 {
		if err := migrations.Apply(t.Context(), pool); err != nil {
			t.Fatal(err)
		}
	}
	var plans, applied int
	err := pool.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM plan_catalogue), (SELECT count(*) FROM apikey_migrations)`).
		Scan(&plans, &applied)
	if err != nil || plans != 1 || applied != 1 {
		t.Errorf("%d plans, %d migrations, %v; want 1, 1", plans, applied, err)
	}
}

// TestApplyTogether: replicas that start at once and all migrate.
func TestApplyTogether(t *testing.T) {
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `DROP SCHEMA public CASCADE; CREATE SCHEMA public`)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := migrations.Apply(t.Context(), pool); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	testservers.Exec(t, pool, `SELECT key_hash FROM api_keys`)
}

// TestApplyAllOrNothing: a migration that fails leaves nothing behind.
func TestApplyAllOrNothing(t *testing.T) {
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `DROP TABLE api_keys, api_key_uses; DELETE FROM apikey_migrations`) // org_plans stands in the way
	err := migrations.Apply(t.Context(), pool)
	if err == nil || !strings.Contains(err.Error(), "0001_apikey.sql") {
		t.Errorf("Apply = %v, want an error that names the file", err)
	}
	var left *string
	if err := pool.QueryRow(t.Context(), `SELECT to_regclass('api_keys')::text`).Scan(&left); err != nil || left != nil {
		t.Errorf("api_keys is there after a failure: %v, %v", left, err)
	}
}

// TestApplyByReader: who may only read finds that nothing is missing, or what is.
func TestApplyByReader(t *testing.T) {
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `CREATE ROLE reader_of_migrations LOGIN PASSWORD 'p'; GRANT SELECT ON apikey_migrations TO reader_of_migrations`)
	defer testservers.Exec(t, pool, `DROP OWNED BY reader_of_migrations; DROP ROLE reader_of_migrations`)
	config := pool.Config()
	config.ConnConfig.User, config.ConnConfig.Password = "reader_of_migrations", "p"
	reader, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := migrations.Apply(t.Context(), reader); err != nil {
		t.Errorf("Apply = %v although nothing is missing", err)
	}
	testservers.Exec(t, pool, `DELETE FROM apikey_migrations WHERE name LIKE '0001%'`)
	if missing, err := migrations.Missing(t.Context(), reader); err != nil || !slices.Equal(missing, []string{"0001_apikey.sql"}) {
		t.Errorf("Missing = %q, %v", missing, err)
	}
	if err := migrations.Apply(t.Context(), reader); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("Apply = %v, want permission denied", err)
	}
}

// TestForeignTables: a database that has tables of these names already is left alone, and
// ours can be made in a schema of their own.
func TestForeignTables(t *testing.T) {
	url := testservers.EmptyPostgresURL(t)
	pool := testservers.Pool(t, url)
	testservers.Exec(t, pool, `CREATE TABLE api_keys (id bigint, token text)`)
	for _, apply := range []func() error{
		func() error { return migrations.Apply(t.Context(), pool) },
		func() error { _, err := migrations.Missing(t.Context(), pool); return err },
	} {
		if err := apply(); err == nil || !strings.Contains(err.Error(), "a table api_keys already that is not of these migrations: it has no column") {
			t.Errorf("%v", err)
		}
	}
	testservers.Exec(t, pool, `CREATE SCHEMA apikey`)
	own := testservers.Pool(t, testservers.Migrated(t, url+"&search_path=apikey,public"))
	testservers.Exec(t, own, `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('k'))`)
	testservers.Exec(t, pool, `INSERT INTO public.api_keys VALUES (1, 'theirs')`)
}

// TestConstraints: rows that authentication could not make sense of do not get in.
func TestConstraints(t *testing.T) {
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true);
		INSERT INTO api_keys (org_id, key_hash) VALUES ('taken', sha256('taken'))`)
	for name, sql := range map[string]string{
		"hash too short":     `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', '\x00')`,
		"hash missing":       `INSERT INTO api_keys (org_id) VALUES ('o')`,
		"hash taken":         `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('taken'))`,
		"no organisation":    `INSERT INTO api_keys (org_id, key_hash) VALUES ('', sha256('k'))`,
		"long organisation":  `INSERT INTO api_keys (org_id, key_hash) VALUES (repeat('o', 256), sha256('k'))`,
		"key to infinity":    `INSERT INTO api_keys (org_id, key_hash, expires_at) VALUES ('o', sha256('k'), 'infinity')`,
		"active unknown":     `INSERT INTO api_keys (org_id, key_hash, active) VALUES ('o', sha256('k'), NULL)`,
		"plan unknown":       `INSERT INTO org_plans (org_id, plan, status) VALUES ('o', 'gold', 'active')`,
		"plan of nobody":     `INSERT INTO org_plans (org_id, plan, status) VALUES ('', 'starter', 'active')`,
		"no status":          `INSERT INTO org_plans (org_id, plan, status) VALUES ('o', 'starter', '')`,
		"plan to infinity":   `INSERT INTO org_plans (org_id, plan, status, ends_at) VALUES ('o', 'starter', 'active', 'infinity')`,
		"tier without a say": `INSERT INTO plan_catalogue (name) VALUES ('gold')`,
		"tier without name":  `INSERT INTO plan_catalogue VALUES ('', true)`,
	} {
		if _, err := pool.Exec(t.Context(), sql); err == nil {
			t.Errorf("%s: got in by %s", name, sql)
		}
	}
}

// TestAnnouncements: each change of what authentication reads is announced, once
// a subject, by the transaction that made it; nothing else is.
func TestAnnouncements(t *testing.T) {
	pool := testservers.Postgres(t)
	conn := listen(t, pool)
	subject := func(key string) string {
		var s string
		if err := pool.QueryRow(t.Context(), `SELECT encode(substring(sha256($1::text::bytea), 1, 8), 'hex')`, key).Scan(&s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	k1, k2, k3 := "key "+subject("1"), "key "+subject("2"), "key "+subject("3")
	plan := func(orgID string) string { return "plan " + subject(orgID) }
	tier := func(name string) string { return "tier " + subject(name) }
	testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true), ('basic', false);
		CREATE TABLE organisations (id text PRIMARY KEY);
		INSERT INTO organisations VALUES ('gone');
		ALTER TABLE api_keys ADD COLUMN usage bigint NOT NULL DEFAULT 0`)
	announced(t, conn, pool)

	for _, c := range []struct {
		name string
		sql  string
		want []string
	}{
		{"insert keys", `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('1')), ('o', sha256('2'))`, []string{k1, k2}},
		{"deactivate", `UPDATE api_keys SET active = false WHERE key_hash = sha256('1')`, []string{k1}},
		{"deactivate again", `UPDATE api_keys SET active = false WHERE key_hash = sha256('1')`, nil},
		{"expire", `UPDATE api_keys SET expires_at = now() WHERE key_hash = sha256('1')`, []string{k1}},
		{"move", `UPDATE api_keys SET org_id = 'p' WHERE key_hash = sha256('1')`, []string{k1}},
		{"new id", `UPDATE api_keys SET id = gen_random_uuid() WHERE key_hash = sha256('1')`, []string{k1}},
		{"new hash", `UPDATE api_keys SET key_hash = sha256('3') WHERE key_hash = sha256('1')`, []string{k1, k3}},
		{"last used", `INSERT INTO api_key_uses SELECT id, now() FROM api_keys`, nil},
		{"name, hint", `UPDATE api_keys SET name = 'n', hint = 'h', created_at = now()`, nil},
		{"a user's counter", `UPDATE api_keys SET usage = usage + 1`, nil},
		{"twice in a transaction", `BEGIN; UPDATE api_keys SET active = true; UPDATE api_keys SET active = false; COMMIT`, []string{k2, k3}},
		{"rolled back", `BEGIN; UPDATE api_keys SET active = NOT active; ROLLBACK`, nil},
		{
			"savepoints", `BEGIN; SAVEPOINT a; UPDATE api_keys SET active = NOT active WHERE key_hash = sha256('2'); RELEASE a;
			SAVEPOINT b; UPDATE api_keys SET active = NOT active WHERE key_hash = sha256('3'); ROLLBACK TO b; COMMIT`,
			[]string{k2},
		},
		{
			"by another trigger", `CREATE FUNCTION off() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.active := false; RETURN NEW; END';
			CREATE TRIGGER off BEFORE UPDATE OF name ON api_keys FOR EACH ROW EXECUTE FUNCTION off();
			UPDATE api_keys SET name = 'x' WHERE key_hash = sha256('2');
			DROP TRIGGER off ON api_keys`,
			[]string{k2},
		},
		{"delete", `DELETE FROM api_keys WHERE key_hash = sha256('2')`, []string{k2}},
		{
			"delete the organisation", `UPDATE api_keys SET org_id = 'gone';
			ALTER TABLE api_keys ADD FOREIGN KEY (org_id) REFERENCES organisations ON DELETE CASCADE;
			DELETE FROM organisations`,
			[]string{k3},
		},
		{
			"on conflict", `INSERT INTO organisations VALUES ('o'); INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('1')), ('o', sha256('3'))
				ON CONFLICT (key_hash) DO UPDATE SET active = NOT api_keys.active`, []string{k1, k3},
		},
		{
			"on conflict, both ways", `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('1')), ('o', sha256('2'))
				ON CONFLICT (key_hash) DO UPDATE SET active = NOT api_keys.active`, []string{k1, k2},
		},
		{"on conflict, nothing changes", `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('1')) ON CONFLICT (key_hash) DO NOTHING`, nil},
		{
			"merge", `DO $$ BEGIN IF current_setting('server_version_num')::int >= 150000 THEN EXECUTE '
				MERGE INTO api_keys k USING (VALUES (sha256(''1''), false), (sha256(''2''), true), (sha256(''3''), false)) AS v (h, gone) ON k.key_hash = h
				WHEN MATCHED AND gone THEN DELETE
				WHEN MATCHED THEN UPDATE SET expires_at = now()
				WHEN NOT MATCHED THEN INSERT (org_id, key_hash) VALUES (''o'', h)';
				ELSE INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('3')); UPDATE api_keys SET expires_at = now(); DELETE FROM api_keys WHERE key_hash = sha256('2');
				END IF; END $$`, []string{k1, k2, k3},
		},
		{
			"as a replica", `SET session_replication_role = replica; UPDATE api_keys SET active = NOT active WHERE key_hash = sha256('1');
			RESET session_replication_role`, []string{k1},
		},
		{"truncate keys", `TRUNCATE api_keys CASCADE`, []string{"keys"}},
		{"a thousand keys", `INSERT INTO api_keys (org_id, key_hash) SELECT 'o', sha256(i::text::bytea) FROM generate_series(1, 1000) i`, many(1000)},
		{
			"more than a thousand keys", `UPDATE api_keys SET active = false; INSERT INTO api_keys (org_id, key_hash) SELECT 'o', sha256(i::text::bytea) FROM generate_series(1001, 3000) i`,
			append(many(1000), "keys-new"),
		},
		{
			"and back to a savepoint", `BEGIN; SAVEPOINT a; DELETE FROM api_keys WHERE key_hash > sha256('2'); ROLLBACK TO a; DELETE FROM api_keys WHERE key_hash = sha256('2'); COMMIT`,
			[]string{k2},
		},
		{"the last truncated", `TRUNCATE api_keys CASCADE`, []string{"keys"}},

		{"subscribe", `INSERT INTO org_plans (org_id, plan, status) VALUES ('o', 'starter', 'active'), ('a b', 'basic', 'active')`, []string{plan("a b"), plan("o")}},
		{"payment fails", `UPDATE org_plans SET status = 'payment_failed' WHERE org_id = 'o'`, []string{plan("o")}},
		{"renew", `UPDATE org_plans SET ends_at = now() + '1 month' WHERE org_id = 'o'`, []string{plan("o")}},
		{"renew again, the same", `UPDATE org_plans SET ends_at = ends_at WHERE org_id = 'o'`, nil},
		{"downgrade", `UPDATE org_plans SET plan = 'basic' WHERE org_id = 'o'`, []string{plan("o")}},
		{"rename an organisation", `UPDATE org_plans SET org_id = 'p' WHERE org_id = 'o'`, []string{plan("o"), plan("p")}},
		{"not read", `UPDATE org_plans SET created_at = now()`, nil},
		{"rename a tier", `UPDATE plan_catalogue SET name = 'free' WHERE name = 'basic'`, []string{plan("a b"), plan("p"), "plans-new", tier("basic"), tier("free")}},
		{"tier gets the API", `UPDATE plan_catalogue SET api_access = true WHERE name = 'free'`, []string{tier("free")}},
		{"tier gets another name and loses the API", `UPDATE plan_catalogue SET api_access = false, name = 'none' WHERE name = 'free'`, []string{plan("a b"), plan("p"), "plans-new", tier("free"), tier("none")}},
		{"tier gets what it has", `UPDATE plan_catalogue SET api_access = false WHERE name = 'none'`, nil},
		{"new tier", `INSERT INTO plan_catalogue VALUES ('gold', true)`, []string{"plans-new", tier("gold")}},
		{"no such tier any more", `DELETE FROM plan_catalogue WHERE name = 'gold'`, []string{tier("gold")}},
		{"unsubscribe", `DELETE FROM org_plans WHERE org_id = 'p'`, []string{plan("p")}},
		{"truncate plans", `TRUNCATE org_plans`, []string{"plans"}},
		{
			"more than a thousand plans", `INSERT INTO org_plans (org_id, plan, status) SELECT i, 'starter', 'active' FROM generate_series(1, 1001) i`,
			append(manyPlans(1000), "plans-new"),
		},
		{"truncate the catalogue", `TRUNCATE plan_catalogue CASCADE`, []string{"plans"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			testservers.Exec(t, pool, c.sql)
			var got []string
			for _, payload := range announced(t, conn, pool) {
				kind, rest, _ := strings.Cut(payload, " ")
				xid, subject, _ := strings.Cut(rest, " ")
				var status *string
				err := pool.QueryRow(t.Context(), `SELECT pg_xact_status($1::text::xid8)`, xid).Scan(&status)
				if err != nil || status == nil || *status != "committed" {
					t.Errorf("%s names a transaction that is %v, %v", payload, status, err)
				}
				got = append(got, strings.TrimSpace(kind+" "+subject))
			}
			slices.Sort(got)
			got = slices.Compact(got) // two transactions may announce the same
			slices.Sort(c.want)
			if !slices.Equal(got, c.want) {
				t.Errorf("announced %q, want %q", got, c.want)
			}
		})
	}
}

// many are the announcements of the keys 1 to n.
func many(n int) (payloads []string) {
	for i := range n {
		h := sha256.Sum256([]byte(strconv.Itoa(i + 1)))
		payloads = append(payloads, fmt.Sprintf("key %x", h[:8]))
	}
	return payloads
}

// manyPlans are those of the plans of organisations 1 to n.
func manyPlans(n int) (payloads []string) {
	for i := range n {
		h := sha256.Sum256([]byte(strconv.Itoa(i + 1)))
		payloads = append(payloads, fmt.Sprintf("plan %x", h[:8]))
	}
	return payloads
}

// TestBulk: a large change costs a bounded number of notices, in whatever way it is made,
// and announces what can have changed and no more.
func TestBulk(t *testing.T) {
	pool := testservers.Postgres(t)
	conn := listen(t, pool)
	for _, c := range []struct {
		name, before, change string
		one                  int      // announced one by one
		want                 []string // and at once
	}{
		{"plans by COPY or INSERT", ``, `INSERT INTO org_plans (org_id, plan, status) SELECT i, 'starter', 'active' FROM generate_series(0, 4999) i`, 1000, []string{"plans-new"}},
		{"UPDATE", ``, `UPDATE org_plans SET status = status || '.'`, 1000, []string{"plans"}},
		{"many statements", ``, `DO $$ BEGIN FOR i IN 0..4999 LOOP UPDATE org_plans SET status = 's' WHERE org_id = i::text; END LOOP; END $$`, 1000, []string{"plans"}},
		{"other organisations", ``, `UPDATE org_plans SET org_id = 'o' || org_id`, 2000, []string{"plans", "plans-new"}},
		{"cascade", ``, `UPDATE plan_catalogue SET name = 'starter.' WHERE name = 'starter'`, 1000, []string{"plans", "plans-new", "tier"}},
		{"prune plans that refuse", ``, `DELETE FROM org_plans`, 1000, nil},
		{"delete plans that admit", `INSERT INTO org_plans (org_id, plan, status) SELECT i, 'basic', 'active' FROM generate_series(0, 4999) i`, `DELETE FROM org_plans`, 1000, []string{"plans"}},

		{"import keys", ``, `INSERT INTO api_keys (org_id, key_hash) SELECT 'a', sha256(i::text::bytea) FROM generate_series(1, 1100) i`, 1000, []string{"keys-new"}},
		{"deactivate the keys of an organisation", ``, `UPDATE api_keys SET active = false`, 1000, []string{"keys-of"}},
		{"prune dead keys", ``, `DELETE FROM api_keys`, 1000, nil},
		{"keys that have just ended", `INSERT INTO api_keys (org_id, key_hash, expires_at) SELECT 'a', sha256(i::text::bytea), now() - interval '1 minute' FROM generate_series(1, 1100) i`,
			`DELETE FROM api_keys`, 1000, []string{"keys-of"}}, // clocks may differ
		{"prune ended keys", `INSERT INTO api_keys (org_id, key_hash, expires_at) SELECT 'a', sha256(i::text::bytea), now() - interval '1 day' FROM generate_series(1, 1100) i`,
			`DELETE FROM api_keys`, 1000, nil},
		{"new hashes", `INSERT INTO api_keys (org_id, key_hash) SELECT 'a', sha256(i::text::bytea) FROM generate_series(1, 1100) i`,
			`UPDATE api_keys SET key_hash = sha256(key_hash)`, 2000, []string{"keys-new", "keys-of"}},
		{"the keys of many organisations", `TRUNCATE api_keys CASCADE; INSERT INTO api_keys (org_id, key_hash) SELECT i, sha256(i::text::bytea) FROM generate_series(1, 3000) i`,
			`UPDATE api_keys SET active = false`, 1000, slices.Concat(slices.Repeat([]string{"keys-of"}, 1000), []string{"keys"})},
		{"with a setting that says it was announced", ``, `SET apikey.announced_keys = '5000'; SET apikey.announced_plans = '5000';
			UPDATE api_keys SET active = true WHERE org_id = '1'; UPDATE org_plans SET status = 'x' WHERE org_id = '1'; RESET ALL`, 0, []string{"keys"}},
		{"with one that says it never will be", ``, `SET apikey.announced_keys = '-5000'; UPDATE api_keys SET active = false WHERE org_id = '1'; RESET ALL`, 1, nil},
	} {
		testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true), ('basic', false) ON CONFLICT DO NOTHING`)
		if c.before != "" {
			testservers.Exec(t, pool, c.before)
		}
		announced(t, conn, pool)
		testservers.Exec(t, pool, c.change)
		one, rest := 0, []string{}
		for _, payload := range announced(t, conn, pool) {
			kind, _, _ := strings.Cut(payload, " ")
			if kind == "key" || kind == "plan" {
				one++
			} else {
				rest = append(rest, kind)
			}
		}
		slices.Sort(rest)
		slices.Sort(c.want)
		if c.name == "cascade" {
			rest = slices.Compact(rest) // two tiers
		}
		if one != c.one || !slices.Equal(rest, c.want) {
			t.Errorf("%s: announced %d one by one and %.200q, want %d and %.200q", c.name, one, rest, c.one, c.want)
		}
	}
}

// TestOutboxOfOthers: a role that may leave announcements, and nothing else, announces changes of
// tables of its own. It cannot say that another transaction has made them.
func TestOutboxOfOthers(t *testing.T) {
	pool := testservers.Postgres(t)
	conn := listen(t, pool)
	testservers.Exec(t, pool, `CREATE ROLE has_own_tables; GRANT INSERT (kind, subject) ON apikey_outbox TO has_own_tables`)
	defer testservers.Exec(t, pool, `DROP OWNED BY has_own_tables; DROP ROLE has_own_tables`)
	if _, err := conn.Exec(t.Context(), `SET ROLE has_own_tables`); err != nil {
		t.Fatal(err)
	}
	const subject = "0123456789abcdef"
	if _, err := conn.Exec(t.Context(), `INSERT INTO apikey_outbox (kind, subject) VALUES ('plan', $1) ON CONFLICT DO NOTHING`, subject); err != nil {
		t.Error(err)
	}
	if _, err := conn.Exec(t.Context(), `INSERT INTO apikey_outbox (kind, xid) VALUES ('all', '3')`); err == nil {
		t.Error("it may choose the transaction")
	}
	if _, err := conn.Exec(t.Context(), `DELETE FROM apikey_outbox`); err == nil {
		t.Error("it may take announcements away")
	}
	got := announced(t, conn, pool)
	if len(got) != 1 || !strings.HasPrefix(got[0], "plan ") || !strings.HasSuffix(got[0], subject) {
		t.Errorf("announced %q", got)
	}
}

// TestWriterRole: a role that may write keys, plans and tiers, and has no rights on the outbox, writes
// them, and every change is announced.
func TestWriterRole(t *testing.T) {
	pool := testservers.Postgres(t)
	conn := listen(t, pool)
	testservers.Exec(t, pool, `CREATE ROLE writes_only; GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON api_keys, api_key_uses, org_plans, plan_catalogue TO writes_only`)
	defer testservers.Exec(t, pool, `DROP OWNED BY writes_only; DROP ROLE writes_only`)
	if _, err := conn.Exec(t.Context(), `SET ROLE writes_only`); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`INSERT INTO plan_catalogue VALUES ('starter', true)`, `UPDATE plan_catalogue SET api_access = false`, `INSERT INTO org_plans (org_id, plan, status) VALUES ('o', 'starter', 'active')`,
		`UPDATE org_plans SET status = 'past_due'`, `INSERT INTO api_keys (org_id, key_hash) SELECT 'o', sha256(i::text::bytea) FROM generate_series(1, 3000) i`, `UPDATE api_keys SET active = false`,
		`DELETE FROM api_keys`, `TRUNCATE api_keys CASCADE`, `DELETE FROM org_plans`, `TRUNCATE org_plans`, `DELETE FROM plan_catalogue`, `TRUNCATE plan_catalogue CASCADE`,
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
		if got := announced(t, conn, pool); len(got) == 0 {
			t.Errorf("%s is not announced", sql)
		}
	}
}

// TestTidy: while a replica announces, old rows are left to it.
func TestTidy(t *testing.T) {
	pool := testservers.Postgres(t)
	old := func() (n int) {
		t.Helper()
		testservers.Exec(t, pool, `SELECT apikey_tidy()`)
		if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox WHERE at < now() - interval '1 hour'`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind, subject, at) SELECT 'plan', i, now() - interval '2 hours' FROM generate_series(1, 15000) i`)
	announcer, err := pgx.Connect(t.Context(), pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := announcer.Exec(t.Context(), `SELECT pg_advisory_lock(1634757477, hashtext('apikey_outbox'::regclass::oid::text))`); err != nil {
		t.Fatal(err)
	}
	if n := old(); n != 15000 {
		t.Errorf("%d of 15,000 rows are left beside an announcer", n)
	}
	if err := announcer.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); old() > 0; {
		if time.Now().After(deadline) {
			t.Fatal("old rows stay although nobody announces")
		}
	}
}

// TestJunkInTheOutbox: whatever is in the outbox, announcing goes on, and what nobody can read
// counts as a change of everything.
func TestJunkInTheOutbox(t *testing.T) {
	pool := testservers.Postgres(t)
	conn := listen(t, pool)
	testservers.Exec(t, pool, `ALTER TABLE apikey_outbox DROP CONSTRAINT apikey_outbox_kind_check, DROP CONSTRAINT apikey_outbox_subject_check`)
	for _, junk := range [][2]string{
		{strings.Repeat("all ", 100), ""}, {strings.Repeat("k", 2500), ""}, {"plan", strings.Repeat("o", 2500)}, {"", ""}, {"plan", "two words"},
		{"plan\n", ""}, {"plan", "ö"}, {"?", ""}, {"PLAN", ""},
	} {
		testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind, subject) VALUES ($1, $2)`, junk[0], junk[1])
		got := announced(t, conn, pool)
		if len(got) != 1 || !strings.HasPrefix(got[0], "all ") {
			t.Errorf("%.40q is announced as %.80q", junk, got)
		}
	}
	// Rows that were restored from a server that is far ahead announce nothing.
	testservers.Exec(t, pool, `INSERT INTO apikey_outbox (xid, kind) VALUES ('99999999', 'keys')`)
	if got := announced(t, conn, pool); len(got) != 0 {
		t.Errorf("announced %q", got)
	}
	// And a place in the future, which was restored, too, holds nothing up, and does not wait until
	// this server has come so far.
	for _, set := range []string{`seen = '99999999:99999999:'`, `leftover = '99999999:99999999:'`, `seen = '1:1:', leftover = '99999999:99999999:'`} {
		for _, change := range []bool{true, false} {
			testservers.Exec(t, pool, `UPDATE apikey_announced SET `+set)
			want := 0
			if change {
				want = 1
				testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind) VALUES ('keys')`)
			}
			if got := announced(t, conn, pool); len(got) != want {
				t.Errorf("announced %q after a restore with %s", got, set)
			}
			var ours bool
			if err := pool.QueryRow(t.Context(), `SELECT pg_snapshot_xmax(seen) <= pg_snapshot_xmax(pg_current_snapshot()) AND leftover IS NULL FROM apikey_announced`).Scan(&ours); err != nil || !ours {
				t.Errorf("the place is still that of another server, %s, %v", set, err)
			}
		}
	}
}

// TestAnnounceWhileWriting: a transaction that has written may not announce: what it writes later would
// count as announced.
func TestAnnounceWhileWriting(t *testing.T) {
	pool := testservers.Postgres(t)
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := tx.Exec(t.Context(), `INSERT INTO plan_catalogue VALUES ('starter', true)`); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT apikey_announce()`); err == nil || !strings.Contains(err.Error(), "in a transaction that has written") {
		t.Errorf("apikey_announce: %v", err)
	}
}

// TestBacklog: what has waited for long is announced at once, and deleted in steps.
func TestBacklog(t *testing.T) {
	pool := testservers.Postgres(t)
	conn := listen(t, pool)
	running, err := pool.Begin(t.Context()) // a change that is under way when the backlog is announced
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = running.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := running.Exec(t.Context(), `INSERT INTO apikey_outbox (kind) VALUES ('plans')`); err != nil {
		t.Fatal(err)
	}
	testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind, subject) SELECT 'plan', i FROM generate_series(1, 35000) i`)
	got := announced(t, conn, pool)
	if len(got) != 1 || !strings.HasPrefix(got[0], "all ") {
		t.Fatalf("announced %d times, want everything once", len(got))
	}
	var newer bool
	_, xid, _ := strings.Cut(got[0], " ")
	if err := pool.QueryRow(t.Context(), `SELECT $1::text::xid8 > max(xid) FROM apikey_outbox`, xid).Scan(&newer); err != nil || !newer {
		t.Errorf("%s is not of a transaction that is newer than all that it stands for, %v", got[0], err)
	}
	var left int
	for range 5 {
		if got := announced(t, conn, pool); len(got) != 0 {
			t.Errorf("announced %d more times", len(got))
		}
		if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox`).Scan(&left); err != nil {
			t.Fatal(err)
		}
	}
	if left != 0 {
		t.Errorf("%d rows are left", left)
	}
	if err := running.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := announced(t, conn, pool); len(got) != 1 || !strings.HasPrefix(got[0], "plans ") {
		t.Errorf("what was under way is announced as %q", got)
	}
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox JOIN apikey_announced ON leftover IS NOT NULL`).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d, %v", left, err)
	}
}

// TestAnnounceWaits: a call waits for another one that is announcing, and announces what that one
// rolls back. Its snapshot sees nothing that was not announced.
func TestAnnounceWaits(t *testing.T) {
	pool := testservers.Postgres(t)
	listener := listen(t, pool)
	for _, backlog := range []bool{false, true} {
		for _, commits := range []bool{true, false} {
			testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind) VALUES ('keys')`)
			if backlog {
				testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind, subject) SELECT 'plan', i FROM generate_series(1, 20000) i`)
			}
			first, err := pool.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := first.Exec(t.Context(), `SELECT apikey_announce()`); err != nil {
				t.Fatal(err)
			}
			returned := make(chan string, 1)
			go func() {
				var snap string
				if err := pool.QueryRow(context.WithoutCancel(t.Context()), `SELECT snapshot FROM apikey_announce()`).Scan(&snap); err != nil {
					snap = err.Error()
				}
				returned <- snap
			}()
			for waits := false; !waits; {
				select {
				case snap := <-returned:
					t.Fatalf("a second call returned %s while the first was announcing", snap)
				case <-time.After(10 * time.Millisecond):
				}
				if err := pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')`).Scan(&waits); err != nil {
					t.Fatal(err)
				}
			}
			var later string
			if err := pool.QueryRow(t.Context(), `INSERT INTO apikey_outbox (kind) VALUES ('plans') RETURNING xid::text`).Scan(&later); err != nil {
				t.Fatal(err)
			}
			if commits {
				err = first.Commit(t.Context())
			} else {
				err = first.Rollback(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
			snap := <-returned
			testservers.Exec(t, pool, `NOTIFY apikey_changes, 'end'`)
			var keys int
			var plans bool
			for _, payload := range until(t, listener, "end") {
				kind, xid, _ := strings.Cut(payload, " ")
				if kind == "keys" || kind == "all" {
					keys++
				}
				plans = plans || kind == "plans" && xid == later
			}
			var sees bool
			if err := pool.QueryRow(t.Context(), `SELECT pg_visible_in_snapshot($1::text::xid8, $2::text::pg_snapshot)`, later, snap).Scan(&sees); err != nil {
				t.Fatal(err)
			}
			if keys != 1 || sees && !plans {
				t.Errorf("backlog %v, the first commits %v: announced %d times; the snapshot sees a later change: %v, which was announced: %v", backlog, commits, keys, sees, plans)
			}
			for range 5 {
				announced(t, listener, pool) // what is left
			}
		}
	}
}

// TestDeadRows: what a call of apikey_announce costs does not grow with what was announced while
// an older transaction has kept VACUUM from removing it.
func TestDeadRows(t *testing.T) {
	pool := testservers.Postgres(t)
	old, err := pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = old.Rollback(context.WithoutCancel(t.Context())) }()
	if _, err := old.Exec(t.Context(), `CREATE TABLE a_writer_too ()`); err != nil {
		t.Fatal(err)
	}
	testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true)`)
	buffers := func() (hit int) {
		t.Helper()
		testservers.Exec(t, pool, `INSERT INTO apikey_outbox (kind) VALUES ('keys')`)
		conn, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Release()
		for range 2 { // the first one plans
			var plan []struct {
				Plan struct {
					Hit  int `json:"Shared Hit Blocks"`
					Read int `json:"Shared Read Blocks"`
				}
			}
			if err := conn.QueryRow(t.Context(), `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT apikey_announce()`).Scan(&plan); err != nil {
				t.Fatal(err)
			}
			hit = plan[0].Plan.Hit + plan[0].Plan.Read
		}
		return hit
	}
	const most = 100
	before := buffers()
	testservers.Exec(t, pool, `DO $$ BEGIN FOR i IN 1..40 LOOP
		INSERT INTO apikey_outbox (kind, subject) SELECT 'plan', j FROM generate_series(1, 1000) j; COMMIT; PERFORM apikey_announce(); COMMIT; END LOOP; END $$`)
	var pages int
	if err := pool.QueryRow(t.Context(), `SELECT pg_relation_size('apikey_outbox') / 8192`).Scan(&pages); err != nil || pages < 2*most {
		t.Fatalf("the outbox has %d pages, %v: nothing is dead", pages, err)
	}
	if after := buffers(); before > most || after > most {
		t.Errorf("a call reads %d buffers, and %d beside 40,000 dead rows in %d pages", before, after, pages)
	}
}

// listen returns a connection of its own that is sent what is announced.
func listen(t *testing.T, pool *pgxpool.Pool) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	if _, err := conn.Exec(t.Context(), `LISTEN apikey_changes`); err != nil {
		t.Fatal(err)
	}
	return conn
}

// announced returns what conn has been sent so far of changes.
func announced(t *testing.T, conn *pgx.Conn, pool *pgxpool.Pool) (payloads []string) {
	t.Helper()
	testservers.Exec(t, pool, `SELECT apikey_announce()`)
	testservers.Exec(t, pool, `NOTIFY apikey_changes, 'end'`) // notices arrive in the order of commits
	return slices.DeleteFunc(until(t, conn, "end"), func(payload string) bool { return strings.HasPrefix(payload, "?") })
}

// until returns what conn has been sent before a payload.
func until(t *testing.T, conn *pgx.Conn, end string) (payloads []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n.Payload == end {
			return payloads
		}
		payloads = append(payloads, n.Payload)
	}
}
