package systemtest

// Servers in the company of others, broken under load: Redis as a cluster and
// under a sentinel or far away, PostgreSQL restarted. Nobody is given a wrong answer.

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// A load asks replicas for keys, over and over.
type load struct {
	mu      sync.Mutex
	answers map[string]int
	wrong   map[string]int
	slowest time.Duration
	keys    []string
	allowed map[string][]string // answers, by key
	cancel  context.CancelFunc
	workers sync.WaitGroup
}

// startLoad begins to ask for good keys, which must be admitted, and for dead
// ones. Where outage is true, the dead may also be answered SERVICE_UNAVAILABLE.
func startLoad(t testing.TB, replicas []world.Replica, good, bad []string, outage bool) *load {
	t.Helper()
	l := &load{answers: map[string]int{}, wrong: map[string]int{}, allowed: map[string][]string{}}
	for _, key := range good {
		l.allowed[key] = []string{world.Admitted}
	}
	for _, key := range bad {
		l.allowed[key] = []string{world.Invalid}
		if outage {
			l.allowed[key] = append(l.allowed[key], world.Unavailable)
		}
	}
	l.keys = append(slices.Clone(good), bad...)
	for _, r := range replicas { // so that all are known when something breaks
		for _, key := range l.keys {
			l.ask(r, key)
		}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	l.cancel = cancel
	for _, r := range replicas {
		for range 4 {
			l.workers.Go(func() {
				for ctx.Err() == nil {
					l.ask(r, l.keys[rand.IntN(len(l.keys))])
					time.Sleep(500 * time.Microsecond)
				}
			})
		}
	}
	t.Cleanup(func() { l.stop(t) })
	return l
}

func (l *load) ask(r world.Replica, key string) {
	start := time.Now()
	answer := r.Ask(key)
	took := time.Since(start)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[answer]++
	l.slowest = max(l.slowest, took)
	if !slices.Contains(l.allowed[key], answer) {
		l.wrong[fmt.Sprintf("%q, want %q", answer, l.allowed[key])]++
	}
}

// stop ends the load and judges it.
func (l *load) stop(t testing.TB) {
	t.Helper()
	if l.cancel == nil {
		return
	}
	l.cancel()
	l.cancel = nil
	l.workers.Wait()
	t.Logf("answers %v, the slowest after %v", l.answers, l.slowest.Round(time.Millisecond))
	if len(l.wrong) > 0 {
		t.Errorf("wrong answers: %v", l.wrong)
	}
	if l.slowest > 3*time.Second { // the clients' own limits are longer
		t.Errorf("an answer took %v", l.slowest)
	}
}

// enrolMany makes n paying organisations with a key each, and returns the keys.
func enrolMany(t testing.TB, w world.World, n int, k world.KeyState) (keys []string) {
	t.Helper()
	for range n {
		key, _ := w.Enrol(t, k, world.Paid)
		keys = append(keys, key)
	}
	return keys
}

func sumStats(replicas []world.Replica) (sum apikey.CacheStats) {
	for _, r := range replicas {
		s := r.Cache.Stats()
		sum.RedisHits += s.RedisHits
		sum.RedisErrors += s.RedisErrors
		sum.StaleUses += s.StaleUses
		sum.StoreErrors += s.StoreErrors
	}
	return sum
}

// TestRedisCluster: one of three masters dies under load, and comes back. The
// replicas have no memory of their own, so that every request asks Redis.
func TestRedisCluster(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	nodes, addrs := testservers.StartRedisCluster(t, 3)
	w, secret := world.NewPostgres(t), world.NewSecret()
	var replicas []world.Replica
	for range 2 {
		rdb := redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs, ContextTimeoutEnabled: true})
		t.Cleanup(func() { _ = rdb.Close() })
		replicas = append(replicas, world.NewReplica(w, rdb, secret, world.NoMemory()))
	}
	l := startLoad(t, replicas, enrolMany(t, w, 40, world.Live), enrolMany(t, w, 5, world.Deactivated), false)
	hits := func() uint64 { return sumStats(replicas).RedisHits }
	grows := func() {
		before := hits()
		world.WaitFor(t, func() bool { return hits() > before+100 })
	}
	grows()
	nodes[1].Crash(t)
	world.WaitFor(t, func() bool { return sumStats(replicas).RedisErrors > 0 })
	grows() // the others are still of use
	nodes[1].Start(t)
	settled := sumStats(replicas).RedisErrors
	world.WaitFor(t, func() bool {
		time.Sleep(500 * time.Millisecond)
		before := settled
		settled = sumStats(replicas).RedisErrors
		return settled == before
	})
	l.stop(t)
}

// TestRedisSentinel: the master dies under load, and a sentinel makes its replica
// the master.
func TestRedisSentinel(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	master, masterAddr := testservers.StartRedisTCP(t)
	standby, _ := testservers.StartRedisTCP(t, "--replicaof", strings.ReplaceAll(masterAddr, ":", " "))
	sentinel := testservers.StartSentinel(t, masterAddr, 1)
	w, secret := world.NewPostgres(t), world.NewSecret()
	var replicas []world.Replica
	for range 2 {
		rdb := redis.NewFailoverClient(&redis.FailoverOptions{
			MasterName: "main", SentinelAddrs: []string{sentinel}, ContextTimeoutEnabled: true,
		})
		t.Cleanup(func() { _ = rdb.Close() })
		replicas = append(replicas, world.NewReplica(w, rdb, secret, world.NoMemory()))
	}
	l := startLoad(t, replicas, enrolMany(t, w, 40, world.Live), enrolMany(t, w, 5, world.Deactivated), false)
	world.WaitFor(t, func() bool { return sumStats(replicas).RedisHits > 100 })
	master.Crash(t)
	promoted := testservers.RedisAt(t, standby.URL)
	world.WaitFor(t, func() bool { return promoted.Do(t.Context(), "ROLE").Val().([]any)[0] == "master" })
	if err := promoted.FlushAll(t.Context()).Err(); err != nil { // as if nothing had reached it in time
		t.Fatal(err)
	}
	before := sumStats(replicas).RedisHits
	world.WaitFor(t, func() bool {
		return promoted.DBSize(t.Context()).Val() > 40 && sumStats(replicas).RedisHits > before+100
	})
	l.stop(t)
}

// TestPostgresRestart: PostgreSQL crashes under load, stays away for a while, and
// comes back.
func TestPostgresRestart(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	server := testservers.StartPostgres(t)
	pool := testservers.Pool(t, testservers.PostgresURLOn(t, server))
	w := world.NewPostgresOn(t, pool)
	rdb, secret := testservers.Redis(t), world.NewSecret()
	var replicas []world.Replica
	for range 2 {
		own := testservers.Pool(t, pool.Config().ConnString())
		replicas = append(replicas, world.NewWatchedReplica(t, own, rdb, secret, &apikey.CacheOptions{MaxStaleness: time.Second}))
	}
	good := enrolMany(t, w, 40, world.Live)
	l := startLoad(t, replicas, good, enrolMany(t, w, 5, world.Deactivated), true)
	world.WaitFor(t, func() bool { return replicas[0].Ask(good[0]) == world.Admitted })

	server.Crash(t)
	world.WaitFor(t, func() bool { return sumStats(replicas).StaleUses > 100 })
	server.Start(t)
	for _, r := range replicas {
		world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
		world.WaitFor(t, func() bool { return r.Ask("never-seen-before-by-anybody") == world.Invalid })
	}
	l.stop(t)
	world.WaitFor(t, func() bool { return pool.Ping(t.Context()) == nil })
	testservers.Exec(t, pool, `UPDATE api_keys SET active = false`)
	for _, r := range replicas {
		for _, key := range good {
			world.WaitFor(t, func() bool { return r.Ask(key) == world.Invalid })
		}
	}
}
