package systemtest

// Another server behind the same address, and servers that stores should not read:
// what was known of one must not be taken for what another says.

import (
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

const shortStaleness = time.Second // MaxStaleness

// within waits for an answer for as long as facts may go unnoticed, and some time for a
// busy machine.
func within(t *testing.T, r world.Replica, apiKey, want string) {
	t.Helper()
	start := time.Now()
	for r.Ask(apiKey) != want {
		if time.Since(start) > shortStaleness+2*time.Second {
			t.Fatalf("answers %q after %v, want %q", r.Ask(apiKey), time.Since(start), want)
		}
		time.Sleep(time.Millisecond)
	}
	for range 3 { // and stays so
		r.WantCode(t, apiKey, want)
	}
}

// TestAnotherDatabase: restored from a dump, or switched over by logical replication:
// a database with other transaction ids stands behind the address, where one key is
// revoked that was live, and one is live that was revoked.
func TestAnotherDatabase(t *testing.T) {
	testservers.Long(t)
	for name, burnt := range map[string][2]int{"to far lower ids": {20_000, 0}, "to far higher ids": {0, 20_000}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var pools [2]*pgxpool.Pool
			var servers [2]*testservers.Server
			for i := range pools {
				servers[i] = testservers.StartPostgres(t)
				pools[i] = testservers.Pool(t, testservers.Migrated(t, servers[i].URL))
				testservers.Exec(t, pools[i], `DO $$ BEGIN FOR i IN 1..`+strconv.Itoa(burnt[i])+` LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$`)
			}
			address, proxy := testservers.ProxyPostgres(t, servers[0].URL)
			rdb, secret := testservers.Redis(t), world.NewSecret()
			opts := &apikey.CacheOptions{MaxStaleness: shortStaleness}
			w := world.NewPostgresOn(t, pools[0])
			other := world.NewPostgresOn(t, pools[1])
			revoked, org := w.Enrol(t, world.Live, world.Paid)
			restored, restoredOrg := w.Enrol(t, world.Deactivated, world.Paid)
			lost, _ := w.Enrol(t, world.Live, world.Paid) // not in the other database
			copyKey(t, other, revoked, org, false)
			copyKey(t, other, restored, restoredOrg, true)
			r := world.NewWatchedReplica(t, testservers.Pool(t, address), rdb, secret, opts)
			for range 10 { // leave marks
				testservers.Exec(t, pools[0], `UPDATE api_keys SET expires_at = now() + '1 day'`)
			}
			world.WaitFor(t, func() bool {
				return r.Ask(revoked) == world.Admitted && r.Ask(restored) == world.Invalid && r.Ask(lost) == world.Admitted
			})

			proxy.Redirect(t, servers[1].URL)
			within(t, r, revoked, world.Invalid)
			within(t, r, restored, world.Admitted)
			within(t, r, lost, world.Invalid)
			world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
			// Vouched for and announced as before.
			before := r.Cache.Stats().StoreReads
			for start := time.Now(); time.Since(start) < 2*shortStaleness; time.Sleep(10 * time.Millisecond) {
				r.WantCode(t, restored, world.Admitted)
			}
			if n := r.Cache.Stats().StoreReads - before; n > 2 {
				t.Errorf("%d lookups of one key: it is refuted over and over, or not vouched for", n)
			}
			testservers.Exec(t, pools[1], `UPDATE api_keys SET active = NOT active`)
			within(t, r, revoked, world.Admitted)
			within(t, r, restored, world.Invalid)

			// Another replica, which finds records of both in Redis.
			fresh := world.NewWatchedReplica(t, testservers.Pool(t, address), rdb, secret, opts)
			within(t, fresh, revoked, world.Admitted)
			within(t, fresh, lost, world.Invalid)
			if n := r.Cache.Stats().Unannounced; n != 0 {
				t.Errorf("%d unannounced changes", n)
			}

			// In an outage of the new one, facts of the old one are not used.
			servers[1].Crash(t)
			time.Sleep(shortStaleness)
			for _, r := range []world.Replica{r, fresh} {
				if got := r.Ask(lost); got == world.Admitted {
					t.Error("in an outage, a key of the old database is admitted")
				}
				if got := r.Ask(revoked); got != world.Admitted {
					t.Errorf("in an outage, a known good key of the new database is answered %q", got)
				}
			}
		})
	}
}

// copyKey puts a key on record in other.
func copyKey(t *testing.T, other *world.Postgres, apiKey string, org apikey.Org, active bool) {
	t.Helper()
	h := apikey.HashKey(apiKey)
	testservers.Exec(t, other.Pool, `INSERT INTO organisations VALUES ($1)`, org.ID)
	testservers.Exec(t, other.Pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ($1, 'starter', 'active')`, org.ID)
	testservers.Exec(t, other.Pool, `INSERT INTO api_keys (id, org_id, key_hash, active) VALUES ($1, $2, $3, $4)`, org.KeyID, org.ID, h[:], active)
}

// TestPromotedStandby: the primary dies, and a standby takes over that has not received
// the last transactions: their ids are used again.
func TestPromotedStandby(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	primary := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, primary.URL)))
	link, linkProxy := testservers.ProxyPostgres(t, primary.URL)
	standby := testservers.StartStandby(t, link)
	address, proxy := testservers.ProxyPostgres(t, primary.URL)
	r := world.NewWatchedReplica(t, testservers.Pool(t, address), testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
	kept, keptOrg := w.Enrol(t, world.Live, world.Paid)
	lost, lostOrg := w.Enrol(t, world.Live, world.Paid)
	r.WantCode(t, kept, world.Admitted)
	r.WantCode(t, lost, world.Admitted)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, keptOrg.KeyID)
	within(t, r, kept, world.Invalid)
	onStandby := testservers.Pool(t, standby.URL)
	world.WaitFor(t, func() bool {
		var active bool
		err := onStandby.QueryRow(t.Context(), `SELECT active FROM api_keys WHERE id = $1`, keptOrg.KeyID).Scan(&active)
		return err == nil && !active
	})
	linkProxy.Set(t, testservers.Down)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, lostOrg.KeyID) // is never heard of again
	within(t, r, lost, world.Invalid)

	primary.Crash(t)
	testservers.Exec(t, onStandby, `SELECT pg_promote()`)
	proxy.Redirect(t, standby.URL)
	within(t, r, lost, world.Admitted) // as the new primary has it
	within(t, r, kept, world.Invalid)
	world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
	testservers.Exec(t, onStandby, `UPDATE api_keys SET active = NOT active`)
	within(t, r, lost, world.Invalid)
	within(t, r, kept, world.Admitted)
	if n := r.Cache.Stats().Unannounced; n != 0 {
		t.Errorf("%d unannounced changes", n)
	}
}

// TestFailover: the primary dies under load, and a standby that has received everything takes over.
// Nobody who was known to be good is refused, neither meanwhile nor when the feed has found the new
// primary and the facts of the old one no longer count.
func TestFailover(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	primary := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, primary.URL)))
	standby := testservers.StartStandby(t, primary.URL)
	onStandby := testservers.Pool(t, standby.URL)
	address, proxy := testservers.ProxyPostgres(t, primary.URL)
	var replicas []world.Replica
	for range 4 {
		replicas = append(replicas, world.NewWatchedReplica(t, testservers.Pool(t, address), testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness}))
	}
	var apiKeys []string
	for range 50 {
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		apiKeys = append(apiKeys, apiKey)
		for _, r := range replicas {
			r.WantCode(t, apiKey, world.Admitted)
		}
	}
	world.WaitFor(t, func() bool {
		var n int
		err := onStandby.QueryRow(t.Context(), `SELECT count(*) FROM api_keys`).Scan(&n)
		return err == nil && n == len(apiKeys)
	})
	var asked, refused atomic.Int64
	over := make(chan struct{})
	var load sync.WaitGroup
	for _, r := range replicas {
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-over:
					return
				case <-time.After(500 * time.Microsecond):
				}
				asked.Add(1)
				if r.Ask(apiKeys[n%len(apiKeys)]) != world.Admitted {
					refused.Add(1)
				}
			}
		})
	}
	time.Sleep(time.Second)
	primary.Crash(t)
	time.Sleep(3 * shortStaleness) // what is known is past its time
	testservers.Exec(t, onStandby, `SELECT pg_promote()`)
	proxy.Redirect(t, standby.URL)
	time.Sleep(2 * shortStaleness)
	for _, r := range replicas {
		world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
	}
	time.Sleep(shortStaleness)
	close(over)
	load.Wait()
	t.Logf("%d of %d requests with known good keys were refused", refused.Load(), asked.Load())
	if refused.Load() > 0 {
		t.Errorf("%d of %d requests with known good keys were refused", refused.Load(), asked.Load())
	}
}

// TestStandbyReads: the stores read a standby that lags, and the feed is live on the
// primary: the facts are used by their age, and the statistics tell.
func TestStandbyReads(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	primary := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, primary.URL)))
	standby := testservers.Pool(t, testservers.StartStandby(t, primary.URL).URL)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
	world.Watch(t, cache, w.Pool)
	world.Ready(t, cache)
	r := world.ReplicaOn(apikey.NewPostgresKeyStore(standby), apikey.NewPostgresPlanStore(standby), cache)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Admitted })
	testservers.Exec(t, standby, `SELECT pg_wal_replay_pause()`)
	announced := cache.Stats().Announcements
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return cache.Stats().Announcements > announced })
	r.Ask(apiKey) // reads what the standby has, after the announcement
	testservers.Exec(t, standby, `SELECT pg_wal_replay_resume()`)
	within(t, r, apiKey, world.Invalid)
	if got := cache.Stats(); got.StandbyReads == 0 || !got.FeedLive {
		t.Errorf("%+v, want reads of a standby, beside a live feed", got)
	}
}

// TestReadsElsewhere: a proxy sends what the stores read to another primary than the
// one that announces: nothing is vouched for, and the fault is told.
func TestReadsElsewhere(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	for name, elsewhere := range map[string]func(here *world.Postgres) string{
		"another server":                 func(*world.Postgres) string { return testservers.Migrated(t, testservers.StartPostgres(t).URL) },
		"another database of the server": func(*world.Postgres) string { return testservers.PostgresURL(t) },
		"another schema of the database": func(here *world.Postgres) string {
			testservers.Exec(t, here.Pool, `CREATE SCHEMA there`)
			return testservers.Migrated(t, here.Pool.Config().ConnString()+"&search_path=there")
		},
	} {
		t.Run(name, func(t *testing.T) {
			here := world.NewPostgres(t)
			there := world.NewPostgresOn(t, testservers.Pool(t, elsewhere(here)))
			apiKey, org := there.Enrol(t, world.Live, world.Paid)
			cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
			world.Watch(t, cache, here.Pool)
			world.Ready(t, cache)
			r := world.ReplicaOn(there.PostgresKeyStore, there.PostgresPlanStore, cache)
			r.WantCode(t, apiKey, world.Admitted)
			world.WaitFor(t, func() bool { err := cache.Stats().FeedErr; return err != nil })
			if !strings.Contains(cache.Stats().FeedErr.Error(), "the stores read from another server, database or schema than the one that announces") {
				t.Errorf("FeedErr is %v", cache.Stats().FeedErr)
			}
			testservers.Exec(t, there.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
			within(t, r, apiKey, world.Invalid)
		})
	}
}

// TestStartsInAnOutage: a replica that starts while PostgreSQL is away serves nobody whom it cannot
// vouch for. Redis has a record of a key of another database, and one of a key that was deleted and
// that another replica has refused since.
func TestStartsInAnOutage(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	staging := world.NewPostgres(t)
	rdb, secret := testservers.Redis(t), world.NewSecret()
	opts := &apikey.CacheOptions{MaxStaleness: shortStaleness}
	records := func(w *world.Postgres) (apiKey string, org apikey.Org) {
		apiKey, org = w.Enrol(t, world.Live, world.Paid)
		name, _ := world.RedisNames(apikey.HashKey(apiKey), org.ID)
		world.AwaitRecords(t, world.NewPostgresReplica(w, rdb, secret, world.NoMemory()), rdb, apiKey, name)
		return apiKey, org
	}
	foreign, _ := records(staging)
	deleted, org := records(w)
	unknown, _ := records(w) // good, but nobody can know
	running := world.NewWatchedReplica(t, w.Pool, rdb, secret, opts)
	running.MeetStore(t, w)
	running.WantCode(t, deleted, world.Admitted)
	testservers.Exec(t, w.Pool, `DELETE FROM api_keys WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return running.Ask(deleted) == world.Invalid })
	// One that has begun to listen only after that, and knows its tables.
	later := world.NewWatchedReplica(t, w.Pool, rdb, secret, opts)
	later.MeetStore(t, w)
	covered, _ := records(w) // by another replica, since then

	server.Crash(t)
	time.Sleep(shortStaleness)
	fresh := world.NewPostgresReplica(w, rdb, secret, opts)
	for _, c := range []struct {
		who, what, key, want string
		r                    world.Replica
	}{
		{"fresh", "foreign", foreign, world.Unavailable, fresh},
		{"fresh", "deleted", deleted, world.Unavailable, fresh},
		{"fresh", "unknown", unknown, world.Unavailable, fresh},
		{"fresh", "covered", covered, world.Unavailable, fresh},
		{"later", "foreign", foreign, world.Unavailable, later},
		{"later", "deleted", deleted, world.Unavailable, later},
		{"later", "unknown", unknown, world.Unavailable, later},
		{"later", "covered", covered, world.Admitted, later},
		{"running", "foreign", foreign, world.Unavailable, running},
		{"running", "deleted", deleted, world.Unavailable, running},
	} {
		for range 5 { // with the breaker closed, and open
			if got := c.r.Ask(c.key); got != c.want {
				t.Errorf("the %s replica answers %q to the %s key, want %q", c.who, got, c.what, c.want)
			}
		}
	}
}

// TestReplacedDatabase: the database is dropped and made anew, with the same name, in the same run
// of the server. Keys of the old one are no last resort.
func TestReplacedDatabase(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t)
	super := testservers.Pool(t, server.URL)
	testservers.Exec(t, super, `CREATE DATABASE app`)
	url := strings.Replace(server.URL, "/postgres?", "/app?", 1)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, url)))
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
	gone, _ := w.Enrol(t, world.Live, world.Paid)
	r.WantCode(t, gone, world.Admitted)
	sessions := r.Cache.Stats().Announcements
	testservers.Exec(t, super, `DROP DATABASE app WITH (FORCE)`)
	testservers.Exec(t, super, `CREATE DATABASE app`)
	testservers.Migrated(t, url)
	world.WaitFor(t, func() bool { // old connections are still in the pool
		_, err := w.Pool.Exec(t.Context(), `INSERT INTO plan_catalogue VALUES ('new', true)`)
		return err == nil
	})
	world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive && r.Cache.Stats().Announcements > sessions })
	server.Crash(t)
	time.Sleep(shortStaleness)
	for range 5 {
		if got := r.Ask(gone); got == world.Admitted {
			t.Error("in an outage, a key of the database that was dropped is admitted")
		}
	}
}

// TestRewoundTransactions: the server crashes, and uses transaction ids again that it had given out
// before, as after a restore from a copy of its disk. What is announced then counts against records
// that seem to have seen it, and is not held against those of later.
func TestRewoundTransactions(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t, "-c", "synchronous_commit=off", "-c", "wal_writer_delay=10s", "-c", "wal_writer_flush_after=1GB", "-c", "autovacuum=off")
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	revoked, org := w.Enrol(t, world.Live, world.Paid)
	known, _ := w.Enrol(t, world.Live, world.Paid)
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
	xid := func() (xid uint64) {
		err := w.Pool.QueryRow(t.Context(), `SELECT pg_current_xact_id()::text::bigint`).Scan(&xid)
		world.MustNot(t, err)
		return xid
	}
	for range 10 { // leave marks
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET expires_at = now() + '1 day'`)
	}
	world.WaitFor(t, func() bool { return r.Cache.Stats().Announcements >= 20 })
	testservers.Exec(t, w.Pool, `CHECKPOINT`)
	testservers.Exec(t, w.Pool, `DO $$ BEGIN FOR i IN 1..200 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$`)
	before := xid()
	r.WantCode(t, revoked, world.Admitted)
	server.Crash(t)
	server.Start(t)
	world.WaitFor(t, func() bool { return w.Pool.Ping(t.Context()) == nil })
	if after := xid(); after >= before {
		t.Fatalf("transaction %d follows %d: nothing was rewound", after, before)
	}
	announced := r.Cache.Stats().Announcements
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET expires_at = now() + '2 days' WHERE id <> $1`, org.KeyID)
	world.WaitFor(t, func() bool { s := r.Cache.Stats(); return s.FeedLive && s.Announcements > announced })
	reads := func() uint64 {
		before := r.Cache.Stats().StoreReads
		for range 100 {
			r.WantCode(t, known, world.Admitted)
		}
		return r.Cache.Stats().StoreReads - before
	}
	if n := reads(); n > 5 {
		t.Errorf("%d reads for 100 requests after the restart", n)
	}
	announced = r.Cache.Stats().Announcements
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Cache.Stats().Announcements > announced })
	if now := xid(); now >= before {
		t.Fatalf("transaction %d: the revocation was not one that had been given out before, up to %d", now, before)
	}
	server.Crash(t)
	time.Sleep(shortStaleness)
	for range 5 {
		if got := r.Ask(revoked); got == world.Admitted {
			t.Error("in an outage, a key is admitted whose revocation was announced")
		}
		r.WantCode(t, known, world.Admitted) // a crash takes the last resort from nobody
	}
}

// TestOneRedis: two databases, or two sets of tables in one, behind one Redis and with
// one secret. An organisation has paid in the first only.
func TestOneRedis(t *testing.T) {
	t.Parallel()
	schema := func(t *testing.T, paid string) string {
		testservers.Exec(t, testservers.Pool(t, paid), `CREATE SCHEMA other`)
		return testservers.Migrated(t, paid+"&search_path=other")
	}
	for name, other := range map[string]func(t *testing.T, paid string) string{
		"two databases of one server": func(t *testing.T, _ string) string { return testservers.PostgresURL(t) },
		"two servers": func(t *testing.T, _ string) string {
			testservers.Long(t)
			return testservers.Migrated(t, testservers.StartPostgres(t).URL)
		},
		"two schemas": schema,
	} {
		t.Run(name, func(t *testing.T) {
			url := testservers.PostgresURL(t)
			first, rdb, secret := world.NewPostgresOn(t, testservers.Pool(t, url)), testservers.Redis(t), world.NewSecret()
			second := world.NewPostgresOn(t, testservers.Pool(t, other(t, url)))
			apiKey, org := first.Enrol(t, world.Live, world.Paid)
			copyKey(t, second, apiKey, org, true)
			testservers.Exec(t, second.Pool, `UPDATE org_plans SET status = 'past_due'`)
			key, plan := world.RedisNames(apikey.HashKey(apiKey), org.ID)
			for _, replica := range []func(w *world.Postgres, opts *apikey.CacheOptions) world.Replica{
				func(w *world.Postgres, opts *apikey.CacheOptions) world.Replica { // the plan comes with the key
					return world.NewPostgresReplica(w, rdb, secret, opts)
				},
				func(w *world.Postgres, opts *apikey.CacheOptions) world.Replica { // or by itself
					return world.NewReplica(w, rdb, secret, opts)
				},
			} {
				world.AwaitRecords(t, replica(first, world.NoMemory()), rdb, apiKey, key)
				fresh, known := replica(second, nil), replica(second, nil)
				fresh.WantCode(t, apiKey, world.PlanExpired)
				known.MeetStore(t, second)
				known.WantCode(t, apiKey, world.PlanExpired)
				rdb.Del(t.Context(), key, plan)
			}
		})
	}
}

// TestNamespace: stores of the user's own do not say where they read. With namespaces
// they do not share records.
func TestNamespace(t *testing.T) {
	t.Parallel()
	rdb, secret := testservers.Redis(t), world.NewSecret()
	first, second := world.NewMemory(), world.NewMemory()
	apiKey, _ := first.Enrol(t, world.Live, world.Paid)
	a := world.NewReplica(first, rdb, secret, &apikey.CacheOptions{Namespace: "production", MemoryEntries: -1})
	world.WaitFor(t, func() bool {
		a.WantCode(t, apiKey, world.Admitted)
		record, _ := a.Cache.InspectKey(apikey.HashKey(apiKey))
		return record.Found
	})
	world.NewReplica(second, rdb, secret, &apikey.CacheOptions{Namespace: "staging"}).WantCode(t, apiKey, world.Invalid)
	b := world.NewReplica(second, rdb, secret, &apikey.CacheOptions{Namespace: "production"})
	world.WaitFor(t, func() bool { return b.Ask(apiKey) == world.Admitted }) // from Redis
}
