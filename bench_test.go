package apikey_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// discard is a ResponseWriter that costs next to nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header             { return d.header }
func (discard) Write(b []byte) (int, error)       { return len(b), nil }
func (discard) WriteString(s string) (int, error) { return len(s), nil }
func (discard) WriteHeader(int)                   {}

func withKey(authorization string) *http.Request {
	r := httptest.NewRequest("GET", "/v1/things", nil)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return r
}

// kept holds what a handler is given, as a real one would.
var kept atomic.Pointer[http.Request]

func keep(_ http.ResponseWriter, r *http.Request) { kept.Store(r) }

// serve runs h on one request over and over, on one core and on all.
func serve(b *testing.B, h http.Handler, r *http.Request) {
	b.Helper()
	b.ReportAllocs()
	w := discard{http.Header{}}
	for b.Loop() {
		h.ServeHTTP(w, r)
	}
}

func serveParallel(b *testing.B, h http.Handler, r *http.Request) {
	b.Helper()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		w := discard{http.Header{}}
		for pb.Next() {
			h.ServeHTTP(w, r)
		}
	})
}

// BenchmarkAccept is the way of a good key, by where its facts are found. The
// floor is what any middleware that knows its keys has to do: hash, look up in a
// map, and pass on a request with a context of its own.
func BenchmarkAccept(b *testing.B) {
	fleet := world.NewFleet(b, 1, nil)
	apiKey, _ := fleet.Enrol(b, world.Live, world.Paid)
	r := withKey("Bearer " + apiKey)
	next := http.HandlerFunc(keep)

	orgs := map[[32]byte]*apikey.Org{sha256.Sum256([]byte(apiKey)): {ID: "org_1"}}
	type key struct{}
	floor := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		org := orgs[sha256.Sum256([]byte(r.Header.Get("Authorization")[len("Bearer "):]))]
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), key{}, org)))
	})
	memory := fleet.Replicas[0].Handler(next)
	memory.ServeHTTP(discard{http.Header{}}, r)
	time.Sleep(time.Second) // from then on the feed has to vouch for what is known

	noMemory := func(rdb *redis.Client) http.Handler {
		cache := apikey.NewCache(rdb, world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Hour, MemoryEntries: -1})
		return apikey.New(fleet.PostgresKeyStore, fleet.PostgresPlanStore, &apikey.Options{Cache: cache}).Handler(next)
	}
	noSets := testservers.Redis(b)
	noSets.AddHook(world.NoSet{})
	get := func(w http.ResponseWriter, r *http.Request) { // what a record in Redis costs at least
		if err := fleet.Redis.Get(r.Context(), "a name of some length, as those of records have it").Err(); err != nil {
			b.Fatal(err)
		}
		next.ServeHTTP(w, r)
	}
	fleet.Redis.Set(b.Context(), "a name of some length, as those of records have it", make([]byte, 200), time.Hour)

	b.Run("floor", func(b *testing.B) { serve(b, floor, r) })
	b.Run("memory", func(b *testing.B) { serve(b, memory, r) })
	b.Run("floor, parallel", func(b *testing.B) { serveParallel(b, floor, r) })
	b.Run("memory, parallel", func(b *testing.B) { serveParallel(b, memory, r) })
	b.Run("Redis, one GET by hand", func(b *testing.B) { serve(b, http.HandlerFunc(get), r) })
	b.Run("Redis", func(b *testing.B) { serve(b, noMemory(fleet.Redis), r) })
	b.Run("PostgreSQL, no cache", func(b *testing.B) { serve(b, apikey.New(fleet, fleet, nil).Handler(next), r) })
	b.Run("cold", func(b *testing.B) { serve(b, noMemory(noSets), r) }) // in neither memory nor Redis
	if stats := fleet.Replicas[0].Cache.Stats(); stats.StoreReads != 1 {
		b.Errorf("the memory was not hit: %+v", stats)
	}
}

// BenchmarkAnnouncements is the way of 5,000 good keys in memory while other keys and
// plans change, so many times a second.
func BenchmarkAnnouncements(b *testing.B) {
	const keys = 5000
	fleet := world.NewFleet(b, 1, nil)
	testservers.Exec(b, fleet.Pool, `INSERT INTO organisations SELECT 'org ' || i FROM generate_series(1, $1::int) i`, keys)
	testservers.Exec(b, fleet.Pool, `INSERT INTO org_plans (org_id, plan, status) SELECT 'org ' || i, 'starter', 'active' FROM generate_series(1, $1::int) i`, keys)
	testservers.Exec(b, fleet.Pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'org ' || i, sha256(('a-key-issued-elsewhere-' || i)::bytea) FROM generate_series(1, $1::int) i`, keys)
	h := fleet.Replicas[0].Handler(http.HandlerFunc(keep))
	var requests []*http.Request
	for i := range keys {
		requests = append(requests, withKey(fmt.Sprint("Bearer a-key-issued-elsewhere-", i+1)))
		h.ServeHTTP(discard{http.Header{}}, requests[i])
	}
	time.Sleep(time.Second) // from then on the feed has to vouch for what is known
	log := fleet.Replicas[0].Cache.Log()
	for _, rate := range []int{0, 100, 1000, 10_000} {
		b.Run(fmt.Sprint(rate, " a second"), func(b *testing.B) {
			done := make(chan struct{})
			var announcing sync.WaitGroup
			announcing.Go(func() { // ticks at all rates, since that costs too
				tick := time.NewTicker(time.Millisecond)
				defer tick.Stop()
				start, sent := time.Now(), 0
				for {
					select {
					case <-done:
						return
					case <-tick.C:
					}
					for ; sent < int(time.Since(start).Seconds()*float64(rate)); sent += 2 {
						log.Announce(feed.KeyTopic(rand.Uint64()), 1<<60, world.Instant())
						log.Announce(feed.PlanTopic(fmt.Sprint("another ", sent)), 1<<60, world.Instant())
					}
				}
			})
			w := discard{http.Header{}}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				h.ServeHTTP(w, requests[i%keys])
			}
			close(done)
			announcing.Wait()
		})
	}
	if stats := fleet.Replicas[0].Cache.Stats(); stats.StoreReads != keys {
		b.Errorf("the memory was not hit: %+v", stats)
	}
}

// BenchmarkReject is what refusals cost.
func BenchmarkReject(b *testing.B) {
	w := world.NewMemory()
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	unpaid, _ := w.Enrol(b, world.Live, world.PastDue)
	for name, authorization := range map[string]string{
		"no header":      "",
		"other scheme":   "Basic dXNlcjpwYXNz",
		"malformed":      "Bearer not a key",
		"wrong checksum": "Bearer tpk_live_00000000000000000000000000000000000000000002nd1uY",
		"absent":         "Bearer " + keyformat.New(keyformat.Live),
		"plan expired":   "Bearer " + unpaid,
	} {
		b.Run(name, func(b *testing.B) {
			h := world.NewReplica(w, rdb, world.NewSecret(), nil).Handler(http.HandlerFunc(keep))
			r := withKey(authorization)
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(discard{http.Header{}}, r)
			}
		})
	}
}

// TestAllocations: what a request may allocate. A known key costs the context and
// the request that carries it; a refusal costs its headers.
func TestAllocations(t *testing.T) {
	f := world.NewFleet(t, 1, nil)
	good, _ := f.Enrol(t, world.Live, world.Paid)
	bad, _ := f.Enrol(t, world.Deactivated, world.Paid)
	unpaid, _ := f.Enrol(t, world.Live, world.PastDue)
	h := f.Replicas[0].Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	for name, c := range map[string]struct {
		authorization string
		budget        float64
	}{
		"memory hit":     {"Bearer " + good, 2},
		"no header":      {"", 12},
		"malformed":      {"Bearer not a key", 13},
		"wrong checksum": {"Bearer tpk_live_00000000000000000000000000000000000000000002nd1uY", 13},
		"absent":         {"Bearer " + keyformat.New(keyformat.Live), 13},
		"deactivated":    {"Bearer " + bad, 13},
		"plan expired":   {"Bearer " + unpaid, 12},
	} {
		t.Run(name, func(t *testing.T) {
			r := withKey(c.authorization)
			w := discard{http.Header{}}
			if n := testing.AllocsPerRun(1000, func() { clear(w.header); h.ServeHTTP(w, r) }); n > c.budget {
				t.Errorf("%v allocations a request, want %v at most", n, c.budget)
			}
		})
	}
}
