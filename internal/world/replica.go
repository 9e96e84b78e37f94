package world

// Replicas of a service, and what they share.

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/shared"
	"github.com/trackpilots/apikey/internal/testservers"
)

// NewSecret returns a secret for a cache.
func NewSecret() []byte {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	return secret
}

// A Replica is one process with its own memory in front of a shared world.
type Replica struct {
	*apikey.Middleware
	Cache *apikey.Cache
}

// Ask sends a request with apiKey, and returns the code of the answer.
func (r Replica) Ask(apiKey string) string {
	return r.AskContext(context.Background(), apiKey)
}

// AskContext is Ask with a context.
func (r Replica) AskContext(ctx context.Context, apiKey string) string {
	req := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	req.Header.Set("Authorization", "Bearer "+apiKey)
	_, err := r.Authenticate(req)
	if err == nil {
		return Admitted
	}
	e, ok := errors.AsType[*apikey.Error](err)
	if !ok {
		return err.Error()
	}
	return e.Code
}

// WantCode wants an answer to apiKey.
func (r Replica) WantCode(t *testing.T, apiKey, want string) {
	t.Helper()
	if got := r.Ask(apiKey); got != want {
		t.Errorf("answered %q, want %q", got, want)
	}
}

// MeetStore has the replica look up a key of its own, so that it knows the tables that
// the records in Redis must be of.
func (r Replica) MeetStore(t testing.TB, w World) apikey.CacheStats {
	t.Helper()
	apiKey, _ := w.Enrol(t, Live, Paid)
	if code := r.Ask(apiKey); code != Admitted {
		t.Errorf("a new key is answered %q", code)
	}
	return r.Cache.Stats()
}

// NewReplica returns a replica with a cache before w, which sees the stores of w as some
// user's own.
func NewReplica(w World, rdb redis.UniversalClient, secret []byte, opts *apikey.CacheOptions) Replica {
	return ReplicaOn(w, w, apikey.NewCache(rdb, secret, opts))
}

// ReplicaOn returns a replica with a cache before two stores.
func ReplicaOn(keys apikey.KeyStore, plans apikey.PlanStore, cache *apikey.Cache) Replica {
	return Replica{apikey.New(keys, plans, &apikey.Options{Cache: cache}), cache}
}

// NewPostgresReplica returns a replica that knows the stores of w as those of the package.
func NewPostgresReplica(w *Postgres, rdb redis.UniversalClient, secret []byte, opts *apikey.CacheOptions) Replica {
	return ReplicaOn(w.PostgresKeyStore, w.PostgresPlanStore, apikey.NewCache(rdb, secret, opts))
}

// A Fleet is some replicas of a service that watch one database.
type Fleet struct {
	*Postgres
	Redis    *redis.Client
	Secret   []byte
	Replicas []Replica
	Pools    []*pgxpool.Pool // theirs
}

// NewFleet starts n replicas and waits until their feeds are live.
func NewFleet(t testing.TB, n int, opts *apikey.CacheOptions, configure ...func(*pgxpool.Config)) *Fleet {
	t.Helper()
	f := &Fleet{Postgres: NewPostgres(t), Redis: testservers.Redis(t), Secret: NewSecret()}
	for range n {
		config := f.Pool.Config()
		for _, c := range configure {
			c(config)
		}
		pool, err := pgxpool.NewWithConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		f.Pools = append(f.Pools, pool)
		f.Replicas = append(f.Replicas, NewWatchedReplica(t, pool, f.Redis, f.Secret, opts))
	}
	return f
}

// NewWatchedReplica returns a replica that follows changes, once it is known to.
func NewWatchedReplica(t testing.TB, pool *pgxpool.Pool, rdb redis.UniversalClient, secret []byte, opts *apikey.CacheOptions) Replica {
	t.Helper()
	cache := apikey.NewCache(rdb, secret, opts)
	Watch(t, cache, pool)
	Ready(t, cache)
	return ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
}

// Watch watches until the test ends.
func Watch(t testing.TB, cache *apikey.Cache, pool *pgxpool.Pool) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- cache.Watch(ctx, pool) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch: %v", err)
		}
	})
}

// Ready waits until a cache that is watched hears of changes.
func Ready(t testing.TB, cache *apikey.Cache) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	MustNot(t, cache.Ready(ctx))
}

// FillRedis asks for a key until Redis holds the records of it and of its plan.
func FillRedis(t testing.TB, w World, rdb *redis.Client, secret []byte, apiKey, orgID string) (keyName, planName string) {
	t.Helper()
	keyName, planName = RedisNames(apikey.HashKey(apiKey), orgID)
	AwaitRecords(t, NewReplica(w, rdb, secret, NoMemory()), rdb, apiKey, keyName, planName)
	return keyName, planName
}

// AwaitRecords has a replica with [NoMemory] ask for a key until Redis holds the records.
// A single SET may fail, when the machine is busy for longer than its budget.
func AwaitRecords(t testing.TB, r Replica, rdb *redis.Client, apiKey string, names ...string) {
	t.Helper()
	WaitFor(t, func() bool {
		r.Ask(apiKey)
		return rdb.Exists(context.WithoutCancel(t.Context()), names...).Val() == int64(len(names))
	})
}

// NoMemory are the options of a replica that remembers nothing.
func NoMemory() *apikey.CacheOptions { return &apikey.CacheOptions{MemoryEntries: -1} }

// patience is how long a busy machine may take.
const patience = 30 * time.Second

// WaitFor waits for what happens in the background.
func WaitFor(t testing.TB, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}

// NoSet is a Redis hook that lets no SET through, so that what a test has put
// there stays.
type NoSet struct{}

// DialHook implements [redis.Hook].
func (NoSet) DialHook(next redis.DialHook) redis.DialHook { return next }

// ProcessHook implements [redis.Hook].
func (NoSet) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

// ProcessPipelineHook implements [redis.Hook].
func (NoSet) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if cmds[0].Name() == "set" { // a batch has no other commands
			return nil
		}
		return next(ctx, cmds)
	}
}

// MustNot ends the test with err, if there is one.
func MustNot(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// KeyTopic is the topic of a key in the feed.
func KeyTopic(h apikey.KeyHash) feed.Topic { return feed.KeyTopic(binary.BigEndian.Uint64(h[:])) }

// Instant is now, as the cache counts it.
func Instant() clock.Instant { return clock.At(time.Now()) }

// RedisNames returns the names of the records of a key and of a plan in Redis.
func RedisNames(h apikey.KeyHash, orgID string) (key, plan string) {
	return fmt.Sprintf("%skey:%x", shared.Root, h[:]), shared.Root + "plan:" + orgID
}
