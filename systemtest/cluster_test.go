package systemtest

// A Redis of several nodes, of which one is of no use.

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// quantile returns the time that a share of the asks took at most.
func quantile(took []time.Duration, share float64) time.Duration {
	slices.Sort(took)
	return took[int(share*float64(len(took)-1))].Round(10 * time.Microsecond)
}

// TestFrozenShard: one of three nodes of a cluster, or of a ring, stops. The records of the
// others are of use as before, and an ask for one of its own waits in vain now and then only.
func TestFrozenShard(t *testing.T) {
	testservers.Long(t)
	for _, kind := range []string{"cluster", "ring"} {
		t.Run(kind, func(t *testing.T) {
			var nodes []*testservers.Server
			var addrs []string
			if kind == "cluster" {
				nodes, addrs = testservers.StartRedisCluster(t, 3)
			} else {
				for range 3 {
					node, addr := testservers.StartRedisTCP(t)
					nodes, addrs = append(nodes, node), append(addrs, addr)
				}
			}
			var rdb redis.UniversalClient
			var at func(name string) string // the address of its node
			if kind == "cluster" {
				cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs, ContextTimeoutEnabled: true})
				at = func(name string) string {
					node, err := cluster.MasterForKey(context.Background(), name)
					world.MustNot(t, err)
					return node.Options().Addr
				}
				rdb = cluster
			} else {
				shards := map[string]string{"a": addrs[0], "b": addrs[1], "c": addrs[2]}
				ring := redis.NewRing(&redis.RingOptions{Addrs: shards, ContextTimeoutEnabled: true, HeartbeatFrequency: time.Hour})
				at = func(name string) string {
					node, err := ring.GetShardClientForKey(name)
					world.MustNot(t, err)
					return node.Options().Addr
				}
				rdb = ring
			}
			defer rdb.Close()
			w := world.NewPostgres(t)
			var log lines
			r := world.NewPostgresReplica(w, rdb, world.NewSecret(), &apikey.CacheOptions{MemoryEntries: -1, Logger: slog.New(slog.NewTextHandler(&log, nil))})
			keys := enrolMany(t, w, 60, world.Live)
			var frozen, others []string
			for _, key := range keys {
				name, _ := world.RedisNames(apikey.HashKey(key), "")
				if at(name) == addrs[1] {
					frozen = append(frozen, key)
				} else {
					others = append(others, key)
				}
			}
			// ask asks for all keys, many at a time, for a while.
			ask := func(lasts time.Duration) (hits, lookups uint64, ofFrozen, ofOthers []time.Duration) {
				type result struct {
					key  string
					took time.Duration
				}
				results := make(chan []result)
				before := r.Cache.Stats()
				for worker := range 8 {
					go func() {
						var all []result
						for start, i := time.Now(), worker*len(keys)/8; time.Since(start) < lasts; i++ {
							key, asked := keys[i%len(keys)], time.Now()
							if code := r.Ask(key); code != world.Admitted {
								t.Errorf("answered %q", code)
							}
							all = append(all, result{key, time.Since(asked)})
							time.Sleep(time.Millisecond)
						}
						results <- all
					}()
				}
				for range 8 {
					for _, one := range <-results {
						if slices.Contains(frozen, one.key) {
							ofFrozen = append(ofFrozen, one.took)
						} else {
							ofOthers = append(ofOthers, one.took)
						}
					}
				}
				after := r.Cache.Stats() // two who ask for a key at once share a lookup
				hits = after.RedisHits - before.RedisHits
				return hits, hits + after.StoreReads - before.StoreReads, ofFrozen, ofOthers
			}
			report := func(when string, hits, lookups uint64, ofFrozen, ofOthers []time.Duration) {
				t.Logf("%s, %d of %d keys on it: %d hits of %d lookups; p99 of the shard %v, of the others %v", when, len(frozen), len(keys), hits, lookups, quantile(ofFrozen, 0.99), quantile(ofOthers, 0.99))
			}
			world.WaitFor(t, func() bool {
				hits, lookups, a, b := ask(time.Second)
				report("before", hits, lookups, a, b)
				return hits > lookups*9/10
			})
			nodes[1].Freeze(t)
			t.Cleanup(func() { nodes[1].Thaw(t) })
			share := uint64(len(others)*100/len(keys)) * 9 / 10
			world.WaitFor(t, func() bool {
				hits, lookups, a, b := ask(4 * time.Second)
				report("frozen", hits, lookups, a, b)
				if hits < lookups*share/100 {
					return false
				}
				slow := 0
				for _, took := range a {
					if took > 40*time.Millisecond {
						slow++
					}
				}
				return slow < len(a)/4 && quantile(b, 0.9) < 40*time.Millisecond
			})
			if err := r.Cache.Stats().RedisErr; err == nil || !strings.Contains(err.Error(), addrs[1]) {
				t.Errorf("RedisErr is %v, want it to name the node", err)
			}
			world.WaitFor(t, func() bool { // the alert that the documents name
				before := r.Cache.Stats().RedisSkipped
				_, _, _, _ = ask(100 * time.Millisecond)
				return r.Cache.Stats().RedisSkipped > before
			})
			if told := log.take(); !strings.Contains(told, "Redis is not used for reading") || !strings.Contains(told, addrs[1]) ||
				strings.Contains(told, addrs[0]) || strings.Contains(told, addrs[2]) {
				t.Errorf("it is told\n%s", told)
			}
			nodes[1].Thaw(t)
			world.WaitFor(t, func() bool {
				hits, lookups, _, _ := ask(time.Second)
				return hits > lookups*9/10 && r.Cache.Stats().RedisErr == nil
			})
		})
	}
}
