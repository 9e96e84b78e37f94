package apikey_test

// Lookups: how many round trips they take, whom they are made for, and that too many
// of them are not an outage.

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
)

// newPostgresReplica is a replica straight on the stores of a world.
func newPostgresReplica(w *postgresWorld, rdb redis.UniversalClient, secret []byte, opts *apikey.CacheOptions) replica {
	cache := apikey.NewCache(rdb, secret, opts)
	return replica{apikey.New(w.PostgresKeyStore, w.PostgresPlanStore, &apikey.Options{Cache: cache}), cache}
}

// TestOneRoundTrip: a cold key and its plan take one GET and one statement, and for
// the next replica one GET.
func TestOneRoundTrip(t *testing.T) {
	w, rdb, secret := newPostgresWorld(t), testservers.Redis(t), newSecret()
	apiKey, org := w.enrol(t, live, paid)
	first := newPostgresReplica(w, rdb, secret, nil)
	for range 3 {
		first.wantCode(t, apiKey, admitted)
	}
	if got := first.cache.Stats(); got.RedisGets != 1 || got.StoreReads != 1 || got.StoreBatches != 1 {
		t.Errorf("a cold key took %+v, want 1 GET and 1 statement", got)
	}
	name, _ := first.cache.RedisNames(apikey.HashKey(apiKey), org.ID)
	waitFor(t, func() bool {
		newPostgresReplica(w, rdb, secret, &apikey.CacheOptions{MemoryEntries: -1}).ask(apiKey)
		return rdb.Exists(t.Context(), name).Val() == 1
	})
	for _, entries := range []int{0, -1} {
		waitFor(t, func() bool { // a GET may fail, when the machine is busy for longer than its budget
			second := newPostgresReplica(w, rdb, secret, &apikey.CacheOptions{MemoryEntries: entries})
			before := second.meetStore(t, w)
			second.wantCode(t, apiKey, admitted)
			before.RedisHits, before.RedisGets, before.RedisBatches = before.RedisHits+1, before.RedisGets+1, before.RedisBatches+1
			return second.cache.Stats() == before
		})
	}
}

// TestPlanChangesAlone: when a plan has changed, the record that came with the key is
// overtaken and the key's is not, in memory and in Redis, for all keys of the
// organisation.
func TestPlanChangesAlone(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, org := f.enrol(t, live, paid)
	h := apikey.HashKey("another-key-of-the-organisation")
	testservers.Exec(t, f.pool, `INSERT INTO api_keys (org_id, key_hash) VALUES ($1, $2)`, org.ID, h[:])
	keys := []string{apiKey, "another-key-of-the-organisation"}
	for _, key := range keys {
		f.replicas[0].wantCode(t, key, admitted)
	}
	name, _ := f.replicas[0].cache.RedisNames(h, org.ID)
	waitFor(t, func() bool { return f.rdb.Exists(t.Context(), name).Val() == 1 })
	before := f.replicas[0].cache.Stats().StoreReads
	testservers.Exec(t, f.pool, `UPDATE org_plans SET status = 'past_due' WHERE org_id = $1`, org.ID)
	for i, r := range f.replicas { // the second one has the key from Redis
		waitFor(t, func() bool { return r.cache.Stats().Announcements >= 4 }) // org, two keys, and the change
		for _, key := range keys {
			r.wantCode(t, key, planExpired)
		}
		if got := r.cache.Stats(); i == 0 && got.StoreReads != before+1 {
			t.Errorf("%d lookups for a changed plan, want 1 for both keys", got.StoreReads-before)
		}
	}
}

// TestPlanStaysWithItsStore: a plan never comes from tables that the PlanStore does
// not read, whatever the key store could read of them, and whatever is in Redis.
func TestPlanStaysWithItsStore(t *testing.T) {
	w, rdb := newPostgresWorld(t), testservers.Redis(t)
	other := testservers.Pool(t, w.pool.Config().ConnString())
	apiKey, _ := w.enrol(t, live, paid) // what the tables say
	var asked atomic.Int64
	free := apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) {
		asked.Add(1)
		return apikey.Plan{Name: basic, Status: apikey.PlanActive}, nil
	})
	type decorated struct{ apikey.PlanStore }
	for name, c := range map[string]struct {
		keys       apikey.KeyStore
		plans      apikey.PlanStore
		want       string
		statements uint64
	}{
		"our stores on one pool":        {w.PostgresKeyStore, w.PostgresPlanStore, admitted, 1},
		"a plan store of the user's":    {w.PostgresKeyStore, free, planExpired, 2},
		"a decorator around ours":       {w.PostgresKeyStore, decorated{w.PostgresPlanStore}, admitted, 2},
		"a decorator that knows better": {w.PostgresKeyStore, decorated{free}, planExpired, 2},
		"our stores on two pools":       {w.PostgresKeyStore, apikey.NewPostgresPlanStore(other), admitted, 2},
		"a key store of the user's":     {apikey.KeyStoreFunc(w.Key), w.PostgresPlanStore, admitted, 2},
	} {
		t.Run(name, func(t *testing.T) {
			secret := newSecret()
			cache := apikey.NewCache(rdb, secret, nil)
			r := replica{apikey.New(c.keys, c.plans, &apikey.Options{Cache: cache}), cache}
			for range 3 {
				r.wantCode(t, apiKey, c.want)
			}
			if got := cache.Stats(); got.StoreBatches != c.statements {
				t.Errorf("%d lookups, want %d", got.StoreBatches, c.statements)
			}
		})
	}

	t.Run("Redis has a key with the plan of the tables", func(t *testing.T) {
		secret := newSecret()
		joined := newPostgresReplica(w, rdb, secret, nil)
		joined.wantCode(t, apiKey, admitted)
		name, _ := joined.cache.RedisNames(apikey.HashKey(apiKey), "")
		waitFor(t, func() bool {
			newPostgresReplica(w, rdb, secret, &apikey.CacheOptions{MemoryEntries: -1}).ask(apiKey)
			return rdb.Exists(t.Context(), name).Val() == 1
		})
		waitFor(t, func() bool {
			cache := apikey.NewCache(rdb, secret, nil)
			r := replica{apikey.New(w.PostgresKeyStore, free, &apikey.Options{Cache: cache}), cache}
			r.ask("some-key-that-nobody-has")
			before := asked.Load()
			r.wantCode(t, apiKey, planExpired)
			if asked.Load() == before {
				t.Error("the user's plan store is not asked")
			}
			return cache.Stats().RedisHits == 1 // else the GET failed, on a busy machine
		})
	})
}

// TestColdKeysGoTogether: many cold keys at once take few round trips, and nobody is
// refused for it.
func TestColdKeysGoTogether(t *testing.T) {
	const keys = 2000
	w := newPostgresWorld(t)
	testservers.Exec(t, w.pool, `INSERT INTO organisations SELECT 'org ' || i FROM generate_series(1, $1::int) i`, keys)
	testservers.Exec(t, w.pool, `INSERT INTO org_plans (org_id, plan, status) SELECT 'org ' || i, 'starter', 'active' FROM generate_series(1, $1::int) i`, keys)
	testservers.Exec(t, w.pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'org ' || i, sha256(('a-key-issued-elsewhere-' || i)::bytea) FROM generate_series(1, $1::int) i`, keys)
	patient := &apikey.CacheOptions{StoreTimeout: 10 * time.Second, RedisTimeout: 10 * time.Second} // on a busy machine
	for name, r := range map[string]replica{
		"joined":   newPostgresReplica(w, testservers.Redis(t), newSecret(), patient),
		"separate": newReplica(w, testservers.Redis(t), newSecret(), patient),
		"one by one": func() replica {
			cache := apikey.NewCache(testservers.Redis(t), newSecret(), patient)
			return replica{apikey.New(apikey.KeyStoreFunc(w.Key), apikey.PlanStoreFunc(w.Plan), &apikey.Options{Cache: cache}), cache}
		}(),
	} {
		var wg sync.WaitGroup
		for i := range keys {
			wg.Go(func() { r.wantCode(t, fmt.Sprint("a-key-issued-elsewhere-", i+1), admitted) })
		}
		wg.Wait()
		got := r.cache.Stats()
		t.Logf("%s: %d keys in %d batches of GETs and %d of lookups", name, keys, got.RedisBatches, got.StoreBatches)
		if name != "one by one" && (got.StoreBatches > keys/4 || got.RedisBatches > keys/4) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestOverloadIsNoOutage: when lookups wait for each other, or for the connections of
// the pool, facts past their time admit nobody. Whoever can cause load could keep a
// revoked key alive.
func TestOverloadIsNoOutage(t *testing.T) {
	t.Run("queue", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newMemoryWorld()
			rdb := new(fakeRedis).client()
			defer rdb.Close()
			var slow atomic.Bool
			cache := apikey.NewCache(rdb, newSecret(), &apikey.CacheOptions{MaxBatches: 1, MaxQueue: 100})
			keys := apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
				if slow.Load() {
					time.Sleep(100 * time.Millisecond) // slow, and well: 4 at once, 40 a second
				}
				return w.Key(ctx, h)
			})
			r := replica{apikey.New(keys, w, &apikey.Options{Cache: cache}), cache}
			var good []string
			for range 100 {
				apiKey, _ := w.enrol(t, live, paid)
				r.wantCode(t, apiKey, admitted)
				good = append(good, apiKey)
			}
			w.set(func() { // revoked, and nothing announces it
				for h, key := range w.keys {
					key.Active = false
					w.keys[h] = key
				}
			})
			time.Sleep(11 * time.Second) // past MaxStaleness, and far from StaleIfError
			slow.Store(true)
			answers := make(chan string, len(good))
			for _, apiKey := range good {
				go func() { answers <- r.ask(apiKey) }()
			}
			counts := map[string]int{}
			for range good {
				counts[<-answers]++
			}
			stats := cache.Stats()
			if counts[admitted] != 0 || counts[invalid] < 10 || counts[unavailable] < 10 || stats.StaleUses != 0 || stats.QueueTimeouts+stats.QueueFull == 0 {
				t.Errorf("%v, %+v; want no admission", counts, stats)
			}
			time.Sleep(time.Second) // for what is under way
		})
	})

	t.Run("pool", func(t *testing.T) {
		w := newPostgresWorld(t)
		apiKey, org := w.enrol(t, live, paid)
		pool := testservers.Pool(t, w.pool.Config().ConnString()+"&pool_max_conns=2")
		cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: 100 * time.Millisecond})
		r := replica{apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache}), cache}
		r.wantCode(t, apiKey, admitted)
		for range 2 { // what the application does
			conn, err := pool.Acquire(t.Context())
			mustNot(t, err)
			defer conn.Release()
		}
		testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
		time.Sleep(100 * time.Millisecond)
		for range 5 {
			r.wantCode(t, apiKey, unavailable)
		}
		if got := cache.Stats(); got.StoreBusy != 5 || got.StoreErrors != 0 || got.StaleUses != 0 || got.StoreSkipped != 0 {
			t.Errorf("%+v, want 5 times busy, and nothing else", got)
		}
	})
}

// TestHangingStore: a store that does not honour its context costs a request its
// timeout and no more, and hangs on to a limited number of goroutines.
func TestHangingStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		w := newMemoryWorld()
		hangs := make(chan struct{})
		cache := apikey.NewCache(rdb, newSecret(), nil)
		r := replica{apikey.New(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
			<-hangs
			return w.Key(ctx, h)
		}), w, &apikey.Options{Cache: cache}), cache}
		before := runtime.NumGoroutine()
		for range 300 {
			apiKey, _ := w.enrol(t, live, paid)
			start := time.Now()
			r.wantCode(t, apiKey, unavailable)
			if took := time.Since(start); took > 510*time.Millisecond {
				t.Errorf("answered after %v", took)
			}
			time.Sleep(breakFor)
		}
		if n := cache.Stats().StoreAbandoned; n != 64 {
			t.Errorf("%d lookups are abandoned, want 64", n)
		}
		if n := runtime.NumGoroutine() - before; n > 2*64 {
			t.Errorf("%d goroutines hang", n)
		}
		close(hangs)
		synctest.Wait()
		time.Sleep(breakFor)
		if n := cache.Stats().StoreAbandoned; n != 0 {
			t.Errorf("%d lookups are abandoned after all have returned", n)
		}
		apiKey, _ := w.enrol(t, live, paid)
		r.wantCode(t, apiKey, admitted)
	})
}

// TestLookupsSeeNoCaller: a lookup may serve many requests, so it sees no values of
// their contexts, and does not end with any of them.
func TestLookupsSeeNoCaller(t *testing.T) {
	type key struct{}
	w := newMemoryWorld()
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	cache := apikey.NewCache(rdb, newSecret(), nil)
	r := replica{apikey.New(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
		if ctx.Value(key{}) != nil {
			t.Error("the store sees a value of the request's context")
		}
		if _, ok := ctx.Deadline(); !ok {
			t.Error("the lookup has no deadline")
		}
		return w.Key(ctx, h)
	}), w, &apikey.Options{Cache: cache}), cache}
	apiKey, _ := w.enrol(t, live, paid)
	if got := r.askContext(context.WithValue(t.Context(), key{}, "span"), apiKey); got != admitted {
		t.Errorf("answered %q", got)
	}
}

// A batchStore is a store of the user's own that finds many keys at once.
type batchStore struct {
	*memoryWorld
	mu      sync.Mutex
	batches [][]apikey.KeyHash
	err     error
}

func (s *batchStore) Keys(ctx context.Context, hashes []apikey.KeyHash) (map[apikey.KeyHash]apikey.Key, error) {
	s.mu.Lock()
	s.batches = append(s.batches, slices.Clone(hashes))
	err := s.err
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	found := map[apikey.KeyHash]apikey.Key{}
	for _, h := range hashes {
		if k, err := s.Key(ctx, h); err == nil {
			found[h] = k
		}
	}
	snapshot.Report(ctx, "10:10:", 0)
	return found, nil
}

// TestBatchStore: a store of the user's own that can batch is asked in batches, for
// absent keys too, and its stamp is that of all of them.
func TestBatchStore(t *testing.T) {
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	s := &batchStore{memoryWorld: newMemoryWorld()}
	cache := apikey.NewCache(rdb, newSecret(), nil)
	r := replica{apikey.New(s, s.memoryWorld, &apikey.Options{Cache: cache}), cache}
	good, _ := s.enrol(t, live, paid)
	bad, _ := s.enrol(t, unknown, paid)
	r.wantCode(t, good, admitted)
	r.wantCode(t, bad, invalid)
	if len(s.batches) != 2 {
		t.Errorf("%d calls of Keys, want 2", len(s.batches))
	}
	cache.Log().Announce(keyTopic(apikey.HashKey(good)), 20, instant())
	s.err = errStore
	r.wantCode(t, good, unavailable) // it has the stamp that Keys reported, and is overtaken
	cache.Log().AnnounceAll(feed.Key, 30, instant())
	r.wantCode(t, bad, unavailable)
	s.err = errors.Join(apikey.ErrNotFound) // of a batch, "not there" is an answer without an error
	time.Sleep(breakFor)
	r.wantCode(t, bad, unavailable)
}

// TestRevokedUnderLoad: without the feed, with the store 5 ms away and more requests than
// keep all keys fresh, with made-up keys among them or not, a revoked key is admitted for
// MaxStaleness and no longer.
func TestRevokedUnderLoad(t *testing.T) {
	const maxStaleness, slack = time.Second, time.Second
	for name, flooded := range map[string]bool{"many keys": false, "and a flood of made-up ones": true} {
		t.Run(name, func(t *testing.T) {
			w := newPostgresWorld(t)
			address, proxy := testservers.ProxyPostgres(t, w.pool.Config().ConnString())
			proxy.Delay(5 * time.Millisecond)
			pool := testservers.Pool(t, address)
			testservers.Exec(t, w.pool, `INSERT INTO organisations VALUES ('many')`)
			testservers.Exec(t, w.pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ('many', 'starter', 'active')`)
			testservers.Exec(t, w.pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'many', sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(0, 2999) i`)
			cache := apikey.NewCache(testservers.Redis(t), newSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
			r := replica{apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache}), cache}
			var revokedAt, refused, late, longest atomic.Int64
			var wg sync.WaitGroup
			defer wg.Wait()
			ask := func(i int) {
				asked := time.Now()
				code := r.ask(fmt.Sprintf("a-key-of-many-%d", i))
				at := revokedAt.Load()
				switch {
				case code == unavailable:
					refused.Add(1)
				case code == admitted && i < 500 && at > 0 && asked.UnixNano()-at > int64(maxStaleness):
					longest.Store(max(longest.Load(), asked.UnixNano()-at))
					if asked.UnixNano()-at > int64(maxStaleness+slack) {
						late.Add(1)
					}
				}
			}
			n := 0
			for start := time.Now(); time.Since(start) < 2*maxStaleness+2*slack; time.Sleep(time.Millisecond) {
				if revokedAt.Load() == 0 && time.Since(start) > maxStaleness {
					testservers.Exec(t, w.pool, `UPDATE api_keys SET active = false WHERE key_hash IN (SELECT sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(0, 499) i)`)
					revokedAt.Store(time.Now().UnixNano())
				}
				for range 2 {
					i := n
					n++
					wg.Go(func() { ask(i * 7919 % 3000) })
					if flooded {
						wg.Go(func() { r.ask(fmt.Sprintf("made-up-made-up-%d", i)) })
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
