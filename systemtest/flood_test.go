package systemtest

// Floods of made-up keys: nothing grows, PostgreSQL is asked by few at a time,
// and the keys that are known do not notice.

import (
	"context"
	"crypto/rand"
	"flag"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

var floodKeys = flag.Int("flood.keys", testservers.Sized(5_000, 20_000), "made-up keys in TestFlood")

// A gauge counts the lookups under way in a store.
type gauge struct {
	apikey.KeyStore
	now, most atomic.Int64
}

func (g *gauge) Key(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
	now := g.now.Add(1)
	defer g.now.Add(-1)
	for most := g.most.Load(); now > most && !g.most.CompareAndSwap(most, now); {
		most = g.most.Load()
	}
	return g.KeyStore.Key(ctx, h)
}

// madeUp returns the nth made-up key: without our prefix, with it and a good
// checksum, with it and a bad one.
func madeUp(n int) string {
	switch n % 3 {
	case 0:
		return rand.Text() + rand.Text()
	case 1:
		return keyformat.New(keyformat.Live)
	}
	key := keyformat.New(keyformat.Live)
	for keyformat.Plausible(key) {
		key = key[:len(key)-1] + rand.Text()[:1]
	}
	return key
}

func TestFlood(t *testing.T) {
	const attackers, known = 16, 100
	w := world.NewPostgres(t)
	pool := testservers.Pool(t, w.Pool.Config().ConnString()+"&pool_max_conns=10")
	rdb := testservers.RedisAt(t, testservers.StartRedis(t).URL)
	secret := world.NewSecret()
	cache := apikey.NewCache(rdb, secret, nil)
	world.Watch(t, cache, pool)
	world.Ready(t, cache)
	store := &gauge{KeyStore: apikey.NewPostgresKeyStore(pool)}
	r := world.ReplicaOn(store, apikey.NewPostgresPlanStore(pool), cache)
	var good []string
	for range known {
		key, org := w.Enrol(t, world.Live, world.Paid)
		r.WantCode(t, key, world.Admitted)
		world.FillRedis(t, w, rdb, secret, key, org.ID)
		good = append(good, key)
	}

	// customer asks for known keys until done, and returns the p99 of how long that
	// took.
	customer := func(done <-chan struct{}) time.Duration {
		var took []time.Duration
		for i := 0; ; i++ {
			select {
			case <-done:
				slices.Sort(took)
				return took[len(took)*99/100].Round(time.Microsecond)
			case <-time.After(100 * time.Microsecond):
			}
			start := time.Now()
			r.WantCode(t, good[i%known], world.Admitted)
			took = append(took, time.Since(start))
		}
	}
	quiet := make(chan struct{})
	time.AfterFunc(time.Second, func() { close(quiet) })
	before := customer(quiet)

	heap := heapInUse()
	var sent, unanswered atomic.Int64
	var wg sync.WaitGroup
	for range attackers {
		wg.Go(func() {
			for n := sent.Add(1); n <= int64(*floodKeys); n = sent.Add(1) {
				switch answer := r.Ask(madeUp(int(n))); answer {
				case world.Invalid:
				case world.Unavailable: // it had to wait too long for its turn
					unanswered.Add(1)
				default:
					t.Errorf("a made-up key is answered %q", answer)
				}
			}
		})
	}
	over := make(chan struct{})
	go func() { wg.Wait(); close(over) }()
	start := time.Now()
	during := customer(over)
	took := time.Since(start)
	grown := heapInUse() - heap

	stats := cache.Stats()
	t.Logf("%d made-up keys in %v: %d lookups, %d at once at most, %d answered 503; heap grew by %d KiB, Redis holds %d records; p99 of a known key %v before, %v beside the flood",
		*floodKeys, took.Round(time.Millisecond), stats.StoreReads, store.most.Load(), unanswered.Load(), grown>>10, rdb.DBSize(t.Context()).Val(), before, during)
	if n := store.most.Load(); n > 16 {
		t.Errorf("%d lookups at once, want 16 at most", n)
	}
	if n := rdb.DBSize(t.Context()).Val(); n != 2*known {
		t.Errorf("Redis holds %d records, want %d: those of known keys", n, 2*known)
	}
	if grown > 4<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	if n := stats.StoreReads; n > uint64(2*known+*floodKeys*2/3+1) {
		t.Errorf("%d lookups: keys with a bad checksum were looked up", n)
	}
}

// heapInUse is what is left after garbage collection.
func heapInUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
