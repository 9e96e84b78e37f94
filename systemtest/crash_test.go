package systemtest

// A process of the server crashes, and all others with it, but not the postmaster; and what replicas
// know of servers that their feed has not met, or meets again.

import (
	"context"
	"errors"
	"net"
	"net/url"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestBackendCrash: transactions that were rolled back just before the crash of a process have left no
// trace, and their ids are used again, in the same run of the postmaster. What is announced then counts
// against records that seem to have seen it.
func TestBackendCrash(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	rdb, secret, opts := testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness}
	r := world.NewWatchedReplica(t, w.Pool, rdb, secret, opts)
	revoked, revokedOrg := w.Enrol(t, world.Live, world.Paid)
	activated, activatedOrg := w.Enrol(t, world.Deactivated, world.Paid)
	connect := func() (conn *pgx.Conn) {
		world.WaitFor(t, func() bool {
			var err error
			conn, err = pgx.Connect(t.Context(), server.URL)
			return err == nil
		})
		return conn
	}
	next := func(conn *pgx.Conn) (xid uint64) {
		world.MustNot(t, conn.QueryRow(t.Context(), `SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint`).Scan(&xid))
		return xid
	}
	rewound := 0
	for rounds := 0; rewound < 2; rounds++ {
		if rounds == 10 {
			t.Fatal("no transaction id is used again")
		}
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = (id = $1)`, revokedOrg.KeyID)
		world.WaitFor(t, func() bool { return r.Ask(revoked) == world.Admitted && r.Ask(activated) == world.Invalid })
		announced := r.Cache.Stats().Announcements
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET expires_at = now() + '1 day'`) // so that both are read again
		world.WaitFor(t, func() bool { return r.Cache.Stats().Announcements > announced+1 })
		victim := connect()
		_, err := victim.Exec(t.Context(), `DO $$ BEGIN FOR i IN 1..100 LOOP PERFORM pg_current_xact_id(); ROLLBACK; END LOOP; END $$`)
		world.MustNot(t, err)
		r.WantCode(t, revoked, world.Admitted)
		r.WantCode(t, activated, world.Invalid)
		before := next(victim)
		world.MustNot(t, syscall.Kill(int(victim.PgConn().PID()), syscall.SIGKILL))
		world.WaitFor(t, func() bool { return victim.Ping(t.Context()) != nil })
		again := connect()
		if next(again)+10 < before { // else something else was written, and the log with it
			rewound++
		}
		world.MustNot(t, again.Close(t.Context()))
		world.WaitFor(t, func() bool { return w.Pool.Ping(t.Context()) == nil })
		announced = r.Cache.Stats().Announcements
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = (id = $1)`, activatedOrg.KeyID)
		world.WaitFor(t, func() bool { s := r.Cache.Stats(); return s.FeedLive && s.Announcements > announced+1 })
		within(t, r, revoked, world.Invalid)
		within(t, r, activated, world.Admitted)
	}
	fresh := world.NewWatchedReplica(t, w.Pool, rdb, secret, opts) // which finds in Redis what was read before
	within(t, fresh, revoked, world.Invalid)
	within(t, fresh, activated, world.Admitted)
}

// TestUnmetServer: the feed cannot connect any more, the server starts again, and the stores read it.
// What they read is the last resort when it goes away.
func TestUnmetServer(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	address, proxy := testservers.ProxyPostgres(t, server.URL)
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
	world.Watch(t, cache, testservers.Pool(t, address))
	world.Ready(t, cache)
	r := world.ReplicaOn(w.PostgresKeyStore, w.PostgresPlanStore, cache)
	good, _ := w.Enrol(t, world.Live, world.Paid)
	r.WantCode(t, good, world.Admitted)
	proxy.Set(t, testservers.Down)
	server.Crash(t)
	server.Start(t)
	for start := time.Now(); time.Since(start) < 2*shortStaleness+shortStaleness/2; time.Sleep(20 * time.Millisecond) {
		r.WantCode(t, good, world.Admitted)
	}
	server.Crash(t)
	time.Sleep(shortStaleness)
	for range 20 {
		r.WantCode(t, good, world.Admitted)
	}
}

// TestSwapAndBack: the tables are replaced by renaming others, and that is undone. A revocation that was
// heard before is not forgotten.
func TestSwapAndBack(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	r := world.NewWatchedReplica(t, w.Pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
	revoked, org := w.Enrol(t, world.Live, world.Paid)
	other, _ := w.Enrol(t, world.Live, world.Paid)
	r.WantCode(t, revoked, world.Admitted)
	announced := r.Cache.Stats().Announcements
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Cache.Stats().Announcements > announced })
	testservers.Exec(t, w.Pool, `CREATE TABLE green (LIKE api_keys INCLUDING ALL); INSERT INTO green SELECT * FROM api_keys`)
	for _, swap := range []string{
		`BEGIN; ALTER TABLE api_keys RENAME TO blue; ALTER TABLE green RENAME TO api_keys; COMMIT`,
		`BEGIN; ALTER TABLE api_keys RENAME TO green; ALTER TABLE blue RENAME TO api_keys; COMMIT`,
	} {
		testservers.Exec(t, w.Pool, swap)
		world.WaitFor(t, func() bool { r.Ask(other); return !r.Cache.Stats().FeedLive })
		world.WaitFor(t, func() bool { r.Ask(other); return r.Cache.Stats().FeedLive })
	}
	server.Crash(t)
	time.Sleep(shortStaleness)
	for range 5 {
		if got := r.Ask(revoked); got == world.Admitted {
			t.Error("in an outage, a key is admitted whose revocation was announced")
		}
	}
}

// TestLaterRefusal: this replica knows a key as good, and another one has read since that it is dead. In
// an outage the record in Redis tells.
func TestLaterRefusal(t *testing.T) {
	t.Parallel()
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	rdb, secret, opts := testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness}
	knows, reads := world.NewPostgresReplica(w, rdb, secret, opts), world.NewPostgresReplica(w, rdb, secret, opts)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	knows.WantCode(t, apiKey, world.Admitted)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	time.Sleep(shortStaleness)
	reads.WantCode(t, apiKey, world.Invalid)
	world.WaitFor(t, func() bool {
		record, err := knows.Cache.InspectKey(apikey.HashKey(apiKey))
		return err == nil && record.Found && !record.Value.Active
	})
	server.Crash(t)
	time.Sleep(shortStaleness)
	for range 5 {
		knows.WantCode(t, apiKey, world.Unavailable)
	}
}

// TestHooksAreNoOutage: what hooks of the pool return does not say that the server is away.
func TestHooksAreNoOutage(t *testing.T) {
	t.Parallel()
	for name, hook := range map[string]func(*pgxpool.Config, *atomic.Bool){
		"BeforeConnect": func(c *pgxpool.Config, on *atomic.Bool) {
			c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
				if on.Load() {
					return errors.New("the service of tokens says 429")
				}
				return nil
			}
		},
		"PrepareConn": func(c *pgxpool.Config, on *atomic.Bool) {
			c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) {
				if on.Load() {
					return true, errors.New("the limit of this tenant")
				}
				return true, nil
			}
		},
		"no descriptors": func(c *pgxpool.Config, on *atomic.Bool) {
			dial := c.ConnConfig.DialFunc
			c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
				if on.Load() {
					return nil, syscall.EMFILE
				}
				return dial(ctx, network, address)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := world.NewPostgres(t)
			config := w.Pool.Config()
			var on atomic.Bool
			hook(config, &on)
			pool, err := pgxpool.NewWithConfig(t.Context(), config)
			world.MustNot(t, err)
			defer pool.Close()
			cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
			r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
			apiKey, org := w.Enrol(t, world.Live, world.Paid)
			r.WantCode(t, apiKey, world.Admitted)
			testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
			time.Sleep(shortStaleness)
			on.Store(true)
			pool.Reset()
			for range 8 {
				r.WantCode(t, apiKey, world.Unavailable)
			}
		})
	}
}

// TestOutageOfAFullServer: a role may have fewer connections than its pool, and has been told so. When
// the server goes away then, that is an outage.
func TestOutageOfAFullServer(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	for name, goAway := range map[string]func(*testing.T, *testservers.Server, *testservers.Proxy){
		"crashes": func(t *testing.T, s *testservers.Server, _ *testservers.Proxy) { s.Crash(t) },
		"freezes": func(t *testing.T, _ *testservers.Server, p *testservers.Proxy) { p.Set(t, testservers.Frozen) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := testservers.StartPostgres(t)
			w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
			testservers.Exec(t, w.Pool, `CREATE ROLE few LOGIN CONNECTION LIMIT 4; GRANT SELECT ON ALL TABLES IN SCHEMA public TO few; GRANT EXECUTE ON FUNCTION apikey_announce() TO few`)
			address, proxy := testservers.ProxyPostgres(t, asRole(t, server.URL, "few"))
			pool := testservers.Pool(t, address+"&pool_max_conns=8")
			r := world.NewWatchedReplica(t, pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
			var apiKeys []string
			for range 40 {
				apiKey, _ := w.Enrol(t, world.Live, world.Paid)
				apiKeys = append(apiKeys, apiKey)
			}
			ask := func() (refused int64) {
				codes := make(chan string, len(apiKeys))
				for _, apiKey := range apiKeys {
					go func() { codes <- r.Ask(apiKey) }()
				}
				for range apiKeys {
					if <-codes != world.Admitted {
						refused++
					}
				}
				return refused
			}
			held, err := pool.Acquire(t.Context())
			world.MustNot(t, err)
			ask()
			time.Sleep(shortStaleness)
			ask()
			held.Release()
			world.WaitFor(t, func() bool { return ask() == 0 })
			goAway(t, server, proxy)
			time.Sleep(2 * shortStaleness)
			ask() // it is found out
			for range 5 {
				if n := ask(); n > 0 {
					t.Errorf("%d of %d known good keys are refused", n, len(apiKeys))
				}
			}
			proxy.Set(t, testservers.Healthy)
		})
	}
}

// asRole returns the URL of a server as a role.
func asRole(t *testing.T, serverURL, role string) string {
	t.Helper()
	u, err := url.Parse(serverURL)
	world.MustNot(t, err)
	u.User = url.User(role)
	return u.String()
}
