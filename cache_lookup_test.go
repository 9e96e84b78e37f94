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

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestOneRoundTrip: a cold key and its plan take one GET and one statement, and for
// the next replica one GET.
func TestOneRoundTrip(t *testing.T) {
	t.Parallel()
	w, rdb, secret := world.NewPostgres(t), testservers.Redis(t), world.NewSecret()
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	first := world.NewPostgresReplica(w, rdb, secret, nil)
	for range 3 {
		first.WantCode(t, apiKey, world.Admitted)
	}
	if got := first.Cache.Stats(); got.RedisGets != 1 || got.StoreReads != 1 || got.StoreBatches != 1 {
		t.Errorf("a cold key took %+v, want 1 GET and 1 statement", got)
	}
	name, _ := world.RedisNames(apikey.HashKey(apiKey), org.ID)
	world.AwaitRecords(t, world.NewPostgresReplica(w, rdb, secret, world.NoMemory()), rdb, apiKey, name)
	for _, entries := range []int{0, -1} {
		world.WaitFor(t, func() bool { // a GET may fail, when the machine is busy for longer than its budget
			second := world.NewPostgresReplica(w, rdb, secret, &apikey.CacheOptions{MemoryEntries: entries})
			before := second.MeetStore(t, w)
			second.WantCode(t, apiKey, world.Admitted)
			before.RedisHits, before.RedisGets, before.RedisBatches = before.RedisHits+1, before.RedisGets+1, before.RedisBatches+1
			return second.Cache.Stats() == before
		})
	}
}

// TestPlanChangesAlone: when a plan has changed, the record that came with the key is
// overtaken and the key's is not, in memory and in Redis, for all keys of the
// organisation.
func TestPlanChangesAlone(t *testing.T) {
	t.Parallel()
	f := world.NewFleet(t, 2, &apikey.CacheOptions{MaxStaleness: time.Minute})
	apiKey, org := f.Enrol(t, world.Live, world.Paid)
	h := apikey.HashKey("another-key-of-the-organisation")
	testservers.Exec(t, f.Pool, `INSERT INTO api_keys (org_id, key_hash) VALUES ($1, $2)`, org.ID, h[:])
	keys := []string{apiKey, "another-key-of-the-organisation"}
	for _, key := range keys {
		f.Replicas[0].WantCode(t, key, world.Admitted)
	}
	name, _ := world.RedisNames(h, org.ID)
	world.AwaitRecords(t, world.NewPostgresReplica(f.Postgres, f.Redis, f.Secret, world.NoMemory()), f.Redis, keys[1], name)
	before := f.Replicas[0].Cache.Stats().StoreReads
	testservers.Exec(t, f.Pool, `UPDATE org_plans SET status = 'past_due' WHERE org_id = $1`, org.ID)
	for i, r := range f.Replicas { // the second one has the key from Redis
		world.WaitFor(t, func() bool { return r.Ask(keys[0]) == world.PlanExpired })
		for _, key := range keys {
			r.WantCode(t, key, world.PlanExpired)
		}
		if got := r.Cache.Stats(); i == 0 && got.StoreReads != before+1 {
			t.Errorf("%d lookups for a changed plan, want 1 for both keys", got.StoreReads-before)
		}
	}
}

// TestPlanStaysWithItsStore: a plan never comes from tables that the PlanStore does
// not read, whatever the key store could read of them, and whatever is in Redis.
func TestPlanStaysWithItsStore(t *testing.T) {
	t.Parallel()
	w, rdb := world.NewPostgres(t), testservers.Redis(t)
	other := testservers.Pool(t, w.Pool.Config().ConnString())
	apiKey, _ := w.Enrol(t, world.Live, world.Paid) // what the tables say
	var asked atomic.Int64
	free := apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) {
		asked.Add(1)
		return apikey.Plan{Name: world.Basic, Status: apikey.PlanActive}, nil
	})
	type decorated struct{ apikey.PlanStore }
	for name, c := range map[string]struct {
		keys       apikey.KeyStore
		plans      apikey.PlanStore
		want       string
		statements uint64
	}{
		"our stores on one pool":        {w.PostgresKeyStore, w.PostgresPlanStore, world.Admitted, 1},
		"a plan store of the user's":    {w.PostgresKeyStore, free, world.PlanExpired, 2},
		"a decorator around ours":       {w.PostgresKeyStore, decorated{w.PostgresPlanStore}, world.Admitted, 2},
		"a decorator that knows better": {w.PostgresKeyStore, decorated{free}, world.PlanExpired, 2},
		"our stores on two pools":       {w.PostgresKeyStore, apikey.NewPostgresPlanStore(other), world.Admitted, 2},
		"a key store of the user's":     {apikey.KeyStoreFunc(w.Key), w.PostgresPlanStore, world.Admitted, 2},
	} {
		t.Run(name, func(t *testing.T) {
			secret := world.NewSecret()
			cache := apikey.NewCache(rdb, secret, nil)
			r := world.ReplicaOn(c.keys, c.plans, cache)
			for range 3 {
				r.WantCode(t, apiKey, c.want)
			}
			if got := cache.Stats(); got.StoreBatches != c.statements {
				t.Errorf("%d lookups, want %d", got.StoreBatches, c.statements)
			}
		})
	}

	t.Run("Redis has a key with the plan of the tables", func(t *testing.T) {
		secret := world.NewSecret()
		joined := world.NewPostgresReplica(w, rdb, secret, nil)
		joined.WantCode(t, apiKey, world.Admitted)
		name, _ := world.RedisNames(apikey.HashKey(apiKey), "")
		world.AwaitRecords(t, world.NewPostgresReplica(w, rdb, secret, world.NoMemory()), rdb, apiKey, name)
		world.WaitFor(t, func() bool {
			cache := apikey.NewCache(rdb, secret, nil)
			r := world.ReplicaOn(w.PostgresKeyStore, free, cache)
			r.Ask("some-key-that-nobody-has")
			before := asked.Load()
			r.WantCode(t, apiKey, world.PlanExpired)
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
	t.Parallel()
	const keys = 2000
	w := world.NewPostgres(t)
	testservers.Exec(t, w.Pool, `INSERT INTO organisations SELECT 'org ' || i FROM generate_series(1, $1::int) i`, keys)
	testservers.Exec(t, w.Pool, `INSERT INTO org_plans (org_id, plan, status) SELECT 'org ' || i, 'starter', 'active' FROM generate_series(1, $1::int) i`, keys)
	testservers.Exec(t, w.Pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'org ' || i, sha256(('a-key-issued-elsewhere-' || i)::bytea) FROM generate_series(1, $1::int) i`, keys)
	patient := &apikey.CacheOptions{StoreTimeout: 10 * time.Second, RedisTimeout: 10 * time.Second} // on a busy machine
	for name, r := range map[string]world.Replica{
		"joined":   world.NewPostgresReplica(w, testservers.Redis(t), world.NewSecret(), patient),
		"separate": world.NewReplica(w, testservers.Redis(t), world.NewSecret(), patient),
		"one by one": func() world.Replica {
			cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), patient)
			return world.ReplicaOn(apikey.KeyStoreFunc(w.Key), apikey.PlanStoreFunc(w.Plan), cache)
		}(),
	} {
		var wg sync.WaitGroup
		for i := range keys {
			wg.Go(func() { r.WantCode(t, fmt.Sprint("a-key-issued-elsewhere-", i+1), world.Admitted) })
		}
		wg.Wait()
		got := r.Cache.Stats()
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
	t.Parallel()
	t.Run("queue", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := world.NewMemory()
			rdb := new(fakeRedis).client()
			defer rdb.Close()
			var slow atomic.Bool
			cache := apikey.NewCache(rdb, world.NewSecret(), &apikey.CacheOptions{MaxBatches: 1, MaxQueue: 100})
			keys := apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
				if slow.Load() {
					time.Sleep(100 * time.Millisecond) // slow, and well: 4 at once, 40 a second
				}
				return w.Key(ctx, h)
			})
			r := world.ReplicaOn(keys, w, cache)
			var good []string
			for range 100 {
				apiKey, _ := w.Enrol(t, world.Live, world.Paid)
				r.WantCode(t, apiKey, world.Admitted)
				good = append(good, apiKey)
			}
			w.Set(func() { // revoked, and nothing announces it
				for h, key := range w.KeyRows {
					key.Active = false
					w.KeyRows[h] = key
				}
			})
			time.Sleep(11 * time.Second) // past MaxStaleness, and far from StaleIfError
			slow.Store(true)
			answers := make(chan string, len(good))
			for _, apiKey := range good {
				go func() { answers <- r.Ask(apiKey) }()
			}
			counts := map[string]int{}
			for range good {
				counts[<-answers]++
			}
			stats := cache.Stats()
			if counts[world.Admitted] != 0 || counts[world.Invalid] < 10 || counts[world.Unavailable] < 10 || stats.StaleUses != 0 || stats.QueueTimeouts+stats.QueueFull == 0 {
				t.Errorf("%v, %+v; want no admission", counts, stats)
			}
			time.Sleep(time.Second) // for what is under way
		})
	})

	t.Run("pool", func(t *testing.T) {
		w := world.NewPostgres(t)
		apiKey, org := w.Enrol(t, world.Live, world.Paid)
		pool := testservers.Pool(t, w.Pool.Config().ConnString()+"&pool_max_conns=2")
		cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: 100 * time.Millisecond})
		r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
		r.WantCode(t, apiKey, world.Admitted)
		for range 2 { // what the application does
			conn, err := pool.Acquire(t.Context())
			world.MustNot(t, err)
			defer conn.Release()
		}
		testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
		time.Sleep(100 * time.Millisecond)
		for range 5 {
			r.WantCode(t, apiKey, world.Unavailable)
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
		w := world.NewMemory()
		hangs := make(chan struct{})
		cache := apikey.NewCache(rdb, world.NewSecret(), nil)
		r := world.ReplicaOn(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
			<-hangs
			return w.Key(ctx, h)
		}), w, cache)
		before := runtime.NumGoroutine()
		for range 300 {
			apiKey, _ := w.Enrol(t, world.Live, world.Paid)
			start := time.Now()
			r.WantCode(t, apiKey, world.Unavailable)
			if took := time.Since(start); took > 510*time.Millisecond {
				t.Errorf("answered after %v", took)
			}
			time.Sleep(breakFor)
		}
		if n := cache.Stats().StoreAbandoned; n != 64 {
			t.Errorf("%d lookups are abandoned, want 64", n)
		}
		if n := runtime.NumGoroutine() - before; n > 3*64 { // two for each, and those of tests beside this one
			t.Errorf("%d goroutines hang", n)
		}
		close(hangs)
		synctest.Wait()
		time.Sleep(breakFor)
		if n := cache.Stats().StoreAbandoned; n != 0 {
			t.Errorf("%d lookups are abandoned after all have returned", n)
		}
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		r.WantCode(t, apiKey, world.Admitted)
	})
}

// TestLookupsSeeNoCaller: a lookup may serve many requests, so it sees no values of
// their contexts, and does not end with any of them.
func TestLookupsSeeNoCaller(t *testing.T) {
	type key struct{}
	w := world.NewMemory()
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	cache := apikey.NewCache(rdb, world.NewSecret(), nil)
	r := world.ReplicaOn(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
		if ctx.Value(key{}) != nil {
			t.Error("the store sees a value of the request's context")
		}
		if _, ok := ctx.Deadline(); !ok {
			t.Error("the lookup has no deadline")
		}
		return w.Key(ctx, h)
	}), w, cache)
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	if got := r.AskContext(context.WithValue(t.Context(), key{}, "span"), apiKey); got != world.Admitted {
		t.Errorf("answered %q", got)
	}
}

// A batchStore is a store of the user's own that finds many keys at once.
type batchStore struct {
	*world.Memory
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
	t.Parallel()
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	s := &batchStore{Memory: world.NewMemory()}
	cache := apikey.NewCache(rdb, world.NewSecret(), nil)
	r := world.ReplicaOn(s, s.Memory, cache)
	good, _ := s.Enrol(t, world.Live, world.Paid)
	bad, _ := s.Enrol(t, world.Unknown, world.Paid)
	r.WantCode(t, good, world.Admitted)
	r.WantCode(t, bad, world.Invalid)
	if len(s.batches) != 2 {
		t.Errorf("%d calls of Keys, want 2", len(s.batches))
	}
	cache.Log().Announce(world.KeyTopic(apikey.HashKey(good)), 20, world.Instant())
	s.err = world.ErrStore
	r.WantCode(t, good, world.Unavailable) // it has the stamp that Keys reported, and is overtaken
	cache.Log().AnnounceAll(feed.Key, 30, world.Instant())
	r.WantCode(t, bad, world.Unavailable)
	s.err = errors.Join(apikey.ErrNotFound) // of a batch, "not there" is an answer without an error
	time.Sleep(breakFor)
	r.WantCode(t, bad, world.Unavailable)
}
