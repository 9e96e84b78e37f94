package apikey_test

// Changes that take effect: the rule, the feed, and what holds when it is broken.

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
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
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
)

func parseSnapshot(t testing.TB, text string) snapshot.Snapshot {
	t.Helper()
	if text == "" {
		return snapshot.Snapshot{}
	}
	s, err := snapshot.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// keyTopic is the subject of a key in announcements.
func keyTopic(h apikey.KeyHash) feed.Topic { return feed.KeyTopic(binary.BigEndian.Uint64(h[:])) }

// serverOf returns the server of a pool, as stamps name it.
func serverOf(t testing.TB, pool *pgxpool.Pool) (server snapshot.Server) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), `SELECT `+feed.ServerSQL).Scan(&server); err != nil {
		t.Fatal(err)
	}
	return server
}

// instant is now, as the cache counts it.
func instant() clock.Instant { return clock.At(time.Now()) }

// TestRule: when a record may decide a request. The feed's session began when
// transaction 50 had ended, and a second ago all changes were known.
func TestRule(t *testing.T) {
	const (
		refusalLimit = time.Second
		maxStaleness = 10 * time.Second
		refreshAfter = 5 * time.Minute
	)
	now := time.Now()
	h := apikey.HashKey("k")
	topic := keyTopic(h)
	ago := func(d time.Duration) clock.Instant { return clock.At(now.Add(-d)) }
	begin := func(l *feed.Log) { l.Begin("history", parseSnapshot(t, "51:51:"), ago(100*time.Second)) }
	renew := func(d time.Duration) func(*feed.Log) { return func(l *feed.Log) { l.Renew(ago(d)) } }
	live := func(l *feed.Log) { begin(l); l.Renew(ago(time.Second)) }
	then := func(steps ...func(*feed.Log)) func(*feed.Log) {
		return func(l *feed.Log) {
			for _, step := range steps {
				step(l)
			}
		}
	}
	announce := func(xid uint64) func(*feed.Log) { return func(l *feed.Log) { l.Announce(topic, xid, instant()) } }
	announceAll := func(xid uint64) func(*feed.Log) { return func(l *feed.Log) { l.AnnounceAll(feed.Key, xid, instant()) } }
	end := func(l *feed.Log) { l.End(errStore) }
	nothing := func(*feed.Log) {}

	type limits struct{ admits, refuses time.Duration } // the record is usable below this age
	never := limits{}
	byAge := limits{maxStaleness, refusalLimit}
	vouched := limits{refreshAfter, refreshAfter}
	for name, c := range map[string]struct {
		feed func(*feed.Log)
		snap string
		want limits
	}{
		"no feed":                           {nothing, "60:60:", byAge},
		"no feed, no stamp":                 {nothing, "", byAge},
		"no feed, announced, seen":          {announce(55), "60:60:", byAge},
		"no feed, announced, not seen":      {announce(60), "60:60:", never},
		"live":                              {live, "60:60:", vouched},
		"live, no stamp":                    {live, "", byAge},
		"live, no stamp, announced":         {then(live, announce(55)), "", byAge},
		"nothing heard yet":                 {begin, "60:60:", byAge},
		"live, one not seen from before":    {live, "40:60:50", byAge},
		"live, read before the session":     {live, "50:50:", byAge},
		"live, read as it began":            {live, "51:51:", vouched},
		"announced, seen":                   {then(live, announce(59)), "60:60:", vouched},
		"announced, in progress at read":    {then(live, announce(57)), "55:60:57", never},
		"announced, later at read":          {then(live, announce(60)), "55:60:57", never},
		"announced, ended at read":          {then(live, announce(58)), "55:60:57", vouched},
		"two, the later one seen only":      {then(live, announce(58), announce(57)), "55:60:57", never},
		"two, the earlier one seen only":    {then(live, announce(57), announce(58)), "55:59:57", never},
		"a larger one before":               {then(live, announce(70), announce(58)), "55:60:57", never},
		"another subject":                   {then(live, func(l *feed.Log) { l.Announce(feed.KeyTopic(0), 70, instant()) }), "60:60:", vouched},
		"a plan":                            {then(live, func(l *feed.Log) { l.Announce(feed.PlanTopic("org_1"), 70, instant()) }), "60:60:", vouched},
		"a tier":                            {then(live, func(l *feed.Log) { l.Announce(feed.TierTopic(""), 70, instant()) }), "60:60:", vouched},
		"all plans":                         {then(live, func(l *feed.Log) { l.AnnounceAll(feed.Plan, 70, instant()) }), "60:60:", vouched},
		"everything, seen":                  {then(live, announceAll(59)), "60:60:", vouched},
		"everything, not seen":              {then(live, announceAll(60)), "60:60:", never},
		"session ended":                     {then(live, end), "60:60:", vouched}, // until the lease runs out
		"session ended long ago":            {then(begin, renew(11*time.Second), end), "60:60:", byAge},
		"session ended, announced before":   {then(live, announce(60), end), "60:60:", never},
		"new session, seen by the old only": {then(begin, renew(11*time.Second), end, func(l *feed.Log) { l.Begin("history", parseSnapshot(t, "70:70:"), ago(0)) }, renew(0)), "60:60:", byAge},
		"another server":                    {func(l *feed.Log) { l.Begin("history", parseSnapshot(t, "51:51:").On(7), ago(0)); l.Renew(ago(0)) }, "60:60:", byAge},
		"another history, announced":        {then(func(l *feed.Log) { l.Begin("other", parseSnapshot(t, "51:51:").On(7), ago(0)) }, renew(0), announce(70)), "60:60:", byAge},
		"lease run out":                     {then(begin, renew(10*time.Second)), "60:60:", byAge},
		"lease about to run out":            {then(begin, renew(10*time.Second-1)), "60:60:", limits{refreshAfter, refusalLimit}},
		"half of the lease gone":            {then(begin, renew(5*time.Second)), "60:60:", limits{refreshAfter, refusalLimit}},
		"almost half of the lease gone":     {then(begin, renew(5*time.Second-1)), "60:60:", vouched},
	} {
		t.Run(name, func(t *testing.T) {
			rdb := new(fakeRedis).client()
			defer rdb.Close()
			cache := apikey.NewCache(rdb, newSecret(), nil)
			c.feed(cache.Log())
			snap := parseSnapshot(t, c.snap)
			good := apikey.Key{ID: "key_1", OrgID: "org_1", Active: true}
			for what, record := range map[string]struct {
				key   apikey.Key
				found bool
				limit time.Duration
			}{
				"live":        {good, true, c.want.admits},
				"deactivated": {apikey.Key{OrgID: "org_1"}, true, c.want.refuses},
				"expired":     {apikey.Key{OrgID: "org_1", Active: true, ExpiresAt: now}, true, c.want.refuses},
				"absent":      {apikey.Key{}, false, c.want.refuses},
			} {
				for _, age := range []time.Duration{
					0, 1, refusalLimit - 1, refusalLimit, maxStaleness - 1, maxStaleness, 100 * time.Second, refreshAfter - 1, refreshAfter, time.Hour,
				} {
					want := age < record.limit
					if got := cache.KeyUsable(h, record.key, record.found, snap, now.Add(-age), now); got != want {
						t.Errorf("%s, %v old: usable %v, want %v", what, age, got, want)
					}
				}
			}
		})
	}
}

// TestJoinedFlight: a request that joins a lookup begun before a change was
// announced is answered by what came after.
func TestJoinedFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		cache := apikey.NewCache(rdb, newSecret(), nil)
		h := apikey.HashKey("k")
		release, lookups := make(chan struct{}), 0
		keys := cache.KeysBehind(apikey.KeyStoreFunc(func(ctx context.Context, _ apikey.KeyHash) (apikey.Key, error) {
			lookups++
			if lookups > 1 {
				snapshot.Report(ctx, "20:20:", 0)
				return apikey.Key{ID: "new", OrgID: "org_1"}, nil
			}
			snapshot.Report(ctx, "10:10:", 0)
			<-release
			return apikey.Key{ID: "old", OrgID: "org_1", Active: true}, nil
		}))
		ask := func(answer chan<- string) {
			key, err := keys.Key(t.Context(), h)
			answer <- fmt.Sprint(key.ID, err)
		}
		before, after := make(chan string, 1), make(chan string, 100)
		go ask(before)
		synctest.Wait()
		time.Sleep(time.Millisecond)
		cache.Log().Announce(keyTopic(h), 15, instant())
		for range cap(after) {
			go ask(after)
		}
		synctest.Wait()
		close(release)
		if got := <-before; got != "old<nil>" { // it asked before the change
			t.Errorf("who began the lookup got %q", got)
		}
		for range cap(after) {
			if got := <-after; got != "new<nil>" {
				t.Errorf("who joined it after the change got %q", got)
			}
		}
		if lookups != 2 {
			t.Errorf("%d lookups, want 2", lookups)
		}
	})
}

// A fleet is some replicas of a service that watch one database.
type fleet struct {
	*postgresWorld
	rdb      *redis.Client
	secret   []byte
	replicas []replica
	pools    []*pgxpool.Pool // theirs
}

// newFleet starts n replicas and waits until their feeds are live.
func newFleet(t testing.TB, n int, opts *apikey.CacheOptions, configure ...func(*pgxpool.Config)) *fleet {
	t.Helper()
	f := &fleet{postgresWorld: newPostgresWorld(t), rdb: testservers.Redis(t), secret: newSecret()}
	for range n {
		config := f.pool.Config()
		for _, c := range configure {
			c(config)
		}
		pool, err := pgxpool.NewWithConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		f.pools = append(f.pools, pool)
		f.replicas = append(f.replicas, watchedReplica(t, pool, f.rdb, f.secret, opts))
	}
	return f
}

// watchedReplica is a replica on a pool of its own that follows changes, and is
// known to.
func watchedReplica(t testing.TB, pool *pgxpool.Pool, rdb redis.UniversalClient, secret []byte, opts *apikey.CacheOptions) replica {
	t.Helper()
	cache := apikey.NewCache(rdb, secret, opts)
	watch(t, cache, pool)
	waitFor(t, func() bool { return cache.Stats().FeedLive })
	return replica{apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache}), cache}
}

// watch watches until the test ends.
func watch(t testing.TB, cache *apikey.Cache, pool *pgxpool.Pool) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- cache.Watch(ctx, pool) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
}

// TestChangesTakeEffect: every kind of change, by plain SQL, on three replicas.
// It reports how long the change took from the return of the statement to the
// first answer that follows from it, on each.
func TestChangesTakeEffect(t *testing.T) {
	t.Parallel()
	// Without the feed a revocation would take a minute, and an admission a second.
	f := newFleet(t, 3, &apikey.CacheOptions{MaxStaleness: time.Minute})
	rounds := sized(10, 50)
	type change struct {
		name string
		sql  string // $1 is the organisation
		want string // the answer from then on
	}
	changes := []change{
		{"revoke", `UPDATE api_keys SET active = false WHERE org_id = $1`, invalid},
		{"activate", `UPDATE api_keys SET active = true WHERE org_id = $1`, admitted},
		{"expire the key", `UPDATE api_keys SET expires_at = now() WHERE org_id = $1`, invalid},
		{"prolong the key", `UPDATE api_keys SET expires_at = NULL WHERE org_id = $1`, admitted},
		{"expire the plan", `UPDATE org_plans SET status = 'expired' WHERE org_id = $1`, planExpired},
		{"renew", `UPDATE org_plans SET status = 'active', ends_at = now() + '1 month' WHERE org_id = $1`, admitted},
		{"end", `UPDATE org_plans SET ends_at = now() WHERE org_id = $1`, planExpired},
		{"upgrade", `UPDATE org_plans SET ends_at = NULL WHERE org_id = $1`, admitted},
		{"downgrade", `UPDATE org_plans SET plan = 'basic' WHERE org_id = $1`, planExpired},
		{"the tier gets the API", `UPDATE plan_catalogue SET api_access = true WHERE name = 'basic' AND $1 <> ''`, admitted},
		{"the tier loses the API", `UPDATE plan_catalogue SET api_access = false WHERE name = 'basic' AND $1 <> ''`, planExpired},
		{"unsubscribe", `DELETE FROM org_plans WHERE org_id = $1`, planExpired},
		{"subscribe", `INSERT INTO org_plans (org_id, plan, status) VALUES ($1, 'starter', 'active')`, admitted},
		{"delete the key", `DELETE FROM api_keys WHERE org_id = $1`, invalid},
	}
	var took []time.Duration
	for range rounds {
		apiKey, org := f.enrol(t, unknown, paid)
		h := apikey.HashKey(apiKey)
		testservers.Exec(t, f.pool, `UPDATE plan_catalogue SET api_access = false WHERE name = 'basic'`)
		for _, r := range f.replicas {
			r.wantCode(t, apiKey, invalid) // asked for a moment before it is created
		}
		create := change{"create", fmt.Sprintf(`INSERT INTO api_keys (org_id, key_hash) VALUES ($1, '\x%x')`, h[:]), admitted}
		for _, c := range append([]change{create}, changes...) {
			testservers.Exec(t, f.pool, c.sql, org.ID)
			start := time.Now()
			var wg sync.WaitGroup
			effect := make([]time.Duration, len(f.replicas))
			for i, r := range f.replicas {
				wg.Go(func() {
					for r.ask(apiKey) != c.want {
						if time.Since(start) > 20*time.Second {
							t.Errorf("%s: replica %d answers %q after 20 s, want %q", c.name, i, r.ask(apiKey), c.want)
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
		rounds*(len(changes)+1), len(f.replicas), at(0.5), at(0.99), at(1))
	if at(0.99) > 500*time.Millisecond {
		t.Errorf("p99 is %v: that is not the feed", at(0.99))
	}
	for i, r := range f.replicas {
		if got := r.cache.Stats(); got.Unannounced != 0 || got.StoreErrors != 0 {
			t.Errorf("replica %d: %+v", i, got)
		}
	}
}

// TestVouchedFactsAreNotReadAgain: under a live feed a key costs no reads, and
// neither do refusals.
func TestVouchedFactsAreNotReadAgain(t *testing.T) {
	f := newFleet(t, 1, &apikey.CacheOptions{MaxStaleness: 200 * time.Millisecond})
	good, _ := f.enrol(t, live, paid)
	bad, _ := f.enrol(t, deactivated, paid)
	unpaid, _ := f.enrol(t, live, pastDue)
	r := f.replicas[0]
	want := map[string]string{good: admitted, bad: invalid, unpaid: planExpired, "never-issued-by-anybody": invalid}
	for key, code := range want {
		r.wantCode(t, key, code)
	}
	before := r.cache.Stats().StoreReads
	start := time.Now()
	for time.Since(start) < 1500*time.Millisecond { // well past both limits
		for key, code := range want {
			r.wantCode(t, key, code)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if got := r.cache.Stats(); got.StoreReads != before || !got.FeedLive {
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
		break_, heal func(t *testing.T, f *fleet, l *link)
		want         string // of a key that is revoked, from the bound on

		admits    time.Duration // the bound of changes that admit; half of MaxStaleness if 0
		wantAdmit string        // of a key that is activated
	}{
		"backend terminated": {
			bound: maxStaleness, want: invalid,
			break_: func(t *testing.T, f *fleet, _ *link) {
				testservers.Exec(t, f.pool, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
					WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%apikey_announce%'`)
			},
		},
		"LISTEN path frozen": {
			bound: maxStaleness, want: invalid,
			break_: func(_ *testing.T, _ *fleet, l *link) { l.freezeListen.Store(true) },
			heal:   func(_ *testing.T, _ *fleet, l *link) { l.heal() },
		},
		"pool path frozen": {
			bound: maxStaleness, want: unavailable, wantAdmit: unavailable,
			break_: func(_ *testing.T, _ *fleet, l *link) { l.freezePool.Store(true) },
			heal:   func(_ *testing.T, _ *fleet, l *link) { l.heal() },
		},
		"both paths frozen": {
			bound: staleIfError, want: unavailable, wantAdmit: unavailable,
			break_: func(_ *testing.T, _ *fleet, l *link) { l.freezeListen.Store(true); l.freezePool.Store(true) },
			heal:   func(_ *testing.T, _ *fleet, l *link) { l.heal() },
		},
		"connection dropped between change and notice": {
			bound: maxStaleness, want: invalid,
			break_: func(_ *testing.T, _ *fleet, l *link) { l.dropNotice.Store(true) },
		},
		"triggers disabled": {
			bound: refreshAfter, want: invalid, admits: refreshAfter,
			break_: func(t *testing.T, f *fleet, _ *link) {
				testservers.Exec(t, f.pool, `ALTER TABLE api_keys DISABLE TRIGGER USER`)
			},
			heal: func(t *testing.T, f *fleet, _ *link) {
				testservers.Exec(t, f.pool, `ALTER TABLE api_keys ENABLE TRIGGER USER`)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := new(link)
			f := newFleet(t, 1, &apikey.CacheOptions{
				MaxStaleness: maxStaleness, RefreshAfter: refreshAfter, StaleIfError: staleIfError,
			}, l.install)
			r := f.replicas[0]
			apiKey, org := f.enrol(t, live, paid)
			dead, deadOrg := f.enrol(t, deactivated, paid)
			r.wantCode(t, apiKey, admitted)
			r.wantCode(t, dead, invalid)

			c.break_(t, f, l)
			testservers.Exec(t, f.pool, `UPDATE api_keys SET active = NOT active WHERE id IN ($1, $2)`, org.KeyID, deadOrg.KeyID)
			start := time.Now()
			within := func(apiKey, want string, bound time.Duration) {
				for answer := r.ask(apiKey); answer != want; answer = r.ask(apiKey) {
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
				if answer := r.ask(apiKey); answer == admitted {
					t.Fatal("admits again after it has refused")
				}
			}
			if name == "triggers disabled" {
				waitFor(t, func() bool { return r.cache.Stats().Unannounced == 2 })
			} else if n := r.cache.Stats().Unannounced; n != 0 {
				t.Errorf("%d unannounced changes, want none", n)
			}

			if c.heal != nil {
				c.heal(t, f, l)
			}
			waitFor(t, func() bool { return r.cache.Stats().FeedLive })
			testservers.Exec(t, f.pool, `UPDATE api_keys SET active = true WHERE id = $1`, org.KeyID)
			waitFor(t, func() bool { return r.ask(apiKey) == admitted })
		})
	}
}

// TestPgBouncer: in transaction mode announcements are not delivered. The feed
// notices, and MaxStaleness is the bound.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	const maxStaleness = time.Second
	w := newPostgresWorld(t)
	pool := testservers.Pool(t, testservers.PgBouncer(t, w.pool.Config().ConnString()))
	cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
	watch(t, cache, pool)
	r := replica{apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache}), cache}
	apiKey, org := w.enrol(t, live, paid)

	waitFor(t, func() bool { return cache.Stats().FeedErr != nil })
	if err := cache.Stats().FeedErr; !strings.Contains(err.Error(), "a pooler (such as PgBouncer) is in between") {
		t.Errorf("FeedErr is %v", err)
	}
	r.wantCode(t, apiKey, admitted)
	testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	start := time.Now()
	for r.ask(apiKey) != invalid {
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
// not, keys are found, and looked after.
func TestExecModes(t *testing.T) {
	t.Parallel()
	w := newPostgresWorld(t)
	direct := w.pool.Config().ConnString()
	var apiKeys []string
	for range 40 {
		apiKey, _ := w.enrol(t, live, paid)
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
					cache := apikey.NewCache(testservers.Redis(t), newSecret(), nil)
					r := replica{apikey.New(keys, plans, &apikey.Options{Cache: cache}), cache}
					var wg sync.WaitGroup
					for _, apiKey := range apiKeys {
						wg.Go(func() { r.wantCode(t, apiKey, admitted) })
					}
					wg.Wait()
				}
				_, org := w.enrol(t, unknown, paid)
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
					_, _, err4 := ours.FindHash(t.Context(), apikey.HashKey(secret.Reveal()))
					err = errors.Join(err, err2, err3, err4, ours.Deactivate(t.Context(), orgID, info.ID), ours.Activate(t.Context(), orgID, info.ID),
						ours.Expire(t.Context(), orgID, info.ID, time.Time{}), ours.Delete(t.Context(), orgID, info.ID),
						tiers.DefineTier(t.Context(), "tier", true), tiers.Subscribe(t.Context(), orgID, "tier", apikey.PlanActive, time.Time{}),
						tiers.SetTier(t.Context(), orgID, starter), tiers.SetStatus(t.Context(), orgID, apikey.PlanPastDue), tiers.SetEnd(t.Context(), orgID, time.Now()))
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
	t.Parallel()
	server := testservers.StartPostgres(t, "-c", "idle_session_timeout=200ms")
	pool := testservers.Pool(t, testservers.Migrated(t, server.URL))
	cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: 5 * time.Second})
	watch(t, cache, pool)
	waitFor(t, func() bool { return cache.Stats().FeedLive })
	for start := time.Now(); time.Since(start) < 2*time.Second; time.Sleep(time.Millisecond) {
		if s := cache.Stats(); !s.FeedLive || s.FeedErr != nil {
			t.Fatalf("after %v the feed is lost: %v", time.Since(start), s.FeedErr)
		}
	}
}

// TestConnectionLimit: the server gives the role fewer connections than the pool may
// have: lookups wait for those that there are.
func TestConnectionLimit(t *testing.T) {
	w := newPostgresWorld(t)
	role := "few_" + strings.ToLower(rand.Text())
	testservers.Exec(t, w.pool, `CREATE ROLE `+role+` LOGIN CONNECTION LIMIT 2 PASSWORD 'p'`)
	defer testservers.Exec(t, w.pool, `DROP ROLE `+role)
	testservers.Exec(t, w.pool, `GRANT SELECT ON api_keys, org_plans, plan_catalogue TO `+role)
	defer testservers.Exec(t, w.pool, `DROP OWNED BY `+role)
	config := w.pool.Config()
	config.ConnConfig.User, config.ConnConfig.Password, config.MaxConns = role, "p", 8
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	var apiKeys []string
	for range 400 {
		apiKey, _ := w.enrol(t, live, paid)
		apiKeys = append(apiKeys, apiKey)
	}
	cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxBatchSize: 4, StoreTimeout: 10 * time.Second})
	r := replica{apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache}), cache}
	var wg sync.WaitGroup
	for _, apiKey := range apiKeys {
		wg.Go(func() { r.wantCode(t, apiKey, admitted) })
	}
	wg.Wait()
	if got := cache.Stats(); got.StoreErrors > 0 || got.StoreBusy > 0 {
		t.Errorf("%+v", got)
	}
}

// TestRecordsFromRedisAreJudged: a record that comes out of Redis, put there late
// or put back, is out of date for whoever has heard of the change.
func TestRecordsFromRedisAreJudged(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, org := f.enrol(t, live, paid)
	f.replicas[0].wantCode(t, apiKey, admitted)
	name, _ := fillRedis(t, f, f.rdb, f.secret, apiKey, org.ID)
	stale, err := f.rdb.Get(t.Context(), name).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	testservers.Exec(t, f.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	for i, r := range f.replicas { // the second one has never read it
		waitFor(t, func() bool { return r.cache.Stats().Announcements > 0 && r.ask(apiKey) == invalid })
		if err := f.rdb.Set(t.Context(), name, stale, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
		if i == 1 && r.cache.Stats().RedisRejected != 0 {
			t.Error("the record was rejected as forged, and not as out of date")
		}
	}
}

func TestWatchFaults(t *testing.T) {
	f := newFleet(t, 1, nil)
	cache := f.replicas[0].cache
	if err := cache.Watch(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "pool is nil") {
		t.Errorf("Watch without a pool: %v", err)
	}
	if err := cache.Watch(t.Context(), f.pool); err == nil || !strings.Contains(err.Error(), "watched already") {
		t.Errorf("a second Watch: %v", err)
	}

	// A server that is not there is no reason to give up.
	away, err := pgxpool.New(t.Context(), "postgres://u@127.0.0.1:1/db")
	if err != nil {
		t.Fatal(err)
	}
	defer away.Close()
	other := apikey.NewCache(f.rdb, newSecret(), nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- other.Watch(ctx, away) }()
	waitFor(t, func() bool { return other.Stats().FeedErr != nil })
	if got := other.Stats(); got.FeedLive || !strings.Contains(got.FeedErr.Error(), "connecting") {
		t.Errorf("%+v", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch = %v after its context ended, want nil", err)
	}
	// And it may be watched again.
	ctx, cancel = context.WithCancel(t.Context())
	go func() { done <- other.Watch(ctx, f.pool) }()
	waitFor(t, func() bool { return other.Stats().FeedLive })
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
	t.Parallel()
	f := newFleet(t, 1, nil)
	for _, payload := range []string{"", "nonsense", "key", "key x 0011223344556677", "key 0 0011223344556677", "group 7 staff", "all 7 staff", "beat 7 AAAA", "key 7 xyz"} {
		testservers.Exec(t, f.pool, `SELECT pg_notify($1, $2)`, feed.Channel, payload)
		waitFor(t, func() bool {
			err := f.replicas[0].cache.Stats().FeedErr
			return err != nil && strings.HasSuffix(err.Error(), fmt.Sprintf("of unknown form: %q", payload))
		})
		waitFor(t, func() bool { return f.replicas[0].cache.Stats().FeedLive })
	}
	// Anybody's beat is as good as ours.
	before := f.replicas[0].cache.Stats()
	testservers.Exec(t, f.pool, `SELECT pg_notify($1, 'beat ' || pg_current_xact_id()::text)`, feed.Channel)
	apiKey, _ := f.enrol(t, live, paid)
	f.replicas[0].wantCode(t, apiKey, admitted)
	if got := f.replicas[0].cache.Stats(); !errors.Is(got.FeedErr, before.FeedErr) || !got.FeedLive {
		t.Errorf("after a beat: %+v", got)
	}
}
