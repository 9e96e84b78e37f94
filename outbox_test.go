package apikey_test

// Announcements by way of the outbox: who writes keys and plans never notifies, and
// somebody always announces.

import (
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/testservers"
)

// TestTwoPhaseCommit: a transaction that changes a key or a plan can be prepared, and
// takes effect when it is committed.
func TestTwoPhaseCommit(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t, "-c", "max_prepared_transactions=5")
	w := newPostgresWorldOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	r := watchedReplica(t, w.pool, testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, org := w.enrol(t, live, pastDue)
	r.wantCode(t, apiKey, planExpired)
	conn, err := w.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	for _, sql := range []string{
		`BEGIN`, `UPDATE org_plans SET status = 'active' WHERE org_id = '` + org.ID + `'`, `UPDATE api_keys SET expires_at = now() + '1 day'`,
		`UPDATE plan_catalogue SET api_access = NOT api_access WHERE name = 'basic'`, `PREPARE TRANSACTION 'billing'`,
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	for range 100 { // and nobody waits for it
		r.wantCode(t, apiKey, planExpired)
	}
	if _, err := conn.Exec(t.Context(), `COMMIT PREPARED 'billing'`); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return r.ask(apiKey) == admitted })
}

// TestAnnouncer: one session announces for all. When it is killed, another one does, and
// when somebody else keeps the place of the announcer, the reads of each do.
func TestAnnouncer(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, &apikey.CacheOptions{MaxStaleness: 6 * time.Second})
	apiKey, org := f.enrol(t, live, paid)
	revoked := false
	changes := func(what string, most time.Duration) {
		t.Helper()
		revoked = !revoked
		want := map[bool]string{true: invalid, false: admitted}[revoked]
		testservers.Exec(t, f.pool, `UPDATE api_keys SET active = $2 WHERE id = $1`, org.KeyID, !revoked)
		start := time.Now()
		for _, r := range f.replicas {
			waitFor(t, func() bool { return r.ask(apiKey) == want })
		}
		if took := time.Since(start); took > most {
			t.Errorf("%s: a change takes effect after %v, want %v at most", what, took, most)
		}
	}
	for _, r := range f.replicas {
		waitFor(t, func() bool { return r.cache.Stats().FeedLive && r.ask(apiKey) == admitted })
	}
	announcer := func() (pid uint32) {
		t.Helper()
		waitFor(t, func() bool {
			err := f.pool.QueryRow(t.Context(), `SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = 1634757477 AND granted
				AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`).Scan(&pid)
			return err == nil
		})
		return pid
	}
	first := announcer()
	changes("all is well", 3*time.Second)
	testservers.Exec(t, f.pool, `SELECT pg_terminate_backend($1)`, first)
	changes("the announcer is killed", 6*time.Second)
	if announcer() == first {
		t.Error("the announcer was not killed")
	}

	holder, err := pgx.Connect(t.Context(), f.pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close(t.Context())
	var is bool
	waitFor(t, func() bool { // who comes first after the announcer has gone
		testservers.Exec(t, f.pool, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1634757477 AND pid <> $1
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, holder.PgConn().PID())
		err := holder.QueryRow(t.Context(), `SELECT pg_try_advisory_lock(1634757477, hashtext('apikey_outbox'::regclass::oid::text))`).Scan(&is)
		return err == nil && is
	})
	for _, r := range f.replicas {
		waitFor(t, func() bool { return r.cache.Stats().FeedLive })
	}
	changes("somebody else keeps the place", 6*time.Second)
	if err := f.pool.QueryRow(t.Context(), `SELECT `+feed.AnnouncerSQL).Scan(&is); err != nil || !is {
		t.Errorf("there is an announcer: %v, %v", is, err)
	}
}

// TestStrictRole: a role that may only read, whose statements may not take long, and
// whose transactions are serializable, hears of changes all the same.
func TestStrictRole(t *testing.T) {
	t.Parallel()
	w := newPostgresWorld(t)
	role := "strict_" + strings.ToLower(w.pool.Config().ConnConfig.Database[12:])
	testservers.Exec(t, w.pool, `CREATE ROLE `+role+` LOGIN PASSWORD 'p'`)
	t.Cleanup(func() { testservers.Exec(t, w.pool, `DROP OWNED BY `+role+`; DROP ROLE `+role) })
	testservers.Exec(t, w.pool, `GRANT SELECT ON api_keys, org_plans, plan_catalogue TO `+role)
	for _, setting := range []string{`default_transaction_read_only = on`, `statement_timeout = '1s'`, `lock_timeout = '1ms'`, `default_transaction_isolation = 'serializable'`} {
		testservers.Exec(t, w.pool, `ALTER ROLE `+role+` SET `+setting)
	}
	u, err := url.Parse(w.pool.Config().ConnString())
	mustNot(t, err)
	u.User = url.UserPassword(role, "p")
	pool := testservers.Pool(t, u.String())
	first := watchedReplica(t, pool, testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	second := watchedReplica(t, pool, testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	for range 20 {
		apiKey, org := w.enrol(t, live, paid)
		for _, r := range []replica{first, second} {
			r.wantCode(t, apiKey, admitted)
		}
		testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
		for _, r := range []replica{first, second} {
			waitFor(t, func() bool { return r.ask(apiKey) == invalid })
			if s := r.cache.Stats(); !s.FeedLive || s.FeedErr != nil {
				t.Fatalf("the feed is lost: %v", s.FeedErr)
			}
		}
	}
}

// TestNobodyListens: without a replica that watches, what is not announced does not grow
// for ever.
func TestNobodyListens(t *testing.T) {
	t.Parallel()
	w := newPostgresWorld(t)
	_, org := w.enrol(t, live, paid)
	testservers.Exec(t, w.pool, `INSERT INTO apikey_outbox (kind, subject, at) SELECT 'plan', i::text, now() - interval '2 hours' FROM generate_series(1, 5000) i`)
	testservers.Exec(t, w.pool, `DO $$ BEGIN FOR i IN 1..15000 LOOP UPDATE org_plans SET ends_at = now() + i * interval '1 s' WHERE org_id = '`+org.ID+`'; COMMIT; END LOOP; END $$`)
	var old, young int
	err := w.pool.QueryRow(t.Context(), `SELECT count(*) FILTER (WHERE at < now() - interval '1 hour'), count(*) FILTER (WHERE at > now() - interval '1 hour') FROM apikey_outbox`).Scan(&old, &young)
	if err != nil || old > 0 || young < 15000 {
		t.Errorf("%d old rows and %d young ones are left, %v; want none and 15,000", old, young, err)
	}
}

// TestLogicalReplication: the tables are written by logical replication. What its apply
// worker changes is announced.
func TestLogicalReplication(t *testing.T) {
	t.Parallel()
	const tables = `api_keys, org_plans, plan_catalogue`
	var pools [2]*pgxpool.Pool
	for i := range pools {
		server := testservers.StartPostgres(t, "-c", "wal_level=logical")
		pools[i] = testservers.Pool(t, testservers.Migrated(t, server.URL))
	}
	testservers.Exec(t, pools[0], `CREATE PUBLICATION p FOR TABLE `+tables)
	from := pools[0].Config().ConnConfig
	testservers.Exec(t, pools[1], `CREATE SUBSCRIPTION s CONNECTION 'host=`+from.Host+` port=`+strconv.Itoa(int(from.Port))+` dbname=`+from.Database+` user=`+from.User+`' PUBLICATION p`)
	defer testservers.Exec(t, pools[1], `DROP SUBSCRIPTION s`)
	r := watchedReplica(t, pools[1], testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	writer := newPostgresWorldOn(t, pools[0])
	apiKey, org := writer.enrol(t, live, paid)
	waitFor(t, func() bool { return r.ask(apiKey) == admitted })
	testservers.Exec(t, pools[0], `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	waitFor(t, func() bool { return r.ask(apiKey) == invalid })
	testservers.Exec(t, pools[0], `UPDATE api_keys SET active = true WHERE id = $1`, org.KeyID)
	waitFor(t, func() bool { return r.ask(apiKey) == admitted })
	testservers.Exec(t, pools[0], `UPDATE org_plans SET status = 'past_due' WHERE org_id = $1`, org.ID)
	waitFor(t, func() bool { return r.ask(apiKey) == planExpired })
	if n := r.cache.Stats().Unannounced; n > 0 {
		t.Errorf("%d changes were not announced", n)
	}
}
