package pg_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/outage"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// budget is the time of a lookup: long, so that a busy machine connects within it.
const budget = 2 * time.Second

var words = pg.Lookup{
	One:  `SELECT pg_current_snapshot()::text, false, 1::bigint, pg_backend_pid(), word FROM words WHERE word = $1`,
	Many: `SELECT pg_current_snapshot()::text, false, 1::bigint, pg_backend_pid(), word FROM words WHERE word = ANY($1)`,
}

// look looks up a word within the budget, and returns the class of the error.
func look(r *pg.Reader) (found string, class outage.Class, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), budget)
	defer cancel()
	var word string
	err = pg.LookUp(ctx, r, words, []string{"good"}, []any{&word}, func() { found += word })
	return found, outage.Of(err), err
}

// newWords returns the URL of a database that knows a word, and a pool on it.
func newWords(t *testing.T) (string, *pgxpool.Pool) {
	t.Helper()
	url := testservers.EmptyPostgresURL(t)
	pool := testservers.Pool(t, url)
	testservers.Exec(t, pool, `CREATE TABLE words (word text); INSERT INTO words VALUES ('good')`)
	return url, pool
}

// newRole makes a role with settings that may read the words, and returns the URL for it.
func newRole(t *testing.T, url string, pool *pgxpool.Pool, settings, grant string) string {
	t.Helper()
	role := "role_" + strings.ToLower(rand.Text())
	testservers.Exec(t, pool, `CREATE ROLE `+role+` `+settings)
	t.Cleanup(func() { testservers.Exec(t, pool, `DROP OWNED BY `+role+`; DROP ROLE `+role) })
	if grant != "" {
		testservers.Exec(t, pool, fmt.Sprintf(grant, role))
	}
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(url, "://"+config.User, "://"+role, 1)
}

// lock locks the table until the test ends.
func lock(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	if _, err := tx.Exec(t.Context(), `LOCK words`); err != nil {
		t.Fatal(err)
	}
}

// keep takes all connections of a pool until the test ends.
func keep(t *testing.T, pool *pgxpool.Pool) (conns []*pgxpool.Conn) {
	t.Helper()
	for range pool.Config().MaxConns {
		conn, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		release := sync.OnceFunc(conn.Release)
		t.Cleanup(release)
		conns = append(conns, conn)
	}
	return conns
}

// TestClasses: what becomes of a lookup on a real server, and what that means.
func TestClasses(t *testing.T) {
	const reads = `GRANT SELECT ON words TO %s`
	for name, c := range map[string]struct {
		db   func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB
		want outage.Class
		says string // the error contains
	}{
		"nobody listens": {func(t *testing.T, _ string, _ *pgxpool.Pool) pg.DB {
			return testservers.Pool(t, "postgres://u@127.0.0.1:1/db")
		}, outage.Away, "refused"},
		"frozen, on a connection just used": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			return frozen(t, url, 1, 0)
		}, outage.Away, "deadline"},
		"frozen, on an idle connection, which the pool pings": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			return frozen(t, url, 1, 1500*time.Millisecond)
		}, outage.Away, "deadline"},
		"frozen, without a connection": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			return frozen(t, url, 0, 0)
		}, outage.Away, "deadline"},
		"frozen, while others keep the pool": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			pool := frozen(t, url, 1, 0)
			keep(t, pool)
			return pool
		}, outage.Away, "deadline"},
		"silent for the whole time": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			lock(t, owner)
			return testservers.Pool(t, url)
		}, outage.Away, "deadline"},
		"others keep the pool": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			pool := testservers.Pool(t, url+"&pool_max_conns=2")
			keep(t, pool)
			return pool
		}, outage.Busy, "deadline"},
		"a place late, and then silence": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			pool := testservers.Pool(t, url+"&pool_max_conns=1")
			conn := keep(t, pool)[0]
			lock(t, owner)
			timer := time.AfterFunc(3*budget/4, func() { conn.Hijack().Close(context.Background()) })
			t.Cleanup(func() { timer.Stop() })
			return pool
		}, outage.Busy, "deadline"},
		"a hook of the pool takes all the time": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			config, err := pgxpool.ParseConfig(url)
			if err != nil {
				t.Fatal(err)
			}
			config.PrepareConn = func(ctx context.Context, _ *pgx.Conn) (bool, error) { <-ctx.Done(); return true, ctx.Err() }
			pool, err := pgxpool.NewWithConfig(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(pool.Close)
			return pool
		}, outage.Busy, "deadline"},
		"a hook panics when the server is asked": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			config, err := pgxpool.ParseConfig(url + "&pool_max_conns=1")
			if err != nil {
				t.Fatal(err)
			}
			connects := 0
			config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
				if connects++; connects > 1 {
					panic("no")
				}
				return nil
			}
			pool, err := pgxpool.NewWithConfig(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(pool.Close)
			keep(t, pool)
			return pool
		}, outage.Ours, "deadline"},
		"no place on the server": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			url = newRole(t, url, owner, "LOGIN CONNECTION LIMIT 1", reads)
			keep(t, testservers.Pool(t, url+"&pool_max_conns=1"))
			return testservers.Pool(t, url)
		}, outage.Busy, "53300"},
		"no place on the server, and the pool's is taken": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			pool := testservers.Pool(t, newRole(t, url, owner, "LOGIN CONNECTION LIMIT 1", reads)+"&pool_max_conns=2")
			conn, err := pool.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(conn.Release)
			return pool
		}, outage.Busy, "53300"},
		"statement_timeout": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			lock(t, owner)
			return testservers.Pool(t, url+"&statement_timeout=100")
		}, outage.Busy, "57014"},
		"lock_timeout": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			lock(t, owner)
			return testservers.Pool(t, url+"&lock_timeout=100")
		}, outage.Busy, "55P03"},
		"one connection for several": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			conn := connect(t, url)
			rows, err := conn.Query(t.Context(), `SELECT 1`)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(rows.Close)
			return conn
		}, outage.Busy, "conn busy"},
		"an administrator ended the session": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			conn := connect(t, url)
			lock(t, owner)
			timer := time.AfterFunc(budget/8, func() {
				_, _ = owner.Exec(context.Background(), `SELECT pg_terminate_backend($1)`, conn.PgConn().PID())
			})
			t.Cleanup(func() { timer.Stop() })
			return conn
		}, outage.Away, "57P01"},
		"a closed connection": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			conn := connect(t, url)
			_ = conn.Close(t.Context())
			return conn
		}, outage.Away, "conn closed"},
		"no such database": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			return testservers.Pool(t, strings.Replace(url, "apikey_test_", "apikey_no_", 1))
		}, outage.Away, "3D000"},
		"a closed pool": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			pool := testservers.Pool(t, url)
			pool.Close()
			return pool
		}, outage.Ours, "closed pool"},
		"an ended transaction": {func(t *testing.T, _ string, owner *pgxpool.Pool) pg.DB {
			tx, err := owner.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_ = tx.Rollback(t.Context())
			return tx
		}, outage.Ours, "tx is closed"},
		"no such table": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			testservers.Exec(t, owner, `DROP TABLE words`)
			return testservers.Pool(t, url)
		}, outage.Ours, "42P01"},
		"a row that cannot be scanned": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			testservers.Exec(t, owner, `INSERT INTO words VALUES (NULL)`)
			return nullWord{testservers.Pool(t, url)}
		}, outage.Ours, "scan"},
		"may not log in": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			return testservers.Pool(t, newRole(t, url, owner, "NOLOGIN", reads))
		}, outage.NotAllowed, "28000"},
		"may not read": {func(t *testing.T, url string, owner *pgxpool.Pool) pg.DB {
			return testservers.Pool(t, newRole(t, url, owner, "LOGIN", ""))
		}, outage.NotAllowed, "42501"},
		"a pooler whose server has no place": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			url = testservers.PgBouncer(t, url, "default_pool_size = 1", "query_wait_timeout = 1")
			tx, err := testservers.Pool(t, url).Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
			if _, err := tx.Exec(t.Context(), `SELECT 1`); err != nil {
				t.Fatal(err)
			}
			return testservers.Pool(t, url)
		}, outage.Busy, "query_wait_timeout"},
		"a pooler that has no place": {func(t *testing.T, url string, _ *pgxpool.Pool) pg.DB {
			url = testservers.PgBouncer(t, url, "max_client_conn = 1")
			pool := testservers.Pool(t, url+"&pool_max_conns=1")
			for start := time.Now(); pool.Ping(t.Context()) != nil && time.Since(start) < 30*time.Second; {
				time.Sleep(10 * time.Millisecond) // for who has looked whether it is up
			}
			keep(t, pool)
			return testservers.Pool(t, url)
		}, outage.Busy, "no more connections"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, owner := newWords(t)
			r := pg.NewReader(c.db(t, url, owner))
			_, class, err := look(r)
			if err == nil || class != c.want || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, which is %v; want %v that says %q", err, class, c.want, c.says)
			}
		})
	}
}

// TestHungHook: a hook that hangs for ever when the server is asked is asked no more, and says
// nothing of the server.
func TestHungHook(t *testing.T) {
	t.Parallel()
	url, _ := newWords(t)
	config, err := pgxpool.ParseConfig(url + "&pool_max_conns=1")
	if err != nil {
		t.Fatal(err)
	}
	hangs := make(chan struct{})
	var connects atomic.Int64
	config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
		if connects.Add(1) > 1 {
			<-hangs
		}
		return nil
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	keep(t, pool)
	r := pg.NewReader(pool)
	for i := range 3 {
		if _, class, err := look(r); err == nil || i > 0 && class != outage.Busy {
			t.Errorf("%v, which is %v", err, class)
		}
	}
	if n := connects.Load(); n != 2 {
		t.Errorf("connected %d times, want 2", n)
	}
	close(hangs)
}

// TestManyAsk: the server is asked once for all who wait.
func TestManyAsk(t *testing.T) {
	t.Parallel()
	url, owner := newWords(t)
	config, err := pgxpool.ParseConfig(url + "&pool_max_conns=1")
	if err != nil {
		t.Fatal(err)
	}
	var connects atomic.Int64
	config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { connects.Add(1); return nil }
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	conn := keep(t, pool)[0]
	r := pg.NewReader(pool)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, class, err := look(r); err == nil || class != outage.Busy {
				t.Errorf("%v, which is %v", err, class)
			}
		})
	}
	wg.Wait()
	if n := connects.Load(); n != 2 {
		t.Errorf("connected %d times, want 2", n)
	}

	conn.Release()
	for range 2 { // the second time by a prepared statement
		if found, _, err := look(r); found != "good" || err != nil {
			t.Errorf("found %q, %v", found, err)
		}
	}
	testservers.Exec(t, owner, `ALTER TABLE words ALTER COLUMN word TYPE varchar(9)`)
	if found, _, err := look(r); found != "good" || err != nil {
		t.Errorf("of another type: found %q, %v", found, err)
	}
	if n := connects.Load(); n != 2 {
		t.Errorf("connected %d times, want no more", n)
	}
}

// frozen returns a pool of one connection at most, which has been idle for a while if it is
// there, and through which nothing passes until the test ends.
func frozen(t *testing.T, url string, conns int, idle time.Duration) *pgxpool.Pool {
	t.Helper()
	address, proxy := testservers.ProxyPostgres(t, url)
	pool := testservers.Pool(t, strings.Replace(address, "connect_timeout=1", "pool_max_conns=1", 1))
	for range conns {
		if err := pool.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(idle)
	proxy.Set(t, testservers.Frozen)
	t.Cleanup(func() { proxy.Set(t, testservers.Healthy) }) // or else it takes long to close
	return pool
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// nullWord returns a row without a word, which cannot be scanned.
type nullWord struct{ *pgxpool.Pool }

func (n nullWord) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return n.Pool.Query(ctx, strings.Replace(sql, "word = $1", "word IS NULL OR word = $1", 1), args...)
}
