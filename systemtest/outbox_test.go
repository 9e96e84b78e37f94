package systemtest

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
	"github.com/trackpilots/apikey/internal/world"
)

// TestTwoPhaseCommit: a transaction that changes a key or a plan can be prepared, and
// takes effect when it is committed.
func TestTwoPhaseCommit(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t, "-c", "max_prepared_transactions=5")
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, org := w.Enrol(t, world.Live, world.PastDue)
	r.WantCode(t, apiKey, world.PlanExpired)
	conn, err := w.Pool.Acquire(t.Context())
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
		r.WantCode(t, apiKey, world.PlanExpired)
	}
	if _, err := conn.Exec(t.Context(), `COMMIT PREPARED 'billing'`); err != nil {
		t.Fatal(err)
	}
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Admitted })
}

// TestAnnouncer: one session announces for all. When it is killed, another one does, and
// when somebody else keeps the place of the announcer, the reads of each do.
func TestAnnouncer(t *testing.T) {
	t.Parallel()
	f := world.NewFleet(t, 3, &apikey.CacheOptions{MaxStaleness: 6 * time.Second})
	apiKey, org := f.Enrol(t, world.Live, world.Paid)
	revoked := false
	changes := func(what string, most time.Duration) {
		t.Helper()
		revoked = !revoked
		want := map[bool]string{true: world.Invalid, false: world.Admitted}[revoked]
		testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = $2 WHERE id = $1`, org.KeyID, !revoked)
		start := time.Now()
		for _, r := range f.Replicas {
			world.WaitFor(t, func() bool { return r.Ask(apiKey) == want })
		}
		if took := time.Since(start); took > most {
			t.Errorf("%s: a change takes effect after %v, want %v at most", what, took, most)
		}
	}
	for _, r := range f.Replicas {
		world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive && r.Ask(apiKey) == world.Admitted })
	}
	announcer := func() (pid uint32) {
		t.Helper()
		world.WaitFor(t, func() bool {
			err := f.Pool.QueryRow(t.Context(), `SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = 1634757477 AND granted
				AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`).Scan(&pid)
			return err == nil
		})
		return pid
	}
	first := announcer()
	changes("all is well", 3*time.Second)
	testservers.Exec(t, f.Pool, `SELECT pg_terminate_backend($1)`, first)
	changes("the announcer is killed", 6*time.Second)
	if announcer() == first {
		t.Error("the announcer was not killed")
	}

	holder, err := pgx.Connect(t.Context(), f.Pool.Config().ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close(t.Context())
	var is bool
	world.WaitFor(t, func() bool { // who comes first after the announcer has gone
		testservers.Exec(t, f.Pool, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1634757477 AND pid <> $1
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, holder.PgConn().PID())
		err := holder.QueryRow(t.Context(), `SELECT pg_try_advisory_lock(1634757477, hashtext('apikey_outbox'::regclass::oid::text))`).Scan(&is)
		return err == nil && is
	})
	for _, r := range f.Replicas {
		world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
	}
	changes("somebody else keeps the place", 6*time.Second)
	if err := f.Pool.QueryRow(t.Context(), `SELECT `+feed.AnnouncerSQL).Scan(&is); err != nil || !is {
		t.Errorf("there is an announcer: %v, %v", is, err)
	}
}

// TestStrictRole: a role that may only read, whose statements may not take long, and
// whose transactions are serializable, hears of changes all the same.
func TestStrictRole(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	w := world.NewPostgres(t)
	role := "strict_" + strings.ToLower(w.Pool.Config().ConnConfig.Database[12:])
	testservers.Exec(t, w.Pool, `CREATE ROLE `+role+` LOGIN PASSWORD 'p'`)
	t.Cleanup(func() { testservers.Exec(t, w.Pool, `DROP OWNED BY `+role+`; DROP ROLE `+role) })
	testservers.Exec(t, w.Pool, `GRANT SELECT ON api_keys, org_plans, plan_catalogue TO `+role)
	for _, setting := range []string{`default_transaction_read_only = on`, `statement_timeout = '1s'`, `lock_timeout = '1ms'`, `default_transaction_isolation = 'serializable'`} {
		testservers.Exec(t, w.Pool, `ALTER ROLE `+role+` SET `+setting)
	}
	u, err := url.Parse(w.Pool.Config().ConnString())
	world.MustNot(t, err)
	u.User = url.UserPassword(role, "p")
	pool := testservers.Pool(t, u.String())
	first := world.NewWatchedReplica(t, pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	second := world.NewWatchedReplica(t, pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	for range 20 {
		apiKey, org := w.Enrol(t, world.Live, world.Paid)
		for _, r := range []world.Replica{first, second} {
			r.WantCode(t, apiKey, world.Admitted)
		}
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
		for _, r := range []world.Replica{first, second} {
			world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Invalid })
			if s := r.Cache.Stats(); !s.FeedLive || s.FeedErr != nil {
				t.Fatalf("the feed is lost: %v", s.FeedErr)
			}
		}
	}
}

// TestNobodyListens: without a replica that watches, what is not announced does not grow
// for ever.
func TestNobodyListens(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	_, org := w.Enrol(t, world.Live, world.Paid)
	testservers.Exec(t, w.Pool, `INSERT INTO apikey_outbox (kind, subject, at) SELECT 'plan', i::text, now() - interval '2 hours' FROM generate_series(1, 5000) i`)
	testservers.Exec(t, w.Pool, `DO $$ BEGIN FOR i IN 1..15000 LOOP UPDATE org_plans SET ends_at = now() + i * interval '1 s' WHERE org_id = '`+org.ID+`'; COMMIT; END LOOP; END $$`)
	var old, young int
	err := w.Pool.QueryRow(t.Context(), `SELECT count(*) FILTER (WHERE at < now() - interval '1 hour'), count(*) FILTER (WHERE at > now() - interval '1 hour') FROM apikey_outbox`).Scan(&old, &young)
	if err != nil || old > 0 || young < 15000 {
		t.Errorf("%d old rows and %d young ones are left, %v; want none and 15,000", old, young, err)
	}
}

// TestLogicalReplication: the tables are written by logical replication. What its apply
// worker changes is announced.
func TestLogicalReplication(t *testing.T) {
	testservers.Long(t)
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
	r := world.NewWatchedReplica(t, pools[1], testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	writer := world.NewPostgresOn(t, pools[0])
	apiKey, org := writer.Enrol(t, world.Live, world.Paid)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Admitted })
	testservers.Exec(t, pools[0], `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Invalid })
	testservers.Exec(t, pools[0], `UPDATE api_keys SET active = true WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Admitted })
	testservers.Exec(t, pools[0], `UPDATE org_plans SET status = 'past_due' WHERE org_id = $1`, org.ID)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.PlanExpired })
	if n := r.Cache.Stats().Unannounced; n > 0 {
		t.Errorf("%d changes were not announced", n)
	}
}
