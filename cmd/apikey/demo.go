package main

// The command demo: its flags, and its connections. The rest is package demo.

import (
	"context"
	"fmt"
	"net"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/cmd/apikey/demo"
)

func runDemo(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "demo")
	addr := f.String("addr", "localhost:8080", "`address` to listen on; localhost: for this machine only, with port 0: any free one")
	inMemory := f.Bool("in-memory", false, "keep keys and plans in memory, although PostgreSQL is installed")
	databaseURL := f.databaseURL("PostgreSQL `URL`; it is migrated, and gets rows of organisations called demo-... for as long as the demo runs; " +
		"empty: a temporary server if PostgreSQL is installed, else memory")
	redisURL := f.redisURL("Redis `URL`; empty: in this process")
	if err := f.parse(args); err != nil {
		return err
	}
	if *inMemory && f.given("database-url") {
		return f.misused("--in-memory and --database-url exclude each other")
	}
	// Both servers are asked here already, past the demo's links, so that an error names the
	// server.
	config := demo.Config{InMemory: *inMemory, Out: a.stdout}
	if *databaseURL != "" && !*inMemory {
		pool, err := openPostgres(ctx, *databaseURL)
		if err != nil {
			return err
		}
		config.Postgres = pool.Config()
		pool.Close()
	}
	if *redisURL != "" {
		rdb, err := openRedis(ctx, *redisURL, nil)
		if err != nil {
			return err
		}
		_ = rdb.Close()
		config.Redis = func(ctx context.Context, dial demo.Dialer) (redis.UniversalClient, error) {
			return openRedis(ctx, *redisURL, dial)
		}
	}
	var err error
	if config.Listener, err = net.Listen("tcp", *addr); err != nil {
		return fmt.Errorf("%w: choose another address with --addr, such as localhost:0", err)
	}
	return demo.Run(ctx, config)
}
