package systemtest

// A Redis that lets us do little, holds what is not ours, or has a user with few rights.

import (
	"context"
	"log/slog"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestNothingIsWritten: where Redis takes no SET, nothing is ever found, and all that can be
// watched says so: RedisErr at any time, RedisSkipped, and the logger.
func TestNothingIsWritten(t *testing.T) {
	for name, c := range map[string]struct {
		setting []any
		want    string
	}{
		"a user without SET": {[]any{"ACL", "SETUSER", "default", "-set"}, "NOPERM"},
		"full":               {[]any{"CONFIG", "SET", "maxmemory", "1"}, "OOM"},
		"read-only":          {[]any{"REPLICAOF", "127.0.0.1", "1"}, "READONLY"},
	} {
		t.Run(name, func(t *testing.T) {
			server := testservers.StartRedis(t)
			rdb := testservers.RedisAt(t, server.URL)
			world.MustNot(t, rdb.Do(t.Context(), c.setting...).Err())
			w := world.NewPostgres(t)
			var log lines
			r := world.NewPostgresReplica(w, rdb, world.NewSecret(), &apikey.CacheOptions{MemoryEntries: -1, Logger: slog.New(slog.NewTextHandler(&log, nil))})
			keys := enrolMany(t, w, 10, world.Live)
			says := func() bool {
				err := r.Cache.Stats().RedisErr
				return err != nil && strings.Contains(err.Error(), "writing: "+c.want)
			}
			var told string
			world.WaitFor(t, func() bool {
				for _, key := range keys {
					r.WantCode(t, key, world.Admitted)
				}
				told += log.take()
				return says() && r.Cache.Stats().RedisSkipped > 0 && strings.Contains(told, "Redis is not used for writing")
			})
			if strings.Contains(told, "reading") {
				t.Errorf("it is told\n%s", told)
			}
			skipped := r.Cache.Stats().RedisSkipped
			for i := range testservers.Sized(300, 1800) {
				r.WantCode(t, keys[i%len(keys)], world.Admitted)
				if !says() {
					t.Fatalf("after %d more lookups RedisErr is %v", i, r.Cache.Stats().RedisErr)
				}
			}
			if s := r.Cache.Stats(); s.RedisHits > 0 || s.RedisSkipped == skipped {
				t.Errorf("%+v, want no hits, and RedisSkipped to grow", s)
			}
		})
	}
}

// TestTooLong: whoever can write to Redis cannot fill our memory.
func TestTooLong(t *testing.T) {
	const length = 200 << 20
	rdb := testservers.RedisAt(t, testservers.StartRedis(t).URL)
	w := world.NewPostgres(t)
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	reader := testservers.RedisAt(t, rdb.Options().Network+"://"+rdb.Options().Addr)
	reader.AddHook(world.NoSet{})
	name, _ := world.RedisNames(apikey.HashKey(apiKey), "")
	world.MustNot(t, rdb.SetRange(t.Context(), name, length-1, "x").Err())
	r := world.NewPostgresReplica(w, reader, world.NewSecret(), world.NoMemory())
	r.WantCode(t, apiKey, world.Admitted)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rejected := r.Cache.Stats().RedisRejected
	const asks = 8
	for range asks {
		r.WantCode(t, apiKey, world.Admitted)
	}
	runtime.ReadMemStats(&after)
	taken := (after.TotalAlloc - before.TotalAlloc) >> 20
	t.Logf("%d requests took %d MiB", asks, taken)
	if taken > 50 {
		t.Errorf("%d requests took %d MiB", asks, taken)
	}
	world.WaitFor(t, func() bool { // on a busy machine a GET may take too long
		r.WantCode(t, apiKey, world.Admitted)
		return r.Cache.Stats().RedisRejected > rejected
	})
}

// TestRedisRights: the rights that the documents name are enough, for each kind of Redis.
func TestRedisRights(t *testing.T) {
	testservers.Long(t)
	text := document(t, "docs/operations.md")
	rights := map[string][]any{}
	for _, found := range regexp.MustCompile("(?m)^- (.*): `(~[^`]*)`$").FindAllStringSubmatch(text, -1) {
		for _, right := range strings.Fields(found[2]) {
			rights[found[1]] = append(rights[found[1]], right)
		}
	}
	cluster := func(readOnly bool) func(addrs []string) redis.UniversalClient {
		return func(addrs []string) redis.UniversalClient {
			return redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs, Username: "cache", Password: "p", ContextTimeoutEnabled: true, ReadOnly: readOnly})
		}
	}
	kinds := map[string]func(addrs []string) redis.UniversalClient{
		"one server, or those behind Sentinel": func(addrs []string) redis.UniversalClient {
			return redis.NewClient(&redis.Options{Addr: addrs[0], Username: "cache", Password: "p", ContextTimeoutEnabled: true})
		},
		"Cluster":                               cluster(false),
		"Cluster, if the client has `ReadOnly`": cluster(true),
		"Ring": func(addrs []string) redis.UniversalClient {
			return redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": addrs[0]}, Username: "cache", Password: "p", ContextTimeoutEnabled: true,
				HeartbeatFrequency: 10 * time.Millisecond})
		},
	}
	for kind, client := range kinds {
		t.Run(kind, func(t *testing.T) {
			allowed := rights[kind]
			if len(allowed) == 0 {
				t.Fatalf("the documents name the rights of %v", rights)
			}
			var nodes []*testservers.Server
			var addrs []string
			if strings.HasPrefix(kind, "Cluster") {
				nodes, addrs = testservers.StartRedisCluster(t, 3)
			} else {
				node, addr := testservers.StartRedisTCP(t)
				nodes, addrs = append(nodes, node), append(addrs, addr)
			}
			for _, node := range nodes {
				args := append([]any{"ACL", "SETUSER", "cache", "on", ">p", "-@all"}, allowed...)
				world.MustNot(t, testservers.RedisAt(t, node.URL).Do(context.Background(), args...).Err())
			}
			rdb := client(addrs)
			defer rdb.Close()
			w := world.NewPostgres(t)
			r := world.NewPostgresReplica(w, rdb, world.NewSecret(), world.NoMemory())
			keys := enrolMany(t, w, 20, world.Live)
			world.WaitFor(t, func() bool {
				before, asked := r.Cache.Stats(), 0
				for start := time.Now(); time.Since(start) < 300*time.Millisecond; asked++ { // some heartbeats of a Ring
					r.WantCode(t, keys[asked%len(keys)], world.Admitted)
				}
				s := r.Cache.Stats()
				return s.RedisHits == before.RedisHits+uint64(asked) && s.RedisErr == nil
			})
		})
	}
}
