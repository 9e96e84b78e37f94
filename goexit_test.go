package apikey_test

// What ends a goroutine without a panic, as t.FailNow does in a store of a test.

import (
	"context"
	"errors"
	"net/http/httptest"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// An endingWorld ends the goroutine of who asks for keys, or for plans.
type endingWorld struct {
	*world.Memory
	end         func()
	keys, plans bool
}

func (w *endingWorld) Key(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
	if w.keys {
		w.end()
	}
	return w.Memory.Key(ctx, h)
}

func (w *endingWorld) Plan(ctx context.Context, orgID string) (apikey.Plan, error) {
	if w.plans {
		w.end()
	}
	return w.Memory.Plan(ctx, orgID)
}

// An endingBatches is an endingWorld that looks up batches.
type endingBatches struct{ *endingWorld }

func (w endingBatches) Keys(ctx context.Context, hashes []apikey.KeyHash) (map[apikey.KeyHash]apikey.Key, error) {
	found := map[apikey.KeyHash]apikey.Key{}
	for _, h := range hashes {
		if key, err := w.Key(ctx, h); err == nil {
			found[h] = key
		}
	}
	return found, nil
}

// TestStoreEndsItsGoroutine: whatever ends the goroutine of a lookup is answered 503, never
// 401, and to everybody who waits; and neither does it admit facts that are out of date, or
// open the breaker.
func TestStoreEndsItsGoroutine(t *testing.T) {
	for end, f := range map[string]func(){"Goexit": runtime.Goexit, "panic": func() { panic("no") }} {
		for what, set := range map[string]func(*endingWorld, bool){
			"keys":  func(w *endingWorld, on bool) { w.keys = on },
			"plans": func(w *endingWorld, on bool) { w.plans = on },
		} {
			for _, kind := range []string{"no cache", "one by one", "batches"} {
				if end == "panic" && kind == "no cache" {
					continue // it goes on to the server: see TestNoSecrets
				}
				t.Run(end+", "+what+", "+kind, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						rdb := new(fakeRedis).client()
						defer rdb.Close()
						w := &endingWorld{Memory: world.NewMemory(), end: f}
						var keys apikey.KeyStore = w
						if kind == "batches" {
							keys = endingBatches{w}
						}
						r := world.Replica{Middleware: apikey.New(keys, w, nil)}
						if kind != "no cache" {
							r = world.ReplicaOn(keys, w, apikey.NewCache(rdb, world.NewSecret(), nil))
						}
						apiKey, _ := w.Enrol(t, world.Live, world.Paid)
						var others []string
						for range 40 {
							other, _ := w.Enrol(t, world.Live, world.Paid)
							others = append(others, other, other, apiKey)
						}
						r.WantCode(t, apiKey, world.Admitted)
						time.Sleep(11 * time.Second) // what is known is past MaxStaleness
						set(w, true)
						var wg sync.WaitGroup
						for _, key := range others {
							wg.Go(func() { r.WantCode(t, key, world.Unavailable) })
						}
						wg.Wait()
						set(w, false)
						for _, key := range others {
							r.WantCode(t, key, world.Admitted)
						}
					})
				})
			}
		}
	}
}

// TestRedisEndsItsGoroutine: a hook of the Redis client that does the same is as if Redis had
// failed.
func TestRedisEndsItsGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rdb := (&fakeRedis{fault: func(context.Context) error { runtime.Goexit(); return nil }}).client()
		defer rdb.Close()
		w := world.NewMemory()
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		for range 40 {
			apiKey, _ := w.Enrol(t, world.Live, world.Paid)
			r.WantCode(t, apiKey, world.Admitted)
			synctest.Wait()
		}
		if s := r.Cache.Stats(); s.RedisErrors < 10 || s.RedisSkipped < 50 || s.RedisErrors+s.RedisSkipped != 160 {
			t.Errorf("%+v, want each GET and SET to have failed, and the breaker open", s)
		}
	})
}

// A tracer ends the goroutine of who sends a statement.
type endingTracer struct{ on bool }

func (e *endingTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	if e.on {
		runtime.Goexit()
	}
	return ctx
}

func (*endingTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// TestPoolEndsItsGoroutine: so does a hook of the pool, with the Postgres stores, and the
// connection is given back.
func TestPoolEndsItsGoroutine(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	tracer := new(endingTracer)
	config := w.Pool.Config()
	config.ConnConfig.Tracer, config.MaxConns = tracer, 2
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	world.MustNot(t, err)
	defer pool.Close()
	keys, plans := apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool)
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), nil)
	for name, r := range map[string]world.Replica{
		"cache":    world.ReplicaOn(keys, plans, cache),
		"no cache": {Middleware: apikey.New(keys, plans, nil)},
	} {
		tracer.on = true
		for range 5 {
			req := httptest.NewRequest("GET", "/", nil)
			req.Header.Set("Authorization", "Bearer "+apiKey)
			if _, err := r.Authenticate(req); !errors.Is(err, apikey.ErrUnavailable) {
				t.Errorf("%s: %v, want ErrUnavailable", name, err)
			}
		}
		tracer.on = false
		r.WantCode(t, apiKey, world.Admitted)
	}
	world.WaitFor(t, func() bool { return pool.Stat().AcquiredConns() == 0 })
}
