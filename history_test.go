package apikey_test

// Another server behind the same address, and servers that stores should not read:
// what was known of one must not be taken for what another says.

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
)

const historyStaleness = time.Second // MaxStaleness

// within waits for an answer for as long as facts may go unnoticed, and some time for a
// busy machine.
func within(t *testing.T, r replica, apiKey, want string) {
	t.Helper()
	start := time.Now()
	for r.ask(apiKey) != want {
		if time.Since(start) > historyStaleness+2*time.Second {
			t.Fatalf("answers %q after %v, want %q", r.ask(apiKey), time.Since(start), want)
		}
		time.Sleep(time.Millisecond)
	}
	for range 3 { // and stays so
		r.wantCode(t, apiKey, want)
	}
}

// TestAnotherDatabase: restored from a dump, or switched over by logical replication:
// a database with other transaction ids stands behind the address, where one key is
// revoked that was live, and one is live that was revoked.
func TestAnotherDatabase(t *testing.T) {
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
			rdb, secret := testservers.Redis(t), newSecret()
			opts := &apikey.CacheOptions{MaxStaleness: historyStaleness}
			w := newPostgresWorldOn(t, pools[0])
			other := newPostgresWorldOn(t, pools[1])
			revoked, org := w.enrol(t, live, paid)
			restored, restoredOrg := w.enrol(t, deactivated, paid)
			lost, _ := w.enrol(t, live, paid) // not in the other database
			copyKey(t, other, revoked, org, false)
			copyKey(t, other, restored, restoredOrg, true)
			r := watchedReplica(t, testservers.Pool(t, address), rdb, secret, opts)
			for range 10 { // leave marks
				testservers.Exec(t, pools[0], `UPDATE api_keys SET expires_at = now() + '1 day'`)
			}
			waitFor(t, func() bool {
				return r.ask(revoked) == admitted && r.ask(restored) == invalid && r.ask(lost) == admitted
			})

			proxy.Redirect(t, servers[1].URL)
			within(t, r, revoked, invalid)
			within(t, r, restored, admitted)
			within(t, r, lost, invalid)
			waitFor(t, func() bool { return r.cache.Stats().FeedLive })
			// Vouched for and announced as before.
			before := r.cache.Stats().StoreReads
			for start := time.Now(); time.Since(start) < 2*historyStaleness; time.Sleep(10 * time.Millisecond) {
				r.wantCode(t, restored, admitted)
			}
			if n := r.cache.Stats().StoreReads - before; n > 2 {
				t.Errorf("%d lookups of one key: it is refuted over and over, or not vouched for", n)
			}
			testservers.Exec(t, pools[1], `UPDATE api_keys SET active = NOT active`)
			within(t, r, revoked, admitted)
			within(t, r, restored, invalid)

			// Another replica, which finds records of both in Redis.
			fresh := watchedReplica(t, testservers.Pool(t, address), rdb, secret, opts)
			within(t, fresh, revoked, admitted)
			within(t, fresh, lost, invalid)
			if n := r.cache.Stats().Unannounced; n != 0 {
				t.Errorf("%d unannounced changes", n)
			}

			// In an outage of the new one, what the old one said is worth nothing.
			servers[1].Crash(t)
			time.Sleep(historyStaleness)
			for _, r := range []replica{r, fresh} {
				if got := r.ask(lost); got == admitted {
					t.Error("in an outage, a key of the old database is admitted")
				}
				if got := r.ask(revoked); got != admitted {
					t.Errorf("in an outage, a known good key of the new database is answered %q", got)
				}
			}
		})
	}
}

// copyKey puts a key on record in other.
func copyKey(t *testing.T, other *postgresWorld, apiKey string, org apikey.Org, active bool) {
	t.Helper()
	h := apikey.HashKey(apiKey)
	testservers.Exec(t, other.pool, `INSERT INTO organisations VALUES ($1)`, org.ID)
	testservers.Exec(t, other.pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ($1, 'starter', 'active')`, org.ID)
	testservers.Exec(t, other.pool, `INSERT INTO api_keys (id, org_id, key_hash, active) VALUES ($1, $2, $3, $4)`, org.KeyID, org.ID, h[:], active)
}

// TestPromotedStandby: the primary dies, and a standby takes over that has not received
// the last transactions: their ids are used again.
func TestPromotedStandby(t *testing.T) {
	t.Parallel()
	primary := testservers.StartPostgres(t)
	w := newPostgresWorldOn(t, testservers.Pool(t, testservers.Migrated(t, primary.URL)))
	link, linkProxy := testservers.ProxyPostgres(t, primary.URL)
	standby := testservers.StartStandby(t, link)
	address, proxy := testservers.ProxyPostgres(t, primary.URL)
	r := watchedReplica(t, testservers.Pool(t, address), testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: historyStaleness})
	kept, keptOrg := w.enrol(t, live, paid)
	lost, lostOrg := w.enrol(t, live, paid)
	r.wantCode(t, kept, admitted)
	r.wantCode(t, lost, admitted)
	testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, keptOrg.KeyID)
	within(t, r, kept, invalid)
	onStandby := testservers.Pool(t, standby.URL)
	waitFor(t, func() bool {
		var active bool
		err := onStandby.QueryRow(t.Context(), `SELECT active FROM api_keys WHERE id = $1`, keptOrg.KeyID).Scan(&active)
		return err == nil && !active
	})
	linkProxy.Set(t, testservers.Down)
	testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, lostOrg.KeyID) // is never heard of again
	within(t, r, lost, invalid)

	primary.Crash(t)
	testservers.Exec(t, onStandby, `SELECT pg_promote()`)
	proxy.Redirect(t, standby.URL)
	within(t, r, lost, admitted) // as the new primary has it
	within(t, r, kept, invalid)
	waitFor(t, func() bool { return r.cache.Stats().FeedLive })
	testservers.Exec(t, onStandby, `UPDATE api_keys SET active = NOT active`)
	within(t, r, lost, invalid)
	within(t, r, kept, admitted)
	if n := r.cache.Stats().Unannounced; n != 0 {
		t.Errorf("%d unannounced changes", n)
	}
}

// TestStandbyReads: the stores read a standby that lags, and the feed is live on the
// primary: the facts are used by their age, and the statistics tell.
func TestStandbyReads(t *testing.T) {
	t.Parallel()
	primary := testservers.StartPostgres(t)
	w := newPostgresWorldOn(t, testservers.Pool(t, testservers.Migrated(t, primary.URL)))
	standby := testservers.Pool(t, testservers.StartStandby(t, primary.URL).URL)
	apiKey, org := w.enrol(t, live, paid)
	cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: historyStaleness})
	watch(t, cache, w.pool)
	waitFor(t, func() bool { return cache.Stats().FeedLive })
	r := replica{apikey.New(apikey.NewPostgresKeyStore(standby), apikey.NewPostgresPlanStore(standby), &apikey.Options{Cache: cache}), cache}
	waitFor(t, func() bool { return r.ask(apiKey) == admitted })
	testservers.Exec(t, standby, `SELECT pg_wal_replay_pause()`)
	testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	waitFor(t, func() bool { return cache.Stats().Announcements >= 1 })
	r.ask(apiKey) // reads what the standby has, after the announcement
	testservers.Exec(t, standby, `SELECT pg_wal_replay_resume()`)
	within(t, r, apiKey, invalid)
	if got := cache.Stats(); got.StandbyReads == 0 || !got.FeedLive {
		t.Errorf("%+v, want reads of a standby, beside a live feed", got)
	}
}

// TestReadsElsewhere: a proxy sends what the stores read to another primary than the
// one that announces: nothing is vouched for, and the fault is told.
func TestReadsElsewhere(t *testing.T) {
	t.Parallel()
	for name, elsewhere := range map[string]func() string{
		"another server":                 func() string { return testservers.Migrated(t, testservers.StartPostgres(t).URL) },
		"another database of the server": func() string { return testservers.PostgresURL(t) },
	} {
		t.Run(name, func(t *testing.T) {
			here, there := newPostgresWorld(t), newPostgresWorldOn(t, testservers.Pool(t, elsewhere()))
			apiKey, org := there.enrol(t, live, paid)
			cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: historyStaleness})
			watch(t, cache, here.pool)
			waitFor(t, func() bool { return cache.Stats().FeedLive })
			r := replica{apikey.New(there.PostgresKeyStore, there.PostgresPlanStore, &apikey.Options{Cache: cache}), cache}
			r.wantCode(t, apiKey, admitted)
			waitFor(t, func() bool { err := cache.Stats().FeedErr; return err != nil })
			if cache.Stats().FeedErr.Error() != "the stores read from another server or database than the one that announces: is a proxy or a switch-over in between?" {
				t.Errorf("FeedErr is %v", cache.Stats().FeedErr)
			}
			testservers.Exec(t, there.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
			within(t, r, apiKey, invalid)
		})
	}
}

// TestOneRedis: two databases, or two sets of tables in one, behind one Redis and with
// one secret. An organisation has paid in the first only.
func TestOneRedis(t *testing.T) {
	schema := func(t *testing.T, paid string) string {
		testservers.Exec(t, testservers.Pool(t, paid), `CREATE SCHEMA other`)
		return testservers.Migrated(t, paid+"&search_path=other")
	}
	for name, other := range map[string]func(t *testing.T, paid string) string{
		"two databases of one server": func(t *testing.T, _ string) string { return testservers.PostgresURL(t) },
		"two servers":                 func(t *testing.T, _ string) string { return testservers.Migrated(t, testservers.StartPostgres(t).URL) },
		"two schemas":                 schema,
	} {
		t.Run(name, func(t *testing.T) {
			url := testservers.PostgresURL(t)
			first, rdb, secret := newPostgresWorldOn(t, testservers.Pool(t, url)), testservers.Redis(t), newSecret()
			second := newPostgresWorldOn(t, testservers.Pool(t, other(t, url)))
			apiKey, org := first.enrol(t, live, paid)
			copyKey(t, second, apiKey, org, true)
			testservers.Exec(t, second.pool, `UPDATE org_plans SET status = 'past_due'`)
			for _, replicas := range []func(w *postgresWorld) replica{
				func(w *postgresWorld) replica { return newPostgresReplica(w, rdb, secret, nil) }, // the plan comes with the key
				func(w *postgresWorld) replica { return newReplica(w, rdb, secret, nil) },         // or by itself
			} {
				r := replicas(first)
				r.wantCode(t, apiKey, admitted)
				key, _ := r.cache.RedisNames(apikey.HashKey(apiKey), org.ID)
				waitFor(t, func() bool { return rdb.Exists(t.Context(), key).Val() == 1 })
				fresh, known := replicas(second), replicas(second)
				fresh.wantCode(t, apiKey, planExpired)
				known.meetStore(t, second)
				known.wantCode(t, apiKey, planExpired)
				rdb.FlushDB(t.Context())
			}
		})
	}
}

// TestNamespace: stores of the user's own do not say where they read. With namespaces
// they do not share records.
func TestNamespace(t *testing.T) {
	rdb, secret := testservers.Redis(t), newSecret()
	first, second := newMemoryWorld(), newMemoryWorld()
	apiKey, org := first.enrol(t, live, paid)
	a := newReplica(first, rdb, secret, &apikey.CacheOptions{Namespace: "production"})
	a.wantCode(t, apiKey, admitted)
	name, _ := a.cache.RedisNames(apikey.HashKey(apiKey), org.ID)
	waitFor(t, func() bool { return rdb.Exists(t.Context(), name).Val() == 1 })
	newReplica(second, rdb, secret, &apikey.CacheOptions{Namespace: "staging"}).wantCode(t, apiKey, invalid)
	b := newReplica(second, rdb, secret, &apikey.CacheOptions{Namespace: "production"})
	waitFor(t, func() bool { return b.ask(apiKey) == admitted }) // from Redis
}

// TestOthersHooks: what a service does with notifications on its own connections, or
// with its own statements, does not end the process or reach the feed.
func TestOthersHooks(t *testing.T) {
	notified := make(chan *pgconn.Notification, 100)
	f := newFleet(t, 1, nil, func(c *pgxpool.Config) {
		c.ConnConfig.OnNotification = func(_ *pgconn.PgConn, n *pgconn.Notification) { notified <- n }
		c.ConnConfig.AfterConnect = func(context.Context, *pgconn.PgConn) error { return nil }
	})
	apiKey, org := f.enrol(t, live, paid)
	f.replicas[0].wantCode(t, apiKey, admitted)
	testservers.Exec(t, f.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	waitFor(t, func() bool { return f.replicas[0].ask(apiKey) == invalid })
	if len(notified) > 0 {
		t.Error("the service's handler was given what the feed listens to")
	}
}

// TestBusyPool: the application keeps every connection of the pool, PostgreSQL is well:
// changes are announced all the same.
func TestBusyPool(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 1, &apikey.CacheOptions{MaxStaleness: historyStaleness}, func(c *pgxpool.Config) { c.MaxConns = 2 })
	apiKey, org := f.enrol(t, live, paid)
	other, _ := f.enrol(t, live, paid)
	r := f.replicas[0]
	r.wantCode(t, apiKey, admitted)
	r.wantCode(t, other, admitted)
	for range 2 {
		conn, err := f.pools[0].Acquire(t.Context())
		mustNot(t, err)
		defer conn.Release()
	}
	for start := time.Now(); time.Since(start) < 3*historyStaleness; time.Sleep(10 * time.Millisecond) {
		r.wantCode(t, other, admitted)
		if !r.cache.Stats().FeedLive {
			t.Fatalf("the feed is not live: %v", r.cache.Stats().FeedErr)
		}
	}
	testservers.Exec(t, f.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	waitFor(t, func() bool { return r.ask(apiKey) == unavailable }) // overtaken, and cannot be read
	if got := r.cache.Stats(); got.StaleUses != 0 || !got.FeedLive {
		t.Errorf("%+v", got)
	}
}

// TestSlowNetwork: the feed is live although notices take a good part of MaxStaleness.
func TestSlowNetwork(t *testing.T) {
	for _, delay := range []time.Duration{350 * time.Millisecond, 700 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			t.Parallel()
			w := newPostgresWorld(t)
			address, proxy := testservers.ProxyPostgres(t, w.pool.Config().ConnString())
			proxy.Delay(delay)
			cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: historyStaleness})
			pool := testservers.Pool(t, address+"0") // 10 s to connect
			watch(t, cache, pool)
			waitFor(t, func() bool { return cache.Stats().FeedLive })
			liveFor, total := 0, 0
			for start := time.Now(); time.Since(start) < 4*time.Second; time.Sleep(5 * time.Millisecond) {
				total++
				if cache.Stats().FeedLive {
					liveFor++
				}
			}
			if liveFor*100 < 95*total {
				t.Errorf("live for %d %% of the time", liveFor*100/total)
			}
		})
	}
}
