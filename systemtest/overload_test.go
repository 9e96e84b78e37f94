package systemtest

// More load than keeps all facts fresh. Overload is no outage, and an outage is one for
// everybody: what is busy admits nothing that is out of date, and what is away refuses nobody
// who was known to be good.

import (
	"context"
	"fmt"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestRevokedUnderLoad: without the feed, with the store 5 ms away and more requests than
// keep all keys fresh, with made-up keys among them or not, a revoked key is admitted for
// MaxStaleness and no longer.
func TestRevokedUnderLoad(t *testing.T) {
	testservers.Long(t)
	const maxStaleness, slack = time.Second, time.Second
	for name, flooded := range map[string]bool{"many keys": false, "and a flood of made-up ones": true} {
		t.Run(name, func(t *testing.T) {
			w := world.NewPostgres(t)
			address, proxy := testservers.ProxyPostgres(t, w.Pool.Config().ConnString())
			proxy.Delay(5 * time.Millisecond)
			pool := testservers.Pool(t, address)
			testservers.Exec(t, w.Pool, `INSERT INTO organisations VALUES ('many')`)
			testservers.Exec(t, w.Pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ('many', 'starter', 'active')`)
			testservers.Exec(t, w.Pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'many', sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(0, 2999) i`)
			cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
			r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
			var revokedAt, refused, late, longest atomic.Int64
			var wg sync.WaitGroup
			defer wg.Wait()
			ask := func(i int) {
				asked := time.Now()
				code := r.Ask(fmt.Sprintf("a-key-of-many-%d", i))
				at := revokedAt.Load()
				switch {
				case code == world.Unavailable:
					refused.Add(1)
				case code == world.Admitted && i < 500 && at > 0 && asked.UnixNano()-at > int64(maxStaleness):
					longest.Store(max(longest.Load(), asked.UnixNano()-at))
					if asked.UnixNano()-at > int64(maxStaleness+slack) {
						late.Add(1)
					}
				}
			}
			n := 0
			for start := time.Now(); time.Since(start) < 2*maxStaleness+2*slack; time.Sleep(time.Millisecond) {
				if revokedAt.Load() == 0 && time.Since(start) > maxStaleness {
					testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE key_hash IN (SELECT sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(0, 499) i)`)
					revokedAt.Store(time.Now().UnixNano())
				}
				for range 2 {
					i := n
					n++
					wg.Go(func() { ask(i * 7919 % 3000) })
					if flooded {
						wg.Go(func() { r.Ask(fmt.Sprintf("made-up-made-up-%d", i)) })
					}
				}
			}
			wg.Wait()
			if late.Load() > 0 || refused.Load() > 0 {
				t.Errorf("%d revoked keys were admitted late, the longest %v after it was revoked; %d answers are 503", late.Load(), time.Duration(longest.Load()), refused.Load())
			}
		})
	}
}

// atOnce are how many keys are asked for at once: fewer than there are batches, a few more,
// and many.
var atOnce = []int{1, 5, 20, 300}

// enrolAtOnce makes n organisations with a key each, in few statements, and returns the keys.
func enrolAtOnce(t testing.TB, w *world.Postgres, n int) (keys []string) {
	t.Helper()
	testservers.Exec(t, w.Pool, `INSERT INTO organisations SELECT 'many_' || i FROM generate_series(1, $1::int) i`, n)
	testservers.Exec(t, w.Pool, `INSERT INTO org_plans (org_id, plan, status) SELECT 'many_' || i, 'starter', 'active' FROM generate_series(1, $1::int) i`, n)
	testservers.Exec(t, w.Pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'many_' || i, sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(1, $1::int) i`, n)
	for i := range n {
		keys = append(keys, fmt.Sprintf("a-key-of-many-%d", i+1))
	}
	return keys
}

// askAll asks for all keys at once, and counts the answers.
func askAll(r world.Replica, keys []string) map[string]int {
	answers := make(chan string, len(keys))
	for _, key := range keys {
		go func() { answers <- r.Ask(key) }()
	}
	counts := map[string]int{}
	for range keys {
		counts[<-answers]++
	}
	return counts
}

// known has a replica know all keys as good, with facts that are past MaxStaleness when it
// returns.
func known(t testing.TB, r world.Replica, keys []string, maxStaleness time.Duration) {
	t.Helper()
	for _, key := range keys {
		world.WaitFor(t, func() bool { return r.Ask(key) == world.Admitted })
	}
	time.Sleep(maxStaleness)
}

// TestBusyIsNoOutage: PostgreSQL is well, and the application keeps all connections of the
// pool, or hands them out one by one. Keys that were revoked are admitted no longer, however
// many are asked for at once, and whether there is a feed, none, or one that cannot connect.
func TestBusyIsNoOutage(t *testing.T) {
	const maxStaleness = time.Second
	hold := func(ctx context.Context, t *testing.T, pool *pgxpool.Pool) {
		for range pool.Config().MaxConns {
			conn, err := pool.Acquire(ctx)
			world.MustNot(t, err)
			t.Cleanup(conn.Release)
		}
	}
	churn := func(ctx context.Context, t *testing.T, pool *pgxpool.Pool) {
		var users sync.WaitGroup
		ctx, cancel := context.WithCancel(ctx)
		for i := range 3 * pool.Config().MaxConns {
			users.Go(func() {
				for ctx.Err() == nil {
					if conn, err := pool.Acquire(ctx); err == nil {
						time.Sleep(time.Duration(150+10*i) * time.Millisecond)
						conn.Release()
					}
				}
			})
		}
		t.Cleanup(func() { cancel(); users.Wait() })
	}
	nobody := func(*testing.T, *apikey.Cache, *pgxpool.Pool) {}
	elsewhere := func(t *testing.T, cache *apikey.Cache, _ *pgxpool.Pool) {
		world.Watch(t, cache, testservers.Pool(t, "postgres://u@127.0.0.1:1/db"))
		world.WaitFor(t, func() bool { return cache.Stats().FeedErr != nil })
	}
	for name, c := range map[string]struct {
		use   func(context.Context, *testing.T, *pgxpool.Pool)
		watch func(*testing.T, *apikey.Cache, *pgxpool.Pool)
	}{
		"all kept":                  {hold, nobody},
		"handed out":                {churn, nobody},
		"all kept, feed refused":    {hold, elsewhere},
		"handed out, feed refused ": {churn, elsewhere},
	} {
		for _, n := range atOnce {
			t.Run(fmt.Sprintf("%s, %d at once", name, n), func(t *testing.T) {
				if n != 20 {
					testservers.Long(t)
				}
				t.Parallel()
				w := world.NewPostgres(t)
				keys := enrolAtOnce(t, w, n)
				pool := testservers.Pool(t, w.Pool.Config().ConnString()+"&pool_max_conns=4")
				cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
				r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
				c.watch(t, cache, pool)
				known(t, r, keys, 0)
				c.use(t.Context(), t, pool)
				testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false`)
				time.Sleep(maxStaleness)
				total := map[string]int{}
				for range 6 {
					for code, count := range askAll(r, keys) {
						total[code] += count
					}
				}
				t.Logf("%v, %+v", total, cache.Stats())
				if total[world.Admitted] > 0 || cache.Stats().StaleUses > 0 {
					t.Errorf("answered %v; want no admission", total)
				}
			})
		}
	}
}

// TestFrozenForMany: nothing passes to and from PostgreSQL any longer, and many known good
// keys are asked for at once. None is refused, feed or not, whether the pool has idle
// connections, has none, or has fewer than there are batches.
func TestFrozenForMany(t *testing.T) {
	const maxStaleness = time.Second
	for name, c := range map[string]struct {
		conns   int32
		watched bool
		empty   bool
	}{
		"no feed":                   {conns: 4},
		"feed":                      {conns: 4, watched: true},
		"no feed, a small pool":     {conns: 2},
		"no feed, an empty pool":    {conns: 4, empty: true},
		"no feed, connections kept": {conns: 8},
	} {
		for _, n := range atOnce {
			t.Run(fmt.Sprintf("%s, %d at once", name, n), func(t *testing.T) {
				if n != 300 || c.watched {
					testservers.Long(t)
				}
				t.Parallel()
				w := world.NewPostgres(t)
				keys := enrolAtOnce(t, w, n)
				address, proxy := testservers.ProxyPostgres(t, w.Pool.Config().ConnString())
				pool := testservers.Pool(t, fmt.Sprintf("%s&pool_max_conns=%d", address, c.conns))
				cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
				if c.watched {
					world.Watch(t, cache, pool)
					world.Ready(t, cache)
				}
				r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
				known(t, r, keys, 0)
				if c.empty {
					pool.Reset()
				}
				for range c.conns - 4 { // the application's
					conn, err := pool.Acquire(t.Context())
					world.MustNot(t, err)
					defer conn.Release()
				}
				proxy.Set(t, testservers.Frozen)
				defer proxy.Set(t, testservers.Healthy) // or else it takes long to close
				time.Sleep(2 * maxStaleness)
				total := map[string]int{}
				for range 12 {
					for code, count := range askAll(r, keys) {
						total[code] += count
					}
					time.Sleep(300 * time.Millisecond)
				}
				t.Logf("%v, %+v", total, cache.Stats())
				if total[world.Admitted] != 12*n {
					t.Errorf("answered %v, want all admitted", total)
				}
			})
		}
	}
}

// TestAlterTypeUnderLoad: the type of a column is changed in the documented way while cold
// keys are looked up, on connections that have prepared the statement. No good key is refused.
func TestAlterTypeUnderLoad(t *testing.T) {
	t.Parallel()
	const conns, changes = 16, 6
	block := regexp.MustCompile("(?s)```sql\n(BEGIN;.*?COMMIT;)\n```").FindStringSubmatch(document(t, "docs/operations.md"))
	if block == nil {
		t.Fatal("there is no such SQL")
	}
	w := world.NewPostgres(t)
	keys := enrolAtOnce(t, w, 400)
	pool := testservers.Pool(t, fmt.Sprintf("%s&pool_max_conns=%d", w.Pool.Config().ConnString(), conns))
	newReplica := func() world.Replica { // to which all keys are cold
		cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxBatches: conns, MaxBatchSize: 2, StoreTimeout: 10 * time.Second})
		return world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
	}
	for range 10 { // until each connection has prepared what it uses
		askAll(newReplica(), keys)
	}
	var asks sync.WaitGroup
	var done atomic.Bool
	var stats []apikey.CacheStats
	total := map[string]int{}
	asks.Go(func() {
		for !done.Load() {
			r := newReplica()
			for code, count := range askAll(r, keys) {
				total[code] += count
			}
			stats = append(stats, r.Cache.Stats())
		}
	})
	for i := range changes {
		time.Sleep(200 * time.Millisecond)
		sql := regexp.MustCompile(`varchar\(\d+\)`).ReplaceAllString(block[1], []string{"varchar(255)", "text"}[i%2])
		testservers.Exec(t, w.Pool, sql)
	}
	time.Sleep(200 * time.Millisecond)
	done.Store(true)
	asks.Wait()
	t.Logf("%v", total)
	for _, s := range stats {
		if s.StoreErrors > 0 || s.StoreSkipped > 0 || s.StoreBusy > 0 {
			t.Errorf("%+v, want no error, and nothing skipped", s)
		}
	}
	if len(total) != 1 || total[world.Admitted] == 0 {
		t.Errorf("answered %v, want all admitted", total)
	}
}
