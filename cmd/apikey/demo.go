package main

// The demo: a server that runs the main job, with an organisation for each state
// that the contract with customers knows, and a curl line for each.

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
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/migrations"
)

func demo(ctx context.Context, a *app, args []string) (err error) {
	f := newFlags(a, "demo")
	addr := f.String("addr", ":8080", "`address` to listen on")
	databaseURL := f.databaseURL("PostgreSQL `URL`; it is migrated, and gets rows of organisations called demo-... for as long as the demo runs; " +
		"empty: keys and plans in memory")
	redisURL := f.redisURL("Redis `URL`; empty: in this process")
	if err := f.parse(args); err != nil {
		return err
	}

	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	defer listener.Close() // the server closes it too

	rdb, closeRedis, err := openDemoRedis(ctx, *redisURL)
	if err != nil {
		return err
	}
	defer closeRedis()

	examples := demoExamples()
	stores, err := openStores(ctx, *databaseURL, examples)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stores.close()) }()

	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	cache := apikey.NewCache(rdb, secret, nil)
	if stores.pool != nil { // the stores in memory never change
		ctx, stop := context.WithCancel(context.WithoutCancel(ctx)) // to the end of the last request
		var watch sync.WaitGroup
		watch.Go(func() { _ = cache.Watch(ctx, stores.pool) }) // fails only on misuse
		defer watch.Wait()
		defer stop()
	}
	auth := apikey.New(stores.keys, stores.plans, &apikey.Options{Cache: cache})

	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/whoami", whoami)
	server := &http.Server{Handler: auth.Handler(mux), ReadHeaderTimeout: 10 * time.Second}

	printExamples(a.stdout, listener.Addr().(*net.TCPAddr).Port, examples)
	return serve(ctx, server, listener)
}

// whoami answers with the organisation that the request belongs to.
func whoami(w http.ResponseWriter, r *http.Request) {
	org, _ := apikey.OrgFromContext(r.Context())
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"success": true,
		"data":    map[string]string{"orgId": org.ID, "keyId": org.KeyID, "plan": org.Plan.Name},
	})
}

// serve runs server until ctx ends, and lets the requests under way finish.
func serve(ctx context.Context, server *http.Server, listener net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		return fmt.Errorf("requests were still running after 10 seconds: %w", err)
	}
	return nil
}

// An example is a request that shows one state, with what a store needs to know
// for it.
type example struct {
	about  string
	header string // the Authorization value; "": none
	want   string // the code, or "200"

	apiKey string // "" if the store knows nothing of it
	key    apikey.Key
	plan   *apikey.Plan
}

const (
	demoStarter = "demo-starter"
	demoBasic   = "demo-basic"
)

func demoExamples() []example {
	day := 24 * time.Hour
	stored := func(about, want, orgID string, plan *apikey.Plan) example {
		apiKey := keyformat.New(keyformat.Test)
		return example{
			about: about, want: want, header: "Bearer " + apiKey, apiKey: apiKey,
			key: apikey.Key{OrgID: "demo-" + orgID, Active: true}, plan: plan,
		}
	}
	starter := func(status apikey.PlanStatus) *apikey.Plan {
		return &apikey.Plan{Name: demoStarter, Status: status, APIAccess: true}
	}
	basic := &apikey.Plan{Name: demoBasic, Status: apikey.PlanActive}
	paid := starter(apikey.PlanActive)
	ended := starter(apikey.PlanActive)
	ended.EndsAt = time.Now().Add(-day)
	deactivated := stored("a deactivated key", "INVALID_API_KEY", "deactivated", paid)
	deactivated.key.Active = false
	expired := stored("a key past its expiry", "INVALID_API_KEY", "key-expired", paid)
	expired.key.ExpiresAt = time.Now().Add(-day)
	return []example{
		stored("a live key of a paying organisation", "200", "paying", paid),

		{about: "no Authorization header", want: "AUTHORIZATION_HEADER_MISSING"},
		{about: "another scheme than Bearer", want: "INVALID_API_KEY_SCHEMA", header: "Token " + keyformat.New(keyformat.Test)},
		{about: "no key after Bearer", want: "API_KEY_MISSING", header: "Bearer "},
		{about: "a key that was never valid, or has been deleted", want: "INVALID_API_KEY", header: "Bearer " + keyformat.New(keyformat.Test)},
		deactivated,
		expired,

		stored("the subscription has expired", "PLAN_EXPIRED", "expired", starter(apikey.PlanExpired)),
		stored("the subscription has ended and was not renewed", "PLAN_EXPIRED", "ended", ended),
		stored("the Free (Basic) plan, or a downgrade to it", "PLAN_EXPIRED", "basic", basic),
		stored("the payment has failed", "PLAN_EXPIRED", "payment-failed", starter(apikey.PlanPaymentFailed)),
		stored("the payment is pending", "PLAN_EXPIRED", "pending", starter(apikey.PlanPending)),
		stored("the plan was cancelled", "PLAN_EXPIRED", "cancelled", starter(apikey.PlanCancelled)),
		stored("there is no subscription", "PLAN_EXPIRED", "none", nil),
	}
}

func printExamples(w io.Writer, port int, examples []example) {
	target := fmt.Sprintf("http://localhost:%d/v1/whoami", port)
	fmt.Fprintf(w, "listening on %s, Ctrl-C ends\n", target)
	for _, e := range examples {
		fmt.Fprintf(w, "\n# %s: %s\n", e.about, e.want)
		if e.header == "" {
			fmt.Fprintf(w, "curl -i %s\n", target)
			continue
		}
		fmt.Fprintf(w, "curl -i -H 'Authorization: %s' %s\n", e.header, target)
	}
	fmt.Fprintln(w)
}

// openDemoRedis connects to redisURL, or to a Redis in this process if there is none.
func openDemoRedis(ctx context.Context, redisURL string) (redis.UniversalClient, func(), error) {
	if redisURL != "" {
		rdb, err := openRedis(ctx, redisURL)
		return rdb, func() { _ = rdb.Close() }, err
	}
	server, err := miniredis.Run()
	if err != nil {
		return nil, nil, err
	}
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	return rdb, func() { _ = rdb.Close(); server.Close() }, nil
}

// demoStores are what the demo runs on.
type demoStores struct {
	keys  apikey.KeyStore
	plans apikey.PlanStore
	pool  *pgxpool.Pool // nil: in memory
	close func() error  // takes back what was put there
}

// openStores fills the database at databaseURL, or memory if there is none, with what the
// examples need.
func openStores(ctx context.Context, databaseURL string, examples []example) (demoStores, error) {
	if databaseURL == "" {
		keys, plans := memoryStores(examples)
		return demoStores{keys: keys, plans: plans, close: func() error { return nil }}, nil
	}
	pool, err := openPostgres(ctx, databaseURL)
	if err != nil {
		return demoStores{}, err
	}
	if err = migrations.Apply(ctx, pool); err == nil {
		err = seed(ctx, pool, examples)
	}
	if err != nil {
		pool.Close()
		return demoStores{}, err
	}
	return demoStores{
		keys: apikey.NewPostgresKeyStore(pool), plans: apikey.NewPostgresPlanStore(pool), pool: pool,
		close: func() error {
			defer pool.Close()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
			defer cancel()
			return unseed(ctx, pool, examples)
		},
	}, nil
}
