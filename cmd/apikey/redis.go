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

// probeName is written and read to check Redis. It begins like all names, since an ACL may
// allow no others.
const probeName = shared.Root + "doctor"

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
	// Not PING: an ACL may allow GET and SET only. Some of these are on other nodes.
	for i := range 8 {
		err := rdb.Get(ctx, fmt.Sprint(probeName, i)).Err()
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

// checkRedis does a SET and a GET, as a cache does.
func checkRedis(ctx context.Context, rdb redis.UniversalClient) finding {
	err := rdb.Set(ctx, probeName, "ok", time.Second).Err()
	var took time.Duration
	if err == nil {
		start := time.Now() // it is connected now
		err = rdb.Get(ctx, probeName).Err()
		took = time.Since(start).Round(10 * time.Microsecond)
	}
	switch {
	case err != nil:
		return finding{"Redis", stateFault, err.Error()}
	case took > shared.DefaultTimeout:
		return finding{"Redis", stateFault, fmt.Sprintf("a GET takes %v: caches wait for %v by default, so that they never use it: give them a larger RedisTimeout, or a Redis that is nearer", took, shared.DefaultTimeout)}
	case took > shared.DefaultTimeout/2:
		return finding{"Redis", stateWarning, fmt.Sprintf("a GET takes %v, and caches wait for %v by default", took, shared.DefaultTimeout)}
	}
	return finding{"Redis", stateOK, fmt.Sprintf("SET, and GET in %v", took)}
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
