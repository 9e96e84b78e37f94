package apikey_test

// Outages on a fake clock: what is asked when, what it costs, and what is said.
// Outages of real servers are in systemtest.

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/world"
)

// breakFor is a little longer than what has failed is left alone for.
const breakFor = time.Second + time.Millisecond

// TestErrorsAreNotCached: "could not look" is answered 503, and asked again.
func TestErrorsAreNotCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, fake := world.NewMemory(), new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		w.Set(func() { w.Err = world.ErrStore })
		for range 3 {
			r.WantCode(t, apiKey, world.Unavailable)
		}
		if got := r.Cache.Stats(); got.StoreReads != 3 || got.StoreErrors != 3 {
			t.Errorf("%+v, want 3 reads and 3 errors", got)
		}
		if _, sets := fake.counts(); sets != 0 {
			t.Errorf("%d SETs after errors", sets)
		}
		w.Set(func() { w.Err = nil })
		time.Sleep(breakFor)
		r.WantCode(t, apiKey, world.Admitted)
	})
}

// TestLookupBudget: a store that does not answer costs half a second, and no more
// than sixteen lookups wait for it.
func TestLookupBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		w := slowWorld{world.NewMemory(), make(chan struct{}, 1000), make(chan struct{})}
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		start := time.Now()
		var wg sync.WaitGroup
		for range 100 {
			apiKey, _ := w.Enrol(t, world.Live, world.Paid)
			wg.Go(func() { r.WantCode(t, apiKey, world.Unavailable) })
		}
		synctest.Wait()
		if n := len(w.started); n != 16 {
			t.Errorf("%d lookups at once, want 16", n)
		}
		wg.Wait()
		if took := time.Since(start); took != 500*time.Millisecond {
			t.Errorf("answered after %v, want 500ms", took)
		}
		synctest.Wait()
		for len(w.started) > 0 {
			<-w.started
		}

		close(w.release) // it answers again
		time.Sleep(breakFor)
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		r.WantCode(t, apiKey, world.Admitted)
	})
}

// TestStorePanics: a panic in a store is an outage, not the end of the process.
func TestStorePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := world.NewMemory()
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		broken := true
		cache := apikey.NewCache(rdb, world.NewSecret(), nil)
		r := world.ReplicaOn(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
			if broken {
				panic("nil map")
			}
			return w.Key(ctx, h)
		}), w, cache)
		for range 10 { // and it gives its lookup slot back
			r.WantCode(t, apiKey, world.Unavailable)
			time.Sleep(breakFor)
		}
		if got := cache.Stats().StoreErrors; got != 10 {
			t.Errorf("%d store errors, want 10", got)
		}
		broken = false
		r.WantCode(t, apiKey, world.Admitted)
	})
}

// TestStoreBreaker: a frozen store costs its budget three times, and then once a
// second; all other requests are answered at once. When it is back, so are they.
func TestStoreBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		w := slowWorld{world.NewMemory(), make(chan struct{}, 1000), make(chan struct{})}
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		ask := func() time.Duration {
			apiKey, _ := w.Enrol(t, world.Live, world.Paid)
			start := time.Now()
			r.WantCode(t, apiKey, world.Unavailable)
			return time.Since(start)
		}
		for range 3 {
			if took := ask(); took != 500*time.Millisecond {
				t.Errorf("answered after %v, want the budget of 500ms", took)
			}
		}
		for range 3 {
			for range 100 {
				if took := ask(); took != 0 {
					t.Errorf("answered after %v, want at once", took)
				}
			}
			time.Sleep(breakFor)
			if took := ask(); took != 500*time.Millisecond { // looks whether it is back
				t.Errorf("answered after %v, want the budget of 500ms", took)
			}
		}
		if got := r.Cache.Stats(); got.StoreReads != 6 || got.StoreErrors != 6 || got.StoreSkipped != 300 {
			t.Errorf("%+v, want 6 reads, 6 errors, 300 skipped", got)
		}
		close(w.release)
		time.Sleep(breakFor)
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		r.WantCode(t, apiKey, world.Admitted)
	})
}

// TestStaleIfError: while the store cannot be read, facts past their time admit,
// never refuse, and end on time. The decision and the statistics tell.
func TestStaleIfError(t *testing.T) {
	const limit = time.Minute
	opts := &apikey.CacheOptions{MaxStaleness: 10 * time.Second, RefreshAfter: 30 * time.Second, StaleIfError: limit}
	for _, c := range []struct {
		name   string
		key    world.KeyState
		plan   world.PlanState
		before string // and after the outage
		during string // from MaxStaleness on
	}{
		{"good", world.Live, world.Paid, world.Admitted, world.Admitted},
		{"deactivated", world.Deactivated, world.Paid, world.Invalid, world.Unavailable},
		{"unknown", world.Unknown, world.Paid, world.Invalid, world.Unavailable},
		{"plan expired", world.Live, world.PastDue, world.PlanExpired, world.Unavailable},
		{"no plan", world.Live, world.NoSubscription, world.PlanExpired, world.Unavailable},
	} {
		for _, layer := range []string{"memory and Redis", "Redis", "memory"} {
			t.Run(c.name+", "+layer, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, fake := world.NewMemory(), new(fakeRedis)
					rdb := fake.client()
					defer rdb.Close()
					o := *opts
					if layer == "Redis" {
						o.MemoryEntries = -1
					}
					cache := apikey.NewCache(rdb, world.NewSecret(), &o)
					var seen apikey.Decision
					r := world.Replica{Cache: cache, Middleware: apikey.New(w, w, &apikey.Options{
						Cache:   cache,
						Observe: func(_ context.Context, d apikey.Decision) { seen = d },
					})}
					apiKey, _ := w.Enrol(t, c.key, c.plan)
					read := time.Now()
					r.WantCode(t, apiKey, c.before)
					synctest.Wait()
					w.Set(func() { w.Err = world.ErrStore })
					if layer == "memory" {
						fake.set(func() { clear(fake.values) })
					}

					for _, age := range []time.Duration{10 * time.Second, 30 * time.Second, limit - 1} {
						time.Sleep(age - time.Since(read))
						r.WantCode(t, apiKey, c.during)
						if want := apikey.SourceStale; c.during == world.Admitted && seen.Source != want {
							t.Errorf("at %v the source is %q, want %q", age, seen.Source, want)
						}
					}
					time.Sleep(time.Nanosecond)
					r.WantCode(t, apiKey, world.Unavailable)
					uses := cache.Stats().StaleUses
					if c.during == world.Admitted && uses < 3 || c.during != world.Admitted && c.key != world.Live && uses != 0 {
						t.Errorf("%d stale uses", uses)
					}

					w.Set(func() { w.Err = nil })
					time.Sleep(breakFor)
					r.WantCode(t, apiKey, c.before)
				})
			})
		}
	}
}

// TestStaleIfErrorEnds: facts that an announced change has overtaken, and a key
// or plan that has come to its own end, admit nobody, outage or not.
func TestStaleIfErrorEnds(t *testing.T) {
	for name, c := range map[string]func(w *world.Memory, cache *apikey.Cache, h apikey.KeyHash, orgID string){
		"announced, key": func(_ *world.Memory, cache *apikey.Cache, h apikey.KeyHash, _ string) {
			cache.Log().Announce(world.KeyTopic(h), 20, world.Instant())
		},
		"announced, plan": func(_ *world.Memory, cache *apikey.Cache, _ apikey.KeyHash, org string) {
			cache.Log().Announce(feed.PlanTopic(org), 20, world.Instant())
		},
		"announced, tier": func(_ *world.Memory, cache *apikey.Cache, _ apikey.KeyHash, _ string) {
			cache.Log().Announce(feed.TierTopic(world.Starter), 20, world.Instant())
		},
		"announced, all keys": func(_ *world.Memory, cache *apikey.Cache, _ apikey.KeyHash, _ string) {
			cache.Log().AnnounceAll(feed.Key, 20, world.Instant())
		},
		"announced, all plans": func(_ *world.Memory, cache *apikey.Cache, _ apikey.KeyHash, _ string) {
			cache.Log().AnnounceAll(feed.Plan, 20, world.Instant())
		},
		"its own end": func(*world.Memory, *apikey.Cache, apikey.KeyHash, string) { time.Sleep(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rdb := new(fakeRedis).client()
				defer rdb.Close()
				w := world.NewMemory()
				apiKey, org := w.Enrol(t, world.Live, world.Paid)
				h := apikey.HashKey(apiKey)
				plan := w.PlanRows[org.ID]
				plan.EndsAt = time.Now().Add(time.Minute)
				w.PlanRows[org.ID] = plan
				cache := apikey.NewCache(rdb, world.NewSecret(), nil)
				r := world.ReplicaOn(stamped(w.Key), stampedPlans(w.Plan), cache)
				r.WantCode(t, apiKey, world.Admitted)
				w.Set(func() { w.Err = world.ErrStore })
				time.Sleep(20 * time.Second)
				r.WantCode(t, apiKey, world.Admitted)
				c(w, cache, h, org.ID)
				r.WantCode(t, apiKey, world.Unavailable)
			})
		})
	}
}

// stamped is a store that stamps, as one on PostgreSQL does.
func stamped(read apikey.KeyStoreFunc) apikey.KeyStore {
	return apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
		snapshot.Report(ctx, "10:10:", 0)
		return read(ctx, h)
	})
}

func stampedPlans(read apikey.PlanStoreFunc) apikey.PlanStore {
	return apikey.PlanStoreFunc(func(ctx context.Context, orgID string) (apikey.Plan, error) {
		snapshot.Report(ctx, "10:10:", 0)
		return read(ctx, orgID)
	})
}

// TestRefusedAgainAndAgain: a customer whose plan has expired, or whose key is
// dead, may try as often as he likes: it costs one lookup a second at most, even
// when the feed is away.
func TestRefusedAgainAndAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		w := world.NewMemory()
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		unpaid, _ := w.Enrol(t, world.Live, world.PastDue)
		dead, _ := w.Enrol(t, world.Deactivated, world.Paid)
		made, _ := w.Enrol(t, world.Unknown, world.Paid)
		for range 10_000 { // ten seconds of it
			r.WantCode(t, unpaid, world.PlanExpired)
			r.WantCode(t, dead, world.Invalid)
			r.WantCode(t, made, world.Invalid)
			time.Sleep(time.Millisecond)
		}
		// The key of the unpaid one is good, and read but once in this time.
		if got := w.ReadCount(); got > 1+3*10 {
			t.Errorf("%d lookups in 10 s, want one a second for each", got)
		}
	})
}

// TestRedisOutages: whatever Redis does, the store decides. The first few
// requests pay for a GET, then one a second; when Redis is back it is used again.
func TestRedisOutages(t *testing.T) {
	for name, fault := range map[string]func(context.Context) error{
		"refused":       func(context.Context) error { return errors.New("connection refused") },
		"out of memory": func(context.Context) error { return errors.New("OOM command not allowed") },
		"frozen": func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &fakeRedis{fault: fault}
				rdb := fake.client()
				defer rdb.Close()
				w := world.NewMemory()
				r := world.NewReplica(w, rdb, world.NewSecret(), nil)
				ask := func(k world.KeyState, want string) time.Duration {
					apiKey, _ := w.Enrol(t, k, world.Paid)
					start := time.Now()
					r.WantCode(t, apiKey, want)
					return time.Since(start)
				}
				if took := ask(world.Live, world.Admitted); took > 100*time.Millisecond { // GETs for the key and the plan
					t.Errorf("answered after %v; a GET may take 50ms", took)
				}
				for range 11 { // ten GETs, and ten batches of SETs
					ask(world.Deactivated, world.Invalid)
					time.Sleep(60 * time.Millisecond) // for the SET
				}
				for range 100 {
					if took := ask(world.Live, world.Admitted) + ask(world.Unknown, world.Invalid); took != 0 {
						t.Errorf("answered after %v, want at once", took)
					}
				}
				time.Sleep(100 * time.Millisecond)
				got := r.Cache.Stats()
				if got.RedisErrors < 20 || got.RedisErrors > 30 || got.RedisSkipped < 300 || got.StoreErrors != 0 {
					t.Errorf("%+v, want 10 errors of GETs, 10 of SETs or little more, all else skipped, and no error of the store", got)
				}

				fake.set(func() { fake.fault = nil })
				time.Sleep(breakFor)
				ask(world.Live, world.Admitted)
				synctest.Wait()
				if gets, sets := fake.counts(); gets != 2 || sets != 2 {
					t.Errorf("%d GETs and %d SETs after Redis has come back, want 2 and 2", gets, sets)
				}
				time.Sleep(10 * time.Second) // for what still tries to connect
			})
		})
	}
}

// TestFrozenRedis: a server that takes the connection and never says a word.
func TestFrozenRedis(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	rdb := redis.NewClient(&redis.Options{Addr: listener.Addr().String(), ContextTimeoutEnabled: true})
	defer rdb.Close()
	w := world.NewMemory()
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // of the client's own limits, the first is 5 s
	defer cancel()
	r := world.NewReplica(w, rdb, world.NewSecret(), nil)
	if got := r.AskContext(ctx, apiKey); got != world.Admitted {
		t.Errorf("answered %q, want admitted", got)
	}
	world.WaitFor(t, func() bool { return r.Cache.Stats().RedisErrors+r.Cache.Stats().RedisSkipped == 4 })
}
