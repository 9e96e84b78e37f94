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
	testservers.Exec(t, w.Pool, `GRANT SELECT ON api_keys, org_plans, plan_catalogue TO `+role+`; GRANT EXECUTE ON FUNCTION apikey_announce TO `+role)
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

// TestNobodyListens: without a replica that watches this schema, what is not announced does not
// grow for ever, even if another schema of the database is watched.
func TestNobodyListens(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	testservers.Exec(t, w.Pool, `CREATE SCHEMA watched`)
	watched := testservers.Pool(t, testservers.Migrated(t, w.Pool.Config().ConnString()+"&search_path=watched"))
	world.NewWatchedReplica(t, watched, testservers.Redis(t), world.NewSecret(), nil)
	world.WaitFor(t, func() bool {
		var is bool
		err := watched.QueryRow(t.Context(), `SELECT `+feed.AnnouncerSQL).Scan(&is)
		return err == nil && is
	})
	var is bool
	if err := w.Pool.QueryRow(t.Context(), `SELECT `+feed.AnnouncerSQL).Scan(&is); err != nil || is {
		t.Errorf("the announcer of another schema counts as one of this, %v", err)
	}
	_, org := w.Enrol(t, world.Live, world.Paid)
	testservers.Exec(t, w.Pool, `INSERT INTO apikey_outbox (kind, subject, at) SELECT 'plan', i::text, now() - interval '2 hours' FROM generate_series(1, 5000) i`)
	testservers.Exec(t, w.Pool, `DO $$ BEGIN FOR i IN 1..15000 LOOP UPDATE org_plans SET ends_at = now() + i * interval '1 s' WHERE org_id = '`+org.ID+`'; COMMIT; END LOOP; END $$`)
	var old, young, all int
	err := w.Pool.QueryRow(t.Context(), `SELECT count(*) FILTER (WHERE at < now() - interval '1 hour'), count(*) FILTER (WHERE at > now() - interval '1 hour'),
		count(*) FILTER (WHERE kind = 'all') FROM apikey_outbox`).Scan(&old, &young, &all)
	if err != nil || old > 0 || young < 15000 || all == 0 {
		t.Errorf("%d old rows and %d young ones are left, of these %d for all that is gone, %v; want none, 15,000 and one or more", old, young, all, err)
	}
}

// TestRareAnnouncements: how often changes are announced is a setting of the database, which
// all replicas follow at once.
func TestRareAnnouncements(t *testing.T) {
	t.Parallel()
	f := world.NewFleet(t, 2, &apikey.CacheOptions{MaxStaleness: time.Hour})
	statements := func() (n int) {
		t.Helper()
		if err := f.Pool.QueryRow(t.Context(), `SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	in := func(d time.Duration) int {
		before := statements()
		time.Sleep(d)
		return statements() - before
	}
	const d = 3 * time.Second
	often := in(d)
	testservers.Exec(t, f.Pool, `UPDATE apikey_settings SET announce_every = '1 minute'`)
	time.Sleep(2 * time.Second) // for the reads that are on their way, and the statistics
	rare := in(d)
	if often < 30 || rare > 10 {
		t.Errorf("%d transactions in %v, and %d when announcements are rare", often, d, rare)
	}
	if _, err := f.Pool.Exec(t.Context(), `UPDATE apikey_settings SET announce_every = '1 hour'`); err == nil {
		t.Error("an hour is not refused")
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

// TestOneCustomersBulkChange: importing, deactivating and pruning more keys of one customer than
// are announced one by one leaves the known keys of others as they are: they go on in an outage.
func TestOneCustomersBulkChange(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Second})
	var others []string
	for range 50 {
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		others = append(others, apiKey)
		r.WantCode(t, apiKey, world.Admitted)
	}
	_, org := w.Enrol(t, world.Live, world.Paid)
	announced := r.Cache.Stats().Announcements
	for _, sql := range []string{
		`INSERT INTO api_keys (org_id, key_hash) SELECT '` + org.ID + `', sha256(i::text::bytea) FROM generate_series(1, 1100) i`,
		`UPDATE api_keys SET active = false WHERE org_id = '` + org.ID + `'`,
		`DELETE FROM api_keys WHERE org_id = '` + org.ID + `'`,
	} {
		testservers.Exec(t, w.Pool, sql)
	}
	world.WaitFor(t, func() bool { return r.Cache.Stats().Announcements >= announced+3000 })
	server.Crash(t)
	time.Sleep(time.Second) // longer than what is known may be used without looking
	refused := 0
	for _, apiKey := range others {
		if r.Ask(apiKey) != world.Admitted {
			refused++
		}
	}
	if refused > 0 {
		t.Errorf("%d of %d known good keys of other customers are refused in an outage", refused, len(others))
	}
}

// TestDeadReplaced: more dead keys than are announced one by one are deleted, and the same keys are
// imported again, alive.
func TestDeadReplaced(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	_, org := w.Enrol(t, world.Live, world.Paid)
	const key = "a-key-of-many-1500"
	testservers.Exec(t, w.Pool, `INSERT INTO api_keys (org_id, key_hash, active) SELECT '`+org.ID+`', sha256(('a-key-of-many-' || i)::bytea), false FROM generate_series(1, 1500) i`)
	world.WaitFor(t, func() bool { return r.Ask(key) == world.Invalid })
	testservers.Exec(t, w.Pool, `BEGIN; DELETE FROM api_keys WHERE NOT active; COMMIT`)
	testservers.Exec(t, w.Pool, `INSERT INTO api_keys (org_id, key_hash) SELECT '`+org.ID+`', sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(1, 1500) i`)
	world.WaitFor(t, func() bool { return r.Ask(key) == world.Admitted })
	if n := r.Cache.Stats().Unannounced; n > 0 {
		t.Errorf("%d changes count as unannounced", n)
	}
}

// TestBacklog: nobody has listened for long, and 300,000 changes wait. A replica that begins hears of
// everything at once, and of what comes after that as ever.
func TestBacklog(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	testservers.Exec(t, w.Pool, `INSERT INTO apikey_outbox (kind, subject) SELECT 'plan', i FROM generate_series(1, 300000) i`)
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	if n := r.Cache.Stats().Announcements; n > 10 {
		t.Errorf("%d announcements of the backlog, want a few", n)
	}
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	r.WantCode(t, apiKey, world.Admitted)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Invalid })
	world.WaitFor(t, func() bool {
		var left int
		err := w.Pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox`).Scan(&left)
		return err == nil && left == 0
	})
	if s := r.Cache.Stats(); !s.FeedLive || s.FeedErr != nil || s.Unannounced > 0 {
		t.Errorf("%+v", s)
	}
}

// TestTierComes: plans name a tier that is not there, as after a restore without checks. It is
// announced when the tier comes, and when it goes.
func TestTierComes(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	r.WantCode(t, apiKey, world.Admitted)
	for range 3 {
		testservers.Exec(t, w.Pool, `SET session_replication_role = replica; DELETE FROM plan_catalogue WHERE name = 'starter'; RESET session_replication_role`)
		world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.PlanExpired })
		testservers.Exec(t, w.Pool, `INSERT INTO plan_catalogue VALUES ('starter', true)`)
		world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Admitted })
	}
	if n := r.Cache.Stats().Unannounced; n > 0 {
		t.Errorf("%d changes were not announced", n)
	}
}
