package apikey_test

// Outages on a fake clock: what is asked when, what it costs, and what is said.
// Outages of real servers are in fault_test.go.

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
)

// breakFor is a little longer than what has failed is left alone for.
const breakFor = time.Second + time.Millisecond

// TestErrorsAreNotCached: "could not look" is answered 503, and asked again.
func TestErrorsAreNotCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, fake := newMemoryWorld(), new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		r := newReplica(w, rdb, newSecret(), nil)
		apiKey, _ := w.enrol(t, live, paid)
		w.set(func() { w.err = errStore })
		for range 3 {
			r.wantCode(t, apiKey, unavailable)
		}
		if got := r.cache.Stats(); got.StoreReads != 3 || got.StoreErrors != 3 {
			t.Errorf("%+v, want 3 reads and 3 errors", got)
		}
		if _, sets := fake.counts(); sets != 0 {
			t.Errorf("%d SETs after errors", sets)
		}
		w.set(func() { w.err = nil })
		time.Sleep(breakFor)
		r.wantCode(t, apiKey, admitted)
	})
}

// TestLookupBudget: a store that does not answer costs half a second, and no more
// than sixteen lookups wait for it.
func TestLookupBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		w := slowWorld{newMemoryWorld(), make(chan struct{}, 1000), make(chan struct{})}
		r := newReplica(w, rdb, newSecret(), nil)
		start := time.Now()
		var wg sync.WaitGroup
		for range 100 {
			apiKey, _ := w.enrol(t, live, paid)
			wg.Go(func() { r.wantCode(t, apiKey, unavailable) })
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
		apiKey, _ := w.enrol(t, live, paid)
		r.wantCode(t, apiKey, admitted)
	})
}

// TestStorePanics: a panic in a store is an outage, not the end of the process.
func TestStorePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newMemoryWorld()
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		apiKey, _ := w.enrol(t, live, paid)
		broken := true
		cache := apikey.NewCache(rdb, newSecret(), nil)
		r := replica{apikey.New(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
			if broken {
				panic("nil map")
			}
			return w.Key(ctx, h)
		}), w, &apikey.Options{Cache: cache}), cache}
		for range 10 { // and it gives its lookup slot back
			r.wantCode(t, apiKey, unavailable)
			time.Sleep(breakFor)
		}
		if got := cache.Stats().StoreErrors; got != 10 {
			t.Errorf("%d store errors, want 10", got)
		}
		broken = false
		r.wantCode(t, apiKey, admitted)
	})
}

// TestStoreBreaker: a frozen store costs its budget three times, and then once a
// second; all other requests are answered at once. When it is back, so are they.
func TestStoreBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		w := slowWorld{newMemoryWorld(), make(chan struct{}, 1000), make(chan struct{})}
		r := newReplica(w, rdb, newSecret(), nil)
		ask := func() time.Duration {
			apiKey, _ := w.enrol(t, live, paid)
			start := time.Now()
			r.wantCode(t, apiKey, unavailable)
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
		if got := r.cache.Stats(); got.StoreReads != 6 || got.StoreErrors != 6 || got.StoreSkipped != 300 {
			t.Errorf("%+v, want 6 reads, 6 errors, 300 skipped", got)
		}
		close(w.release)
		time.Sleep(breakFor)
		apiKey, _ := w.enrol(t, live, paid)
		r.wantCode(t, apiKey, admitted)
	})
}

// TestStaleIfError: while the store cannot be read, facts past their time admit,
// never refuse, and end on time. The decision and the statistics tell.
func TestStaleIfError(t *testing.T) {
	const limit = time.Minute
	opts := &apikey.CacheOptions{MaxStaleness: 10 * time.Second, RefreshAfter: 30 * time.Second, StaleIfError: limit}
	for _, c := range []struct {
		name   string
		key    keyState
		plan   planState
		before string // and after the outage
		during string // from MaxStaleness on
	}{
		{"good", live, paid, admitted, admitted},
		{"deactivated", deactivated, paid, invalid, unavailable},
		{"unknown", unknown, paid, invalid, unavailable},
		{"plan expired", live, pastDue, planExpired, unavailable},
		{"no plan", live, noSubscription, planExpired, unavailable},
	} {
		for _, layer := range []string{"memory and Redis", "Redis", "memory"} {
			t.Run(c.name+", "+layer, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, fake := newMemoryWorld(), new(fakeRedis)
					rdb := fake.client()
					defer rdb.Close()
					o := *opts
					if layer == "Redis" {
						o.MemoryEntries = -1
					}
					cache := apikey.NewCache(rdb, newSecret(), &o)
					var seen apikey.Decision
					r := replica{apikey.New(w, w, &apikey.Options{
						Cache:   cache,
						Observe: func(_ context.Context, d apikey.Decision) { seen = d },
					}), cache}
					apiKey, _ := w.enrol(t, c.key, c.plan)
					read := time.Now()
					r.wantCode(t, apiKey, c.before)
					synctest.Wait()
					w.set(func() { w.err = errStore })
					if layer == "memory" {
						fake.set(func() { clear(fake.values) })
					}

					for _, age := range []time.Duration{10 * time.Second, 30 * time.Second, limit - 1} {
						time.Sleep(age - time.Since(read))
						r.wantCode(t, apiKey, c.during)
						if want := apikey.SourceStale; c.during == admitted && seen.Source != want {
							t.Errorf("at %v the source is %q, want %q", age, seen.Source, want)
						}
					}
					time.Sleep(time.Nanosecond)
					r.wantCode(t, apiKey, unavailable)
					uses := cache.Stats().StaleUses
					if c.during == admitted && uses < 3 || c.during != admitted && c.key != live && uses != 0 {
						t.Errorf("%d stale uses", uses)
					}

					w.set(func() { w.err = nil })
					time.Sleep(breakFor)
					r.wantCode(t, apiKey, c.before)
				})
			})
		}
	}
}

// TestStaleIfErrorEnds: facts that an announced change has overtaken, and a key
// or plan that has come to its own end, admit nobody, outage or not.
func TestStaleIfErrorEnds(t *testing.T) {
	for name, c := range map[string]func(w *memoryWorld, cache *apikey.Cache, h apikey.KeyHash, orgID string){
		"announced, key": func(_ *memoryWorld, cache *apikey.Cache, h apikey.KeyHash, _ string) {
			cache.Log().Announce(keyTopic(h), 20, instant())
		},
		"announced, plan": func(_ *memoryWorld, cache *apikey.Cache, _ apikey.KeyHash, org string) {
			cache.Log().Announce(feed.PlanTopic(org), 20, instant())
		},
		"announced, tier": func(_ *memoryWorld, cache *apikey.Cache, _ apikey.KeyHash, _ string) {
			cache.Log().Announce(feed.TierTopic(starter), 20, instant())
		},
		"announced, all keys": func(_ *memoryWorld, cache *apikey.Cache, _ apikey.KeyHash, _ string) {
			cache.Log().AnnounceAll(feed.Key, 20, instant())
		},
		"announced, all plans": func(_ *memoryWorld, cache *apikey.Cache, _ apikey.KeyHash, _ string) {
			cache.Log().AnnounceAll(feed.Plan, 20, instant())
		},
		"its own end": func(*memoryWorld, *apikey.Cache, apikey.KeyHash, string) { time.Sleep(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rdb := new(fakeRedis).client()
				defer rdb.Close()
				w := newMemoryWorld()
				apiKey, org := w.enrol(t, live, paid)
				h := apikey.HashKey(apiKey)
				plan := w.plans[org.ID]
				plan.EndsAt = time.Now().Add(time.Minute)
				w.plans[org.ID] = plan
				cache := apikey.NewCache(rdb, newSecret(), nil)
				r := replica{apikey.New(stamped(w.Key), stampedPlans(w.Plan), &apikey.Options{Cache: cache}), cache}
				r.wantCode(t, apiKey, admitted)
				w.set(func() { w.err = errStore })
				time.Sleep(20 * time.Second)
				r.wantCode(t, apiKey, admitted)
				c(w, cache, h, org.ID)
				r.wantCode(t, apiKey, unavailable)
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
		w := newMemoryWorld()
		r := newReplica(w, rdb, newSecret(), nil)
		unpaid, _ := w.enrol(t, live, pastDue)
		dead, _ := w.enrol(t, deactivated, paid)
		made, _ := w.enrol(t, unknown, paid)
		for range 10_000 { // ten seconds of it
			r.wantCode(t, unpaid, planExpired)
			r.wantCode(t, dead, invalid)
			r.wantCode(t, made, invalid)
			time.Sleep(time.Millisecond)
		}
		// The key of the unpaid one is good, and read but once in this time.
		if got := w.readCount(); got > 1+3*10 {
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
				w := newMemoryWorld()
				r := newReplica(w, rdb, newSecret(), nil)
				ask := func(k keyState, want string) time.Duration {
					apiKey, _ := w.enrol(t, k, paid)
					start := time.Now()
					r.wantCode(t, apiKey, want)
					return time.Since(start)
				}
				if took := ask(live, admitted); took > 100*time.Millisecond { // GETs for the key and the plan
					t.Errorf("answered after %v; a GET may take 50ms", took)
				}
				for range 4 {
					ask(deactivated, invalid)
				}
				time.Sleep(100 * time.Millisecond) // for the SETs
				for range 100 {
					if took := ask(live, admitted) + ask(unknown, invalid); took != 0 {
						t.Errorf("answered after %v, want at once", took)
					}
				}
				time.Sleep(100 * time.Millisecond)
				got := r.cache.Stats()
				if got.RedisErrors < 10 || got.RedisErrors > 20 || got.RedisSkipped < 300 || got.StoreErrors != 0 {
					t.Errorf("%+v, want 10 errors or little more, all else skipped, and no error of the store", got)
				}

				fake.set(func() { fake.fault = nil })
				time.Sleep(breakFor)
				ask(live, admitted)
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
	w := newMemoryWorld()
	apiKey, _ := w.enrol(t, live, paid)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // of the client's own limits, the first is 5 s
	defer cancel()
	r := newReplica(w, rdb, newSecret(), nil)
	if got := r.askContext(ctx, apiKey); got != admitted {
		t.Errorf("answered %q, want admitted", got)
	}
	waitFor(t, func() bool { return r.cache.Stats().RedisErrors+r.cache.Stats().RedisSkipped == 4 })
}

// TestDistantRedis: Redis is as far away as another region, and wants a password: it
// takes longer to connect than a request may wait. It is used all the same.
func TestDistantRedis(t *testing.T) {
	t.Parallel()
	server := testservers.StartRedis(t, "--requirepass", "p")
	address, proxy := testservers.ProxyRedis(t, server.URL)
	proxy.Delay(20 * time.Millisecond)
	opts, err := redis.ParseURL(address)
	if err != nil {
		t.Fatal(err)
	}
	opts.Password, opts.ContextTimeoutEnabled = "p", true
	rdb := redis.NewClient(opts)
	defer rdb.Close()
	w := newPostgresWorld(t)
	apiKey, _ := w.enrol(t, live, paid)
	r := newPostgresReplica(w, rdb, newSecret(), &apikey.CacheOptions{MemoryEntries: -1})
	waitFor(t, func() bool {
		r.wantCode(t, apiKey, admitted)
		return r.cache.Stats().RedisHits > 10
	})
	if err := r.cache.Stats().RedisErr; err != nil {
		t.Errorf("RedisErr is %v", err)
	}

	hopeless := newPostgresReplica(w, rdb, newSecret(), &apikey.CacheOptions{MemoryEntries: -1, RedisTimeout: 5 * time.Millisecond})
	hopeless.wantCode(t, apiKey, admitted)
	if err := hopeless.cache.Stats().RedisErr; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with less time than it takes RedisErr is %v", err)
	}
}

// lines is what was written, by whatever goroutine.
type lines struct {
	mu sync.Mutex
	bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(b)
}

// take returns what was written since the last take.
func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.String()
	l.Reset()
	return text
}

// TestLogger: it is told once when something is lost, and once when it is back.
func TestLogger(t *testing.T) {
	t.Parallel()
	w := newPostgresWorld(t)
	address, postgres := testservers.ProxyPostgres(t, w.pool.Config().ConnString())
	redisAddress, rdb := testservers.ProxyRedis(t, testservers.RedisURL(t))
	pool := testservers.Pool(t, address)
	var log lines
	cache := apikey.NewCache(testservers.RedisAt(t, redisAddress), newSecret(), &apikey.CacheOptions{
		MemoryEntries: -1, MaxStaleness: time.Second, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	watch(t, cache, pool)
	r := replica{apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache}), cache}
	apiKey, _ := w.enrol(t, live, paid)
	says := func(texts ...string) {
		t.Helper()
		var told string
		waitFor(t, func() bool {
			r.ask(apiKey)
			told += log.take()
			return !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(told, text) })
		})
		for range 50 { // and does not go on saying so
			r.ask(apiKey)
		}
		if told += log.take(); strings.Count(told, "\n") > 2*len(texts) {
			t.Errorf("it is told\n%s", told)
		}
	}
	says("changes are heard")
	postgres.Set(t, testservers.Reset)
	rdb.Set(t, testservers.Reset)
	says("changes are not heard", "Redis is not used", "a store is not asked")
	postgres.Set(t, testservers.Healthy)
	rdb.Set(t, testservers.Healthy)
	says("changes are heard", "Redis is used again", "a store is asked again")
}
