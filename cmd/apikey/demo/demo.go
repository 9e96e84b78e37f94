// Package demo is the demonstration of the command: an API behind three replicas of a
// service, and a page on which one changes keys and plans, breaks servers, and sees what
// customers see.
//
// The replicas share one store (store.go) and one Redis, which they reach through links that
// can be broken (links.go). Each is asked for the chosen key many times a second
// (replica.go). page.go serves the page and what its buttons do.
package demo

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
)

// A Dialer opens the connections of a client.
type Dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// A Config is what the demo runs on.
type Config struct {
	// Listener takes the requests. Run closes it.
	Listener net.Listener

	// Postgres is a database that is migrated and gets rows of organisations called
	// demo-... for as long as the demo runs. nil: a temporary server, or else memory.
	Postgres *pgxpool.Config

	// InMemory keeps keys and plans in memory, even if there is a PostgreSQL.
	InMemory bool

	// Redis opens a client whose connections Dialer opens. nil: a Redis in this process.
	Redis func(ctx context.Context, dial Dialer) (redis.UniversalClient, error)

	// Out is told how to use the demo.
	Out io.Writer
}

// A demo is a running demonstration.
type demo struct {
	config   Config
	setting  setting
	store    store
	links    *links
	replicas []*replica
	outage   http.Handler // an API whose store is always away

	running  context.Context // of the replicas: to the end of the last request
	changing sync.Mutex      // held while something is changed
	hurry    atomic.Bool     // ask the replicas without a pause

	mu      sync.Mutex
	rows    []*row
	chosen  *row
	changes []*change // the latest first
	made    int       // all changes so far
	known   facts     // as read from the store, past all links and caches
}

// A setting is what the page says that it runs on.
type setting struct {
	Listening    string        `json:"listening"`
	Loopback     bool          `json:"loopback"`
	Store        string        `json:"store"`
	Simulated    []string      `json:"simulated"` // what is not real
	RealFeed     bool          `json:"realFeed"`
	Psql         string        `json:"psql"` // a command that connects to the store; "" if there is none
	Redis        string        `json:"redis"`
	MaxStaleness time.Duration `json:"maxStaleness"`
}

const replicaNames = "ABC"

// Run serves the demo until ctx ends.
func Run(ctx context.Context, config Config) (err error) {
	d := &demo{config: config, links: newLinks()}
	defer d.links.close()
	defer config.Listener.Close() // the server closes it, too
	addr := config.Listener.Addr().(*net.TCPAddr)
	d.setting.Listening, d.setting.Loopback = addr.String(), addr.IP.IsLoopback()

	d.rows = exampleRows()
	d.chosen = d.rows[0]
	if d.store, err = openStore(ctx, config, d.rows, &d.setting); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.store.close()) }()
	if err := d.refresh(ctx); err != nil {
		return err
	}
	openRedis, closeRedis, err := d.openRedis()
	if err != nil {
		return err
	}
	defer closeRedis()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails

	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	d.running = running
	defer stop()
	for i := range replicaNames {
		rdb, err := openRedis(ctx)
		if err != nil {
			return err
		}
		defer rdb.Close()
		r := &replica{demo: d, index: i, rdb: rdb, secret: secret}
		if err := r.start(running); err != nil {
			return err
		}
		defer r.stop()
		d.replicas = append(d.replicas, r)
	}
	var background sync.WaitGroup
	defer background.Wait() // before what it uses is closed
	defer stop()
	for _, r := range d.replicas {
		background.Go(func() { r.probe(running) })
	}
	background.Go(func() { d.keepRefreshing(running) })

	away := apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) {
		return apikey.Key{}, errors.New("the demo keeps this store away")
	})
	noPlans := apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) { return apikey.Plan{}, apikey.ErrNotFound })
	d.outage = apikey.New(away, noPlans, nil).Handler(http.HandlerFunc(whoami))
	server := &http.Server{
		Handler: d.handler(), ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return running },
	}
	d.print()
	return serve(ctx, server, config.Listener, stop)
}

// serve runs server until ctx ends, and lets running requests finish. Streams end by stop.
func serve(ctx context.Context, server *http.Server, listener net.Listener, stop func()) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	server.RegisterOnShutdown(stop)
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		return fmt.Errorf("requests were still running after 10 seconds: %w", err)
	}
	return nil
}

// openRedis returns a function that opens a client for a replica.
func (d *demo) openRedis() (open func(context.Context) (redis.UniversalClient, error), shut func(), err error) {
	if d.config.Redis != nil {
		d.setting.Redis = "is a server"
		return func(ctx context.Context) (redis.UniversalClient, error) {
			return d.config.Redis(ctx, d.links.redis.dial)
		}, func() {}, nil
	}
	server, err := miniredis.Run()
	if err != nil {
		return nil, nil, err
	}
	d.setting.Redis = "runs in this process"
	d.setting.Simulated = append(d.setting.Simulated, "Redis: it runs in this process (miniredis). --redis-url uses a server.")
	open = func(context.Context) (redis.UniversalClient, error) {
		return redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true, Dialer: d.links.redis.dial, MaxRetries: -1}), nil
	}
	return open, server.Close, nil
}

// whoami answers with the organisation of the request.
func whoami(w http.ResponseWriter, r *http.Request) {
	org, _ := apikey.OrgFromContext(r.Context())
	writeJSON(w, map[string]any{
		"success": true,
		"data":    map[string]string{"orgId": org.ID, "keyId": org.KeyID, "plan": org.Plan.Name},
	})
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(v)
}
