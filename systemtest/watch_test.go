package systemtest

// Changes that take effect, and what holds when they are not heard.

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestChangesTakeEffect: every kind of change, by plain SQL, on three replicas.
// It reports how long the change took from the return of the statement to the
// first answer that follows from it, on each.
func TestChangesTakeEffect(t *testing.T) {
	t.Parallel()
	// Without the feed a revocation would take a minute, and an admission a second.
	f := world.NewFleet(t, 3, &apikey.CacheOptions{MaxStaleness: time.Minute})
	rounds := testservers.Sized(4, 50)
	type change struct {
		name string
		sql  string // $1 is the organisation
		want string // the answer from then on
	}
	changes := []change{
		{"revoke", `UPDATE api_keys SET active = false WHERE org_id = $1`, world.Invalid},
		{"activate", `UPDATE api_keys SET active = true WHERE org_id = $1`, world.Admitted},
		{"expire the key", `UPDATE api_keys SET expires_at = now() WHERE org_id = $1`, world.Invalid},
		{"prolong the key", `UPDATE api_keys SET expires_at = NULL WHERE org_id = $1`, world.Admitted},
		{"expire the plan", `UPDATE org_plans SET status = 'expired' WHERE org_id = $1`, world.PlanExpired},
		{"renew", `UPDATE org_plans SET status = 'active', ends_at = now() + '1 month' WHERE org_id = $1`, world.Admitted},
		{"end", `UPDATE org_plans SET ends_at = now() WHERE org_id = $1`, world.PlanExpired},
		{"upgrade", `UPDATE org_plans SET ends_at = NULL WHERE org_id = $1`, world.Admitted},
		{"downgrade", `UPDATE org_plans SET plan = 'basic' WHERE org_id = $1`, world.PlanExpired},
		{"the tier gets the API", `UPDATE plan_catalogue SET api_access = true WHERE name = 'basic' AND $1 <> ''`, world.Admitted},
		{"the tier loses the API", `UPDATE plan_catalogue SET api_access = false WHERE name = 'basic' AND $1 <> ''`, world.PlanExpired},
		{"unsubscribe", `DELETE FROM org_plans WHERE org_id = $1`, world.PlanExpired},
		{"subscribe", `INSERT INTO org_plans (org_id, plan, status) VALUES ($1, 'starter', 'active')`, world.Admitted},
		{"delete the key", `DELETE FROM api_keys WHERE org_id = $1`, world.Invalid},
	}
	var took []time.Duration
	for range rounds {
		apiKey, org := f.Enrol(t, world.Unknown, world.Paid)
		h := apikey.HashKey(apiKey)
		testservers.Exec(t, f.Pool, `UPDATE plan_catalogue SET api_access = false WHERE name = 'basic'`)
		for _, r := range f.Replicas {
			r.WantCode(t, apiKey, world.Invalid) // asked for a moment before it is created
		}
		create := change{"create", fmt.Sprintf(`INSERT INTO api_keys (org_id, key_hash) VALUES ($1, '\x%x')`, h[:]), world.Admitted}
		for _, c := range append([]change{create}, changes...) {
			testservers.Exec(t, f.Pool, c.sql, org.ID)
			start := time.Now()
			var wg sync.WaitGroup
			effect := make([]time.Duration, len(f.Replicas))
			for i, r := range f.Replicas {
				wg.Go(func() {
					for r.Ask(apiKey) != c.want {
						if time.Since(start) > 20*time.Second {
							t.Errorf("%s: replica %d answers %q after 20 s, want %q", c.name, i, r.Ask(apiKey), c.want)
							break
						}
						runtime.Gosched()
					}
					effect[i] = time.Since(start)
				})
			}
			wg.Wait()
			took = append(took, effect...)
		}
	}
	slices.Sort(took)
	at := func(p float64) time.Duration { return took[int(p*float64(len(took)-1))].Round(10 * time.Microsecond) }
	t.Logf("%d changes on %d replicas, from commit to effect: p50 %v, p99 %v, max %v",
		rounds*(len(changes)+1), len(f.Replicas), at(0.5), at(0.99), at(1))
	if at(0.99) > 500*time.Millisecond {
		t.Errorf("p99 is %v: that is not the feed", at(0.99))
	}
	for i, r := range f.Replicas {
		if got := r.Cache.Stats(); got.Unannounced != 0 || got.StoreErrors != 0 {
			t.Errorf("replica %d: %+v", i, got)
		}
	}
}

// TestVouchedFactsAreNotReadAgain: under a live feed a key costs no reads, and
// neither do refusals.
func TestVouchedFactsAreNotReadAgain(t *testing.T) {
	f := world.NewFleet(t, 1, &apikey.CacheOptions{MaxStaleness: 200 * time.Millisecond})
	good, _ := f.Enrol(t, world.Live, world.Paid)
	bad, _ := f.Enrol(t, world.Deactivated, world.Paid)
	unpaid, _ := f.Enrol(t, world.Live, world.PastDue)
	r := f.Replicas[0]
	want := map[string]string{good: world.Admitted, bad: world.Invalid, unpaid: world.PlanExpired, "never-issued-by-anybody": world.Invalid}
	for key, code := range want {
		r.WantCode(t, key, code)
	}
	before := r.Cache.Stats().StoreReads
	start := time.Now()
	for time.Since(start) < 1500*time.Millisecond { // well past both limits
		for key, code := range want {
			r.WantCode(t, key, code)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if got := r.Cache.Stats(); got.StoreReads != before || !got.FeedLive {
		t.Errorf("%d more lookups, want none: %+v", got.StoreReads-before, got)
	}
}

// A link is the network between a pool and PostgreSQL, with faults.
type link struct {
	freezeListen atomic.Bool // what the listening connection is sent, is swallowed
	freezePool   atomic.Bool // what all others are sent, is swallowed
	dropNotice   atomic.Bool // the listening connection breaks instead of delivering a change

	mu    sync.Mutex
	conns []*linkConn
}

// heal ends the freezing. What was swallowed is lost, so these connections break.
func (l *link) heal() {
	l.freezeListen.Store(false)
	l.freezePool.Store(false)
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range l.conns {
		if conn.swallowed.Load() {
			_ = conn.Close()
		}
	}
}

func (l *link) install(config *pgxpool.Config) {
	config.ConnConfig.ConnectTimeout = time.Second // of pgx's own accord, an attempt may take two minutes
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.conns = append(l.conns, &linkConn{Conn: conn, link: l})
		return l.conns[len(l.conns)-1], nil
	}
}

type linkConn struct {
	net.Conn
	link      *link
	listens   atomic.Bool
	swallowed atomic.Bool
}

func (c *linkConn) Write(b []byte) (int, error) {
	if strings.Contains(string(b), "LISTEN "+feed.Channel) {
		c.listens.Store(true)
	}
	return c.Conn.Write(b)
}

func (c *linkConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		switch {
		case err != nil:
			return n, err
		case c.listens.Load() && c.link.freezeListen.Load(), !c.listens.Load() && c.link.freezePool.Load():
			c.swallowed.Store(true)
			continue
		case c.listens.Load() && strings.Contains(string(b[:n]), "key ") && c.link.dropNotice.CompareAndSwap(true, false):
			_ = c.Close()
			return 0, io.EOF
		}
		return n, nil
	}
}

// TestBrokenFeeds: however the feed is broken, a revocation takes effect within
// the bound, and all is well again when the fault is over.
func TestBrokenFeeds(t *testing.T) {
	const (
		maxStaleness = 4 * time.Second
		refreshAfter = 6 * time.Second
		staleIfError = 5 * time.Second
		slack        = 1500 * time.Millisecond // for a busy machine
	)
	for name, c := range map[string]struct {
		bound        time.Duration
		break_, heal func(t *testing.T, f *world.Fleet, l *link)
		want         string // of a key that is revoked, from the bound on

		admits    time.Duration // the bound of changes that admit; half of MaxStaleness if 0
		wantAdmit string        // of a key that is activated
	}{
		"backend terminated": {
			bound: maxStaleness, want: world.Invalid,
			break_: func(t *testing.T, f *world.Fleet, _ *link) {
				testservers.Exec(t, f.Pool, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
					WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%apikey_announce%'`)
			},
		},
		"LISTEN path frozen": {
			bound: maxStaleness, want: world.Invalid,
			break_: func(_ *testing.T, _ *world.Fleet, l *link) { l.freezeListen.Store(true) },
			heal:   func(_ *testing.T, _ *world.Fleet, l *link) { l.heal() },
		},
		"pool path frozen": {
			bound: maxStaleness, want: world.Unavailable, wantAdmit: world.Unavailable,
			break_: func(_ *testing.T, _ *world.Fleet, l *link) { l.freezePool.Store(true) },
			heal:   func(_ *testing.T, _ *world.Fleet, l *link) { l.heal() },
		},
		"both paths frozen": {
			bound: staleIfError, want: world.Unavailable, wantAdmit: world.Unavailable,
			break_: func(_ *testing.T, _ *world.Fleet, l *link) { l.freezeListen.Store(true); l.freezePool.Store(true) },
			heal:   func(_ *testing.T, _ *world.Fleet, l *link) { l.heal() },
		},
		"connection dropped between change and notice": {
			bound: maxStaleness, want: world.Invalid,
			break_: func(_ *testing.T, _ *world.Fleet, l *link) { l.dropNotice.Store(true) },
		},
		"triggers disabled": {
			bound: refreshAfter, want: world.Invalid, admits: refreshAfter,
			break_: func(t *testing.T, f *world.Fleet, _ *link) {
				testservers.Exec(t, f.Pool, `ALTER TABLE api_keys DISABLE TRIGGER USER`)
			},
			heal: func(t *testing.T, f *world.Fleet, _ *link) {
				testservers.Exec(t, f.Pool, `ALTER TABLE api_keys ENABLE TRIGGER USER`)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Contains(name, "path") || strings.Contains(name, "between") {
				testservers.Long(t)
			}
			t.Parallel()
			l := new(link)
			f := world.NewFleet(t, 1, &apikey.CacheOptions{
				MaxStaleness: maxStaleness, RefreshAfter: refreshAfter, StaleIfError: staleIfError,
			}, l.install)
			r := f.Replicas[0]
			apiKey, org := f.Enrol(t, world.Live, world.Paid)
			dead, deadOrg := f.Enrol(t, world.Deactivated, world.Paid)
			r.WantCode(t, apiKey, world.Admitted)
			r.WantCode(t, dead, world.Invalid)

			c.break_(t, f, l)
			testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = NOT active WHERE id IN ($1, $2)`, org.KeyID, deadOrg.KeyID)
			start := time.Now()
			within := func(apiKey, want string, bound time.Duration) {
				for answer := r.Ask(apiKey); answer != want; answer = r.Ask(apiKey) {
					if time.Since(start) > bound+slack {
						t.Errorf("answers %q %v after the change, want %q within %v", answer, time.Since(start), want, bound)
						return
					}
					time.Sleep(time.Millisecond)
				}
				t.Logf("answers %q after %v, the bound is %v", want, time.Since(start).Round(time.Millisecond), bound)
			}
			within(dead, c.wantAdmit, cmp.Or(c.admits, maxStaleness/2))
			within(apiKey, c.want, c.bound)
			for range 3 { // and stays so
				if answer := r.Ask(apiKey); answer == world.Admitted {
					t.Fatal("admits again after it has refused")
				}
			}
			if name == "triggers disabled" {
				world.WaitFor(t, func() bool { return r.Cache.Stats().Unannounced == 2 })
			} else if n := r.Cache.Stats().Unannounced; n != 0 {
				t.Errorf("%d unannounced changes, want none", n)
			}

			if c.heal != nil {
				c.heal(t, f, l)
			}
			world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
			testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = true WHERE id = $1`, org.KeyID)
			world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Admitted })
		})
	}
}

// TestPgBouncer: in transaction mode announcements are not delivered. The feed
// notices, and MaxStaleness is the bound.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	const maxStaleness = time.Second
	w := world.NewPostgres(t)
	pool := testservers.Pool(t, testservers.PgBouncer(t, w.Pool.Config().ConnString()))
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
	world.Watch(t, cache, pool)
	r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)

	world.WaitFor(t, func() bool { return cache.Stats().FeedErr != nil })
	if err := cache.Stats().FeedErr; !strings.Contains(err.Error(), "a pooler (such as PgBouncer) is in between") {
		t.Errorf("FeedErr is %v", err)
	}
	r.WantCode(t, apiKey, world.Admitted)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	start := time.Now()
	for r.Ask(apiKey) != world.Invalid {
		if cache.Stats().FeedLive {
			t.Fatal("the feed claims to be live")
		}
		if time.Since(start) > maxStaleness+2*time.Second {
			t.Fatalf("admits %v after the change", time.Since(start))
		}
		time.Sleep(time.Millisecond)
	}
}

// TestExecModes: whatever the mode of the pool is, and whether PgBouncer is in between or
// not, keys are found and can be managed.
func TestExecModes(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	w := world.NewPostgres(t)
	direct := w.Pool.Config().ConnString()
	var apiKeys []string
	for range 40 {
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		apiKeys = append(apiKeys, apiKey)
	}
	for name, url := range map[string]string{"direct": direct, "PgBouncer": testservers.PgBouncer(t, direct)} {
		for _, mode := range []string{"", "cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"} {
			t.Run(name+" "+mode, func(t *testing.T) {
				if mode != "" {
					url += "&default_query_exec_mode=" + mode
				}
				pool := testservers.Pool(t, url)
				keys, plans := apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool)
				for range 5 { // the later ones on connections that have been used
					cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), nil)
					r := world.ReplicaOn(keys, plans, cache)
					var wg sync.WaitGroup
					for _, apiKey := range apiKeys {
						wg.Go(func() { r.WantCode(t, apiKey, world.Admitted) })
					}
					wg.Wait()
				}
				_, org := w.Enrol(t, world.Unknown, world.Paid)
				orgID := org.ID
				for range 3 {
					ours, tiers := admin.NewKeys(pool), admin.NewPlans(pool)
					info, secret, err := ours.Create(t.Context(), orgID, admin.NewKey{Name: "n"})
					if err != nil {
						t.Fatal(err)
					}
					_, _, err = ours.Rotate(t.Context(), orgID, info.ID, time.Now().Add(time.Hour), admin.NewKey{})
					_, _, err2 := ours.List(t.Context(), orgID, admin.Page{})
					_, err3 := ours.Import(t.Context(), orgID, rand.Text(), admin.NewKey{ExpiresAt: time.Now().Add(time.Hour)})
					_, err4 := ours.FindHash(t.Context(), apikey.HashKey(secret.Reveal()))
					err = errors.Join(err, err2, err3, err4, ours.Deactivate(t.Context(), orgID, info.ID), ours.Activate(t.Context(), orgID, info.ID),
						ours.Expire(t.Context(), orgID, info.ID, time.Time{}), ours.Delete(t.Context(), orgID, info.ID),
						tiers.DefineTier(t.Context(), "tier", true), tiers.Subscribe(t.Context(), orgID, "tier", apikey.PlanActive, time.Time{}),
						tiers.SetTier(t.Context(), orgID, world.Starter), tiers.SetStatus(t.Context(), orgID, apikey.PlanPastDue), tiers.SetEnd(t.Context(), orgID, time.Now()))
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
}

// TestIdleSessions: a server that ends idle sessions leaves the listening one alone.
func TestIdleSessions(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	server := testservers.StartPostgres(t, "-c", "idle_session_timeout=200ms")
	pool := testservers.Pool(t, testservers.Migrated(t, server.URL))
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: 5 * time.Second})
	world.Watch(t, cache, pool)
	world.Ready(t, cache)
	for start := time.Now(); time.Since(start) < 2*time.Second; time.Sleep(time.Millisecond) {
		if s := cache.Stats(); !s.FeedLive || s.FeedErr != nil {
			t.Fatalf("after %v the feed is lost: %v", time.Since(start), s.FeedErr)
		}
	}
}

// TestConnectionLimit: the server gives the role fewer connections than the pool may
// have: lookups wait for those that there are.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	role := "few_" + strings.ToLower(rand.Text())
	testservers.Exec(t, w.Pool, `CREATE ROLE `+role+` LOGIN CONNECTION LIMIT 2 PASSWORD 'p'`)
	defer testservers.Exec(t, w.Pool, `DROP ROLE `+role)
	testservers.Exec(t, w.Pool, `GRANT SELECT ON api_keys, org_plans, plan_catalogue TO `+role+`; GRANT EXECUTE ON FUNCTION apikey_announce TO `+role)
	defer testservers.Exec(t, w.Pool, `DROP OWNED BY `+role)
	config := w.Pool.Config()
	config.ConnConfig.User, config.ConnConfig.Password, config.MaxConns = role, "p", 8
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	var apiKeys []string
	for range 400 {
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		apiKeys = append(apiKeys, apiKey)
	}
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxBatchSize: 4, StoreTimeout: 10 * time.Second})
	r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
	var wg sync.WaitGroup
	for _, apiKey := range apiKeys {
		wg.Go(func() { r.WantCode(t, apiKey, world.Admitted) })
	}
	wg.Wait()
	if got := cache.Stats(); got.StoreErrors > 0 || got.StoreBusy > 0 {
		t.Errorf("%+v", got)
	}
}

// TestFarAhead: an announcement of a transaction that is far from being made is looked into at once,
// and more announcements than can be verified end the session.
func TestFarAhead(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	f := world.NewFleet(t, 1, &apikey.CacheOptions{MaxStaleness: 10 * time.Minute})
	testservers.Exec(t, f.Pool, `UPDATE apikey_settings SET announce_every = '1 minute'`)
	time.Sleep(2 * time.Second) // from now on there is a read in 50 s
	stats := f.Replicas[0].Cache.Stats
	before := stats()
	testservers.Exec(t, f.Pool, `SELECT pg_notify($1, 'keys ' || (1::bigint << 40))`, feed.Channel)
	start := time.Now()
	world.WaitFor(t, func() bool { return stats().Forged == before.Forged+1 })
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("it was found to be forged after %v", took)
	}
	if s := stats(); s.FeedErr != nil {
		t.Errorf("the session has ended: %v", s.FeedErr)
	}

	f = world.NewFleet(t, 1, &apikey.CacheOptions{MaxStaleness: 10 * time.Minute})
	stats = f.Replicas[0].Cache.Stats
	testservers.Exec(t, f.Pool, `SELECT count(pg_notify($1, format('key %s 00112233445566%s', pg_current_xact_id()::text::bigint + 1000 + i / 100, lpad(to_hex(i % 100), 2, '0')))) FROM generate_series(1, 100100) i`, feed.Channel)
	world.WaitFor(t, func() bool {
		err := stats().FeedErr
		return err != nil && strings.Contains(err.Error(), "more is announced than can be verified")
	})
	world.WaitFor(t, func() bool { return stats().FeedLive })
}

// TestHalfOpen: the connection that listens is dead, and nothing says so. It is given up, and another
// one takes its place, long before TCP would notice.
func TestHalfOpen(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	w := world.NewPostgres(t)
	address, proxy := testservers.ProxyPostgres(t, w.Pool.Config().ConnString())
	pool := testservers.Pool(t, address)
	r := world.NewWatchedReplica(t, pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: 2 * time.Second})
	proxy.Set(t, testservers.Frozen)
	world.WaitFor(t, func() bool {
		err := r.Cache.Stats().FeedErr
		return err != nil && strings.Contains(err.Error(), "nothing came from the server for")
	})
	proxy.Set(t, testservers.Healthy)
	world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
}

// TestFewConnectionsForMany: replicas whose pools may have more connections than the server gives them
// all. They do not knock at it all the time, lookups are answered, and when the server comes back all
// replicas hear announcements again.
func TestFewConnectionsForMany(t *testing.T) {
	t.Parallel()
	const replicas, allowed = 10, 36
	server := testservers.StartPostgres(t)
	w := world.NewPostgresOn(t, testservers.Pool(t, testservers.Migrated(t, server.URL)))
	testservers.Exec(t, w.Pool, fmt.Sprintf(`CREATE ROLE few LOGIN CONNECTION LIMIT %d; GRANT SELECT ON api_keys, org_plans, plan_catalogue TO few;
		GRANT EXECUTE ON FUNCTION apikey_announce TO few`, allowed))
	var dials atomic.Int64
	var all []world.Replica
	rdb := testservers.Redis(t)
	for range replicas {
		config := w.Pool.Config()
		config.ConnConfig.User, config.MaxConns = "few", 4
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, network, address)
		}
		pool, err := pgxpool.NewWithConfig(t.Context(), config)
		world.MustNot(t, err)
		t.Cleanup(pool.Close)
		cache := apikey.NewCache(rdb, world.NewSecret(), &apikey.CacheOptions{MemoryEntries: -1, StoreTimeout: 5 * time.Second})
		world.Watch(t, cache, pool)
		all = append(all, world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache))
	}
	var apiKeys []string
	for range 100 {
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		apiKeys = append(apiKeys, apiKey)
	}
	var answers, failed atomic.Int64
	var why atomic.Value // the error of the last one that was not answered
	load := func(d time.Duration) {
		var wg sync.WaitGroup
		for start, i := time.Now(), 0; i < 8*replicas; i++ {
			wg.Go(func() {
				for n := i; time.Since(start) < d; n++ {
					_, err := all[i%replicas].AuthenticateHeader(t.Context(), []string{"Bearer " + apiKeys[n%len(apiKeys)]})
					if err != nil {
						failed.Add(1)
						why.Store(err.Error())
						continue
					}
					answers.Add(1)
				}
			})
		}
		wg.Wait()
	}
	load(2 * time.Second) // all pools are as large as they may be
	live := func() (n int) {
		for _, r := range all {
			if r.Cache.Stats().FeedLive {
				n++
			}
		}
		return n
	}
	world.WaitFor(t, func() bool { return live() == replicas })
	for _, again := range []bool{false, true} {
		if again {
			server.Crash(t)
			server.Start(t)
			load(time.Second) // pools take what there is
			world.WaitFor(t, func() bool { return live() == replicas })
		}
		before := dials.Load()
		answers.Store(0)
		failed.Store(0)
		const d = 3 * time.Second
		load(d)
		t.Logf("%d answers, %d refused, %d connections tried", answers.Load(), failed.Load(), dials.Load()-before)
		if n := dials.Load() - before; n > 10*replicas*int64(d/time.Second) || failed.Load() > 0 {
			t.Errorf("%d connections were tried in %v, and %d of %d lookups not answered: %v", n, d, failed.Load(), answers.Load(), why.Load())
		}
	}
}

// TestRecordsFromRedisAreJudged: a record that comes out of Redis, put there late
// or put back, is out of date for whoever has heard of the change.
func TestRecordsFromRedisAreJudged(t *testing.T) {
	t.Parallel()
	f := world.NewFleet(t, 2, &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, org := f.Enrol(t, world.Live, world.Paid)
	f.Replicas[0].WantCode(t, apiKey, world.Admitted)
	name, _ := world.FillRedis(t, f, f.Redis, f.Secret, apiKey, org.ID)
	stale, err := f.Redis.Get(t.Context(), name).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	for i, r := range f.Replicas { // the second one has never read it
		world.WaitFor(t, func() bool { return r.Cache.Stats().Announcements > 0 && r.Ask(apiKey) == world.Invalid })
		if err := f.Redis.Set(t.Context(), name, stale, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
		if i == 1 && r.Cache.Stats().RedisRejected != 0 {
			t.Error("the record was rejected as forged, and not as out of date")
		}
	}
}

func TestWatchFaults(t *testing.T) {
	t.Parallel()
	f := world.NewFleet(t, 1, nil)
	cache := f.Replicas[0].Cache
	if err := cache.Watch(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "pool is nil") {
		t.Errorf("Watch without a pool: %v", err)
	}
	if err := cache.Watch(t.Context(), f.Pool); err == nil || !strings.Contains(err.Error(), "watched already") {
		t.Errorf("a second Watch: %v", err)
	}

	// A server that is not there is no reason to give up.
	away, err := pgxpool.New(t.Context(), "postgres://u@127.0.0.1:1/db")
	if err != nil {
		t.Fatal(err)
	}
	defer away.Close()
	other := apikey.NewCache(f.Redis, world.NewSecret(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- other.Watch(ctx, away) }()
	world.WaitFor(t, func() bool { return other.Stats().FeedErr != nil })
	hurry, giveUp := context.WithTimeout(t.Context(), time.Millisecond)
	defer giveUp()
	if err := other.Ready(hurry); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connecting") {
		t.Errorf("Ready = %v, want the deadline and the fault", err)
	}
	if got := other.Stats(); got.FeedLive || !strings.Contains(got.FeedErr.Error(), "connecting") {
		t.Errorf("%+v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch = %v after its context ended, want nil", err)
	}
	// And it may be watched again.
	ctx, cancel = context.WithCancel(t.Context())
	go func() { done <- other.Watch(ctx, f.Pool) }()
	world.Ready(t, other)
	if !other.Stats().FeedLive {
		t.Error("the feed is not live although the cache is ready")
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch = %v", err)
	}
	if other.Stats().FeedLive {
		t.Error("the feed is live after Watch has returned")
	}
}

// TestUnknownAnnouncement: what a newer version of the triggers announces, or
// somebody makes up, cannot be understood, so nothing is trusted any longer.
func TestUnknownAnnouncement(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	f := world.NewFleet(t, 1, nil)
	stats := f.Replicas[0].Cache.Stats
	// Without a transaction the session is at its end.
	for _, payload := range []string{"", "nonsense", "key", "key x 0011223344556677", "key 0 0011223344556677"} {
		testservers.Exec(t, f.Pool, `SELECT pg_notify($1, $2)`, feed.Channel, payload)
		world.WaitFor(t, func() bool {
			err := stats().FeedErr
			return err != nil && strings.HasSuffix(err.Error(), fmt.Sprintf("an announcement without a transaction: %q", payload))
		})
		world.WaitFor(t, func() bool { return stats().FeedLive })
	}
	// Of what is not known the session does not end, and changes take effect as soon as ever.
	ended := stats().FeedErr
	for n, payload := range []string{"group 7 staff", "key 7 xyz", "plan 7 my organisation", "beat 7"} {
		testservers.Exec(t, f.Pool, `SELECT pg_notify($1, $2)`, feed.Channel, payload)
		world.WaitFor(t, func() bool { return stats().Unknown == uint64(n+1) })
		apiKey, org := f.Enrol(t, world.Live, world.Paid)
		f.Replicas[0].WantCode(t, apiKey, world.Admitted)
		testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
		world.WaitFor(t, func() bool { return f.Replicas[0].Ask(apiKey) == world.Invalid })
	}
	for _, payload := range []string{"all 7 staff", "?group 7 staff"} { // of later versions
		testservers.Exec(t, f.Pool, `SELECT pg_notify($1, $2)`, feed.Channel, payload)
	}
	if got := stats(); !errors.Is(got.FeedErr, ended) || !got.FeedLive || got.Unknown != 4 {
		t.Errorf("%+v, want the session as it was", got)
	}
	// Anybody's beat is as good as ours.
	before := f.Replicas[0].Cache.Stats()
	testservers.Exec(t, f.Pool, `SELECT pg_notify($1, '?beat ' || pg_current_xact_id()::text)`, feed.Channel)
	apiKey, _ := f.Enrol(t, world.Live, world.Paid)
	f.Replicas[0].WantCode(t, apiKey, world.Admitted)
	if got := f.Replicas[0].Cache.Stats(); !errors.Is(got.FeedErr, before.FeedErr) || !got.FeedLive {
		t.Errorf("after a beat: %+v", got)
	}
}

// TestOthersHooks: what a service does with notifications on its own connections, or
// with its own statements, does not end the process or reach the feed.
func TestOthersHooks(t *testing.T) {
	t.Parallel()
	notified := make(chan *pgconn.Notification, 100)
	f := world.NewFleet(t, 1, nil, func(c *pgxpool.Config) {
		c.ConnConfig.OnNotification = func(_ *pgconn.PgConn, n *pgconn.Notification) { notified <- n }
		c.ConnConfig.AfterConnect = func(context.Context, *pgconn.PgConn) error { return nil }
	})
	apiKey, org := f.Enrol(t, world.Live, world.Paid)
	f.Replicas[0].WantCode(t, apiKey, world.Admitted)
	testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return f.Replicas[0].Ask(apiKey) == world.Invalid })
	if len(notified) > 0 {
		t.Error("the service's handler was given what the feed listens to")
	}
}

// TestBusyPool: the application keeps every connection of the pool, PostgreSQL is well:
// changes are announced all the same.
func TestBusyPool(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	f := world.NewFleet(t, 1, &apikey.CacheOptions{MaxStaleness: shortStaleness}, func(c *pgxpool.Config) { c.MaxConns = 2 })
	apiKey, org := f.Enrol(t, world.Live, world.Paid)
	other, _ := f.Enrol(t, world.Live, world.Paid)
	r := f.Replicas[0]
	r.WantCode(t, apiKey, world.Admitted)
	r.WantCode(t, other, world.Admitted)
	for range 2 {
		conn, err := f.Pools[0].Acquire(t.Context())
		world.MustNot(t, err)
		defer conn.Release()
	}
	for start := time.Now(); time.Since(start) < 3*shortStaleness; time.Sleep(10 * time.Millisecond) {
		r.WantCode(t, other, world.Admitted)
		if !r.Cache.Stats().FeedLive {
			t.Fatalf("the feed is not live: %v", r.Cache.Stats().FeedErr)
		}
	}
	testservers.Exec(t, f.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Unavailable }) // overtaken, and cannot be read
	if got := r.Cache.Stats(); got.StaleUses != 0 || !got.FeedLive {
		t.Errorf("%+v", got)
	}
}

// TestSlowNetwork: the feed is live although notices take a good part of MaxStaleness.
func TestSlowNetwork(t *testing.T) {
	testservers.Long(t)
	for _, delay := range []time.Duration{350 * time.Millisecond, 700 * time.Millisecond} {
		t.Run(delay.String(), func(t *testing.T) {
			t.Parallel()
			w := world.NewPostgres(t)
			address, proxy := testservers.ProxyPostgres(t, w.Pool.Config().ConnString())
			proxy.Delay(delay)
			cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: shortStaleness})
			pool := testservers.Pool(t, address+"0") // 10 s to connect
			world.Watch(t, cache, pool)
			world.Ready(t, cache)
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
