package main

// Connecting to Redis: a server, a cluster, or a primary behind Sentinel.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"

	"github.com/trackpilots/apikey/cmd/apikey/demo"
	"github.com/trackpilots/apikey/internal/shared"
)

// probeNames are written and read to check Redis. They begin like all names, since an ACL may
// allow no others. Of a cluster they are on several nodes.
var probeNames = func() (names []string) {
	for i := range 8 {
		names = append(names, fmt.Sprint(shared.Root, "doctor", i))
	}
	return names
}()

// openRedis connects to redisURL, which may be that of a node of a Redis Cluster, or of a
// Sentinel if it has a master_name. dial opens its connections; nil: as the client does.
func openRedis(ctx context.Context, redisURL string, dial demo.Dialer) (redis.UniversalClient, error) {
	logging.Disable() // what matters comes back as an error
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	rdb, err := newRedis(redisURL, dial)
	if err != nil {
		// The error may quote the password.
		return nil, errors.New("the Redis URL cannot be parsed: use redis://user:password@host:6379/0, or rediss:// for TLS, and write %40 for @, %2F for / and %25 for % in the password")
	}
	// Not PING: an ACL may allow GETRANGE and SET only. Some of these are on other nodes.
	for _, name := range probeNames {
		err := rdb.GetRange(ctx, name, 0, 1).Err()
		switch {
		case err == nil, errors.Is(err, redis.Nil):
		case strings.HasPrefix(err.Error(), "MOVED "):
			_ = rdb.Close()
			opts, err := redis.ParseClusterURL(redisURL)
			if err != nil {
				return nil, errors.New("the Redis URL is of a cluster, and cannot be parsed as such")
			}
			opts.ContextTimeoutEnabled, opts.Dialer = true, through(dial, opts.TLSConfig)
			return redis.NewClusterClient(opts), nil
		default:
			_ = rdb.Close()
			return nil, fmt.Errorf("no answer from Redis: %w", err)
		}
	}
	return rdb, nil
}

func newRedis(redisURL string, dial demo.Dialer) (redis.UniversalClient, error) {
	if u, err := url.Parse(redisURL); err == nil && u.Query().Has("master_name") {
		opts, err := redis.ParseFailoverURL(redisURL)
		if err != nil {
			return nil, err
		}
		opts.ContextTimeoutEnabled, opts.Dialer = true, through(dial, opts.TLSConfig)
		return redis.NewFailoverClient(opts), nil
	}
	opts, err := redis.ParseURL(redisURL)
	if err != nil {
		return nil, err
	}
	opts.ContextTimeoutEnabled, opts.Dialer = true, through(dial, opts.TLSConfig)
	return redis.NewClient(opts), nil
}

// through returns dial for connections that TLS may protect; nil for nil. A client leaves TLS
// to a dialer that is not its own.
func through(dial demo.Dialer, config *tls.Config) demo.Dialer {
	if dial == nil || config == nil {
		return dial
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return tls.Client(conn, config), nil
	}
}

// checkRedis does a SET and GETs, as a cache with this RedisTimeout does, on several nodes.
func checkRedis(ctx context.Context, rdb redis.UniversalClient, timeout time.Duration) finding {
	var slowest time.Duration
	for _, name := range probeNames {
		took, err := checkProbe(ctx, rdb, name)
		if err != nil {
			return finding{"Redis", stateFault, err.Error()}
		}
		slowest = max(slowest, took)
	}
	took := slowest.Round(10 * time.Microsecond)
	switch {
	case took > timeout:
		return finding{"Redis", stateFault, fmt.Sprintf("a GET takes %v, and caches wait for %v (RedisTimeout): they never use it; give them a larger RedisTimeout, or a Redis that is nearer", took, timeout)}
	case took > timeout/2:
		return finding{"Redis", stateWarning, fmt.Sprintf("a GET takes %v, and caches wait for %v (RedisTimeout): they use it, but under load not for lookups that wait for others", took, timeout)}
	}
	return finding{"Redis", stateOK, fmt.Sprintf("SET, and GET in %v: caches use it with a RedisTimeout of %v", took, timeout)}
}

// checkProbe returns how long it takes to read a name: the shortest of some times, after one
// that may have had to connect.
func checkProbe(ctx context.Context, rdb redis.UniversalClient, name string) (shortest time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := rdb.Set(ctx, name, "ok", time.Second).Err(); err != nil {
		return 0, err
	}
	for i := range 4 {
		start := time.Now()
		pipe := rdb.Pipeline() // which may have connections of its own
		pipe.GetRange(ctx, name, 0, shared.MaxRecord-1)
		if _, err := pipe.Exec(ctx); err != nil {
			return 0, err
		}
		if took := time.Since(start); i == 1 || i > 0 && took < shortest {
			shortest = took
		}
	}
	return shortest, nil
}

func checkRedisMemory(ctx context.Context, rdb redis.UniversalClient) finding {
	const check = "Redis memory"
	settings, err := rdb.ConfigGet(ctx, "maxmemory*").Result()
	switch {
	case err != nil:
		return finding{check, stateWarning, "its settings cannot be read: " + err.Error()}
	case settings["maxmemory"] == "0":
		return finding{check, stateOK, "without a limit"}
	case settings["maxmemory-policy"] == "noeviction":
		return finding{check, stateWarning, "maxmemory-policy is noeviction: when it is full, nothing new is cached; set allkeys-lru or volatile-ttl"}
	}
	return finding{check, stateOK, "maxmemory-policy is " + settings["maxmemory-policy"]}
}
