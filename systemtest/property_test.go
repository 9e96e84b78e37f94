package systemtest

// The property that the cache exists for: once a change has been announced to a
// replica, that replica answers by it.

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// A subject is one key whose row goes through versions. Its organisation is the
// number of the version, so an answer tells which one it was made of.
type subject struct {
	apiKey string
	hash   apikey.KeyHash

	writing  sync.Mutex // held by the transaction that changes it
	mu       sync.Mutex
	versions []version // committed, or about to be
}

type version struct {
	xid    uint64
	number int
	absent bool
}

// announced returns the number of the last version whose transaction the replica
// has been told of, or 0.
func (s *subject) announced(told *announcements) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.versions) - 1; i >= 0; i-- {
		if v := s.versions[i]; told.has(s.hash, v.xid) {
			return v.number
		}
	}
	return 0
}

// A history is a run of writers and readers, and what was wrong.
type history struct {
	pool     *pgxpool.Pool
	subjects []*subject
	numbers  atomic.Int64

	changes, uses, violations atomic.Int64
	first                     atomic.Pointer[string] // violation
}

// write makes one transaction, of the sort that kind says, out of a change of
// each of some subjects.
func (h *history) write(ctx context.Context, subjects []*subject) error {
	for _, s := range subjects {
		s.writing.Lock()
		defer s.writing.Unlock()
	}
	tx, err := h.pool.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // after a commit there is nothing to do
	if rand.IntN(4) == 0 {                        // an id that is taken early and used late
		if _, err := tx.Exec(ctx, `SELECT pg_current_xact_id()`); err != nil {
			return err
		}
		pause(10 * time.Millisecond)
	}
	var undo []func()
	for _, s := range subjects {
		if rand.IntN(3) == 0 { // a change that is taken back
			if _, err := tx.Exec(ctx, `SAVEPOINT s; UPDATE api_keys SET org_id = 'never' WHERE key_hash = '\x`+
				fmt.Sprintf("%x", s.hash)+`'; ROLLBACK TO s`); err != nil {
				return err
			}
		}
		v, err := h.change(ctx, tx, s)
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.versions = append(s.versions, v)
		undo = append(undo, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.versions = s.versions[:len(s.versions)-1]
		})
		s.mu.Unlock()
	}
	if rand.IntN(3) == 0 {
		pause(20 * time.Millisecond)
	}
	if rand.IntN(4) == 0 {
		for _, undo := range undo {
			undo()
		}
		return tx.Rollback(ctx)
	}
	h.changes.Add(int64(len(subjects)))
	return tx.Commit(ctx)
}

// change changes s in tx, in a savepoint or not, and returns the version.
func (h *history) change(ctx context.Context, tx pgx.Tx, s *subject) (version, error) {
	v := version{number: int(h.numbers.Add(1)), absent: rand.IntN(5) == 0}
	sql := `INSERT INTO api_keys (org_id, key_hash) VALUES ($1, $2) ON CONFLICT (key_hash) DO UPDATE SET org_id = excluded.org_id`
	args := []any{fmt.Sprint(v.number), s.hash[:]}
	if v.absent {
		sql, args = `DELETE FROM api_keys WHERE key_hash = $1`, args[1:]
	}
	if rand.IntN(2) == 0 {
		inner, err := tx.Begin(ctx)
		if err != nil {
			return v, err
		}
		if _, err := inner.Exec(ctx, sql, args...); err != nil {
			return v, err
		}
		if err := inner.Commit(ctx); err != nil {
			return v, err
		}
	} else if _, err := tx.Exec(ctx, sql, args...); err != nil {
		return v, err
	}
	err := tx.QueryRow(ctx, `SELECT pg_current_xact_id()::text::bigint`).Scan(&v.xid)
	return v, err
}

// use asks a replica for s and judges the answer.
func (h *history) use(auth *apikey.Middleware, told *announcements, s *subject) {
	announced := s.announced(told)
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+s.apiKey)
	org, err := auth.Authenticate(r)
	h.uses.Add(1)
	wrong := ""
	switch {
	case err == nil:
		var number int
		if _, err := fmt.Sscan(org.ID, &number); err != nil || number < announced {
			wrong = fmt.Sprintf("admits on version %s after version %d was announced", org.ID, announced)
		}
	case errors.Is(err, apikey.ErrInvalidAPIKey):
		s.mu.Lock()
		current := announced > 0
		for _, v := range s.versions {
			if v.number >= announced && v.absent {
				current = false
			}
		}
		s.mu.Unlock()
		if current {
			wrong = fmt.Sprintf("refuses, although version %d was announced and nothing was deleted since", announced)
		}
	default:
		wrong = err.Error()
	}
	if wrong != "" {
		h.violations.Add(1)
		h.first.CompareAndSwap(nil, &wrong)
	}
}

func pause(most time.Duration) { time.Sleep(rand.N(most)) }

// A heldStore holds answers back, so that they arrive after later ones.
type heldStore struct{ apikey.KeyStore }

func (s heldStore) Key(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
	key, err := s.KeyStore.Key(ctx, h)
	if rand.IntN(3) == 0 {
		pause(15 * time.Millisecond)
	}
	return key, err
}

// A lateStamp is a store that stamps wrongly: with a snapshot taken after the
// read. Its only use is to show that the property test notices.
type lateStamp struct{ pool *pgxpool.Pool }

func (s lateStamp) Key(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
	unstamped, _ := snapshot.Collect(ctx)
	key, err := apikey.NewPostgresKeyStore(s.pool).Key(unstamped, h)
	pause(15 * time.Millisecond)
	var text string
	var server snapshot.Server
	if err := s.pool.QueryRow(ctx, `SELECT pg_current_snapshot()::text, `+feed.ServerSQL).Scan(&text, &server); err != nil {
		return apikey.Key{}, err
	}
	snapshot.Report(ctx, text, server)
	return key, err
}

// A lateRedis is a hook that writes late, and now and then an older value again.
type lateRedis struct {
	world.NoSet
	mu  sync.Mutex
	old map[string]any
}

func (l *lateRedis) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if cmds[0].Name() == "set" {
			pause(15 * time.Millisecond)
			for _, cmd := range cmds {
				l.replay(cmd.Args())
			}
		}
		return next(ctx, cmds)
	}
}

func (l *lateRedis) replay(args []any) {
	name := args[1].(string)
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.old[name]
	if old == nil || rand.IntN(4) == 0 {
		l.old[name] = args[2]
	}
	if old != nil && rand.IntN(4) == 0 {
		args[2] = old
	}
}

// runHistory lets writers and readers loose on replicas whose key stores are made
// by store, until the readers have made the number of uses.
func runHistory(t *testing.T, uses int64, store func(*pgxpool.Pool) apikey.KeyStore) *history {
	t.Helper()
	const replicas, writers, readers, subjects = 3, 4, 4, 12
	url := testservers.PostgresURL(t)
	h := &history{pool: testservers.Pool(t, url)}
	for i := range subjects {
		apiKey := fmt.Sprint("a-key-issued-elsewhere-", i)
		h.subjects = append(h.subjects, &subject{apiKey: apiKey, hash: apikey.HashKey(apiKey)})
	}
	rdb, secret := testservers.Redis(t), world.NewSecret()
	rdb.AddHook(&lateRedis{old: map[string]any{}})

	plans := apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) { return world.PlanFacts()[world.Paid], nil })
	ctx, stop := context.WithCancel(t.Context())
	var writing, reading sync.WaitGroup
	for range writers {
		writing.Go(func() {
			for ctx.Err() == nil {
				chosen := []*subject{h.subjects[rand.IntN(subjects)]}
				if i := rand.IntN(subjects - 1); rand.IntN(4) == 0 { // in order, against deadlock
					chosen = []*subject{h.subjects[i], h.subjects[i+1]}
				}
				if err := h.write(context.WithoutCancel(ctx), chosen); err != nil {
					t.Error(err)
					return
				}
				pause(4 * time.Millisecond)
			}
		})
	}
	for range replicas {
		pool := testservers.Pool(t, url)
		told := new(announcements)
		cache := apikey.NewCache(rdb, secret, &apikey.CacheOptions{Logger: slog.New(told)})
		world.Watch(t, cache, pool)
		world.Ready(t, cache)
		auth := apikey.New(store(pool), plans, &apikey.Options{Cache: cache})
		for range readers {
			reading.Go(func() {
				for h.uses.Load() < uses && !t.Failed() {
					s := h.subjects[rand.IntN(subjects)]
					h.use(auth, told, s)
					time.Sleep(500 * time.Microsecond)
				}
			})
		}
	}
	reading.Wait()
	stop()
	writing.Wait()
	return h
}

var propertyUses = flag.Int64("property.uses", int64(testservers.Sized(3_000, 40_000)), "uses of facts in TestProperty")

// TestProperty: concurrent writers with delays, savepoints, rollbacks and long
// transactions; readers on three replicas whose fills are held back in the store
// and in Redis. Not one use of facts that an announcement has overtaken.
func TestProperty(t *testing.T) {
	t.Parallel()
	h := runHistory(t, *propertyUses, func(pool *pgxpool.Pool) apikey.KeyStore { return heldStore{apikey.NewPostgresKeyStore(pool)} })
	t.Logf("%d uses, %d changes, %d violations", h.uses.Load(), h.changes.Load(), h.violations.Load())
	if n := h.violations.Load(); n > 0 {
		t.Errorf("%d violations, the first: %s", n, *h.first.Load())
	}
}

// TestPropertyTestNotices: the same run over a store that stamps its reads too
// late has violations. A property test that finds none there finds nothing.
func TestPropertyTestNotices(t *testing.T) {
	t.Parallel()
	h := runHistory(t, *propertyUses, func(pool *pgxpool.Pool) apikey.KeyStore { return lateStamp{pool} })
	t.Logf("%d uses, %d changes, %d violations", h.uses.Load(), h.changes.Load(), h.violations.Load())
	if h.violations.Load() == 0 {
		t.Error("no violation is found although stamps are taken after the reads")
	}
}
