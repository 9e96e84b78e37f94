// Package testservers gives tests real PostgreSQL and Redis servers: those of
// TEST_DATABASE_URL and TEST_REDIS_URL, or else temporary ones. These are started from the
// installed binaries, on Unix sockets in a temporary directory, and stopped with the test
// process. If the binaries are missing, the test fails and says what to install.
package testservers

import (
	"bytes"
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"log"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/localserver"
	"github.com/trackpilots/apikey/migrations"
)

const startTimeout = 30 * time.Second

// Main runs the tests of a package, stops the servers they started, and fails if
// the tests leave a goroutine behind:
//
//	func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }
func Main(m *testing.M) int {
	// Most tests wait most of the time. -parallel still decides.
	if err := flag.Set("test.parallel", "8"); err != nil {
		log.Print(err)
	}
	before := goroutines()
	code := m.Run()
	for _, stop := range stops {
		stop()
	}
	if code == 0 && !settles(before) {
		log.Print("testservers: goroutines left behind by the tests:")
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		return 1
	}
	return code
}

// everything reports whether to run everything, as in CI, and not only what is quick.
func everything() bool { return os.Getenv("CI") != "" }

// Sized returns desk or, in CI, ci: how much of something a test does.
func Sized(desk, ci int) int {
	if everything() {
		return ci
	}
	return desk
}

// Long skips a test that takes long, except in CI.
func Long(tb testing.TB) {
	tb.Helper()
	if !everything() {
		tb.Skip("it takes long: CI=true runs it")
	}
}

// settles waits for goroutines that are about to end.
func settles(before int) bool {
	for range 500 {
		if goroutines() <= before {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// goroutines counts goroutines, without the one that os/signal starts and keeps.
func goroutines() int {
	n := runtime.NumGoroutine()
	stacks := make([]byte, 1<<20)
	if bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("os/signal.loop")) {
		n--
	}
	return n
}

// PostgresURL returns the URL of a new database with all migrations applied. It
// is dropped when the test ends.
func PostgresURL(tb testing.TB) string {
	tb.Helper()
	return Migrated(tb, EmptyPostgresURL(tb))
}

// PostgresURLOn is PostgresURL on a server of the test's own.
func PostgresURLOn(tb testing.TB, server *Server) string {
	tb.Helper()
	return Migrated(tb, newDatabase(tb, server.URL))
}

// EmptyPostgresURL is PostgresURL without migrations.
func EmptyPostgresURL(tb testing.TB) string {
	tb.Helper()
	server, err := postgres()
	if err != nil {
		tb.Fatal(err)
	}
	return newDatabase(tb, server)
}

// Migrated applies all migrations to the database at url, and returns url.
func Migrated(tb testing.TB, url string) string {
	tb.Helper()
	conn, err := pgx.Connect(tb.Context(), url)
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(tb.Context()))
	if err := migrations.Apply(tb.Context(), conn); err != nil {
		tb.Fatal(err)
	}
	return url
}

// newDatabase creates a database on a server, and returns its URL.
func newDatabase(tb testing.TB, server string) string {
	tb.Helper()
	name := "apikey_test_" + strings.ToLower(rand.Text())
	admin := func(sql string) error {
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		conn, err := pgx.Connect(ctx, server)
		if err != nil {
			return err
		}
		defer conn.Close(ctx)
		_, err = conn.Exec(ctx, sql)
		return err
	}
	if err := admin("CREATE DATABASE " + name); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := admin("DROP DATABASE " + name + " WITH (FORCE)"); err != nil {
			tb.Error(err)
		}
	})
	u, err := url.Parse(server)
	if err != nil {
		tb.Fatal(err)
	}
	u.Path = "/" + name
	return u.String()
}

// Postgres returns a pool on a new database of PostgresURL.
func Postgres(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	return Pool(tb, PostgresURL(tb))
}

// Pool returns a pool on url that is closed when the test ends.
func Pool(tb testing.TB, url string) *pgxpool.Pool {
	tb.Helper()
	pool, err := pgxpool.New(context.WithoutCancel(tb.Context()), url)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(pool.Close)
	return pool
}

// Exec runs SQL.
func Exec(tb testing.TB, pool *pgxpool.Pool, sql string, args ...any) {
	tb.Helper()
	if _, err := pool.Exec(context.WithoutCancel(tb.Context()), sql, args...); err != nil {
		tb.Fatalf("%v\n%s", err, sql)
	}
}

// RedisURL returns the URL of a Redis server that other tests use too: names and
// secrets must be the test's own.
func RedisURL(tb testing.TB) string {
	tb.Helper()
	server, err := redisServer()
	if err != nil {
		tb.Fatal(err)
	}
	return server
}

// Redis returns a client of RedisURL with the options that apikey.NewCache wants. It is closed
// when the test ends.
func Redis(tb testing.TB) *redis.Client {
	tb.Helper()
	return RedisAt(tb, RedisURL(tb))
}

// RedisAt returns a client of the server at url, as Redis does.
func RedisAt(tb testing.TB, url string) *redis.Client {
	tb.Helper()
	opts, err := redis.ParseURL(url)
	if err != nil {
		tb.Fatal(err)
	}
	opts.ContextTimeoutEnabled = true
	rdb := redis.NewClient(opts)
	tb.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// PgBouncer returns the URL of databaseURL behind a PgBouncer in transaction mode, with
// further settings. It is stopped when the test ends.
func PgBouncer(tb testing.TB, databaseURL string, settings ...string) string {
	tb.Helper()
	binary, err := localserver.Find("pgbouncer")
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := localserver.TempDir()
	if err != nil {
		tb.Fatal(err)
	}
	db, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		tb.Fatal(err)
	}
	password := ""
	if db.Password != "" {
		password = " password='" + strings.ReplaceAll(db.Password, "'", "''") + "'"
	}
	config := fmt.Sprintf(`[databases]
* = host=%s port=%d user=%s%s
[pgbouncer]
unix_socket_dir = %s
listen_port = 6432
auth_type = any
pool_mode = transaction
%s
`, db.Host, db.Port, db.User, password, dir, strings.Join(settings, "\n"))
	file := filepath.Join(dir, "pgbouncer.ini")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		tb.Fatal(err)
	}
	bouncer := fmt.Sprintf("postgres://%s@/%s?host=%s&port=6432", url.PathEscape(db.User), db.Database, url.QueryEscape(dir))
	return start(tb, bouncer, dir, dial("unix", filepath.Join(dir, ".s.PGSQL.6432")), binary, file).URL
}

// stops ends the servers that all tests share.
var stops []func()

var postgres = sync.OnceValues(func() (string, error) {
	if u := os.Getenv("TEST_DATABASE_URL"); u != "" {
		return u, nil
	}
	s, url, err := localserver.StartPostgres()
	if err == nil {
		stops = append(stops, s.Stop)
	}
	return url, err
})

// StartPostgres starts a server of the test's own, with further arguments.
func StartPostgres(tb testing.TB, args ...string) *Server {
	tb.Helper()
	s, url, err := localserver.StartPostgres(args...)
	return own(tb, s, url, err)
}

// StartStandby starts a standby of the server at url, which streams through there.
func StartStandby(tb testing.TB, url string) *Server {
	tb.Helper()
	basebackup, err := localserver.Find("pg_basebackup")
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := localserver.TempDir()
	if err != nil {
		tb.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	if out, err := localserver.Command(dir, basebackup, "-d", url, "-D", data, "-R", "-X", "stream", "-c", "fast").CombinedOutput(); err != nil {
		tb.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	s, address, err := localserver.StartPostgresIn(dir)
	return own(tb, s, address, err)
}

var redisServer = sync.OnceValues(func() (string, error) {
	if u := os.Getenv("TEST_REDIS_URL"); u != "" {
		return u, nil
	}
	socket, command, err := newRedis()
	if err != nil {
		return "", err
	}
	s, err := localserver.Start(filepath.Dir(socket), "KILL", dial("unix", socket), command...)
	if err == nil {
		stops = append(stops, s.Stop)
	}
	return "unix://" + socket, err
})

// StartRedis starts a server of the test's own, with further arguments.
func StartRedis(tb testing.TB, args ...string) *Server {
	tb.Helper()
	socket, command, err := newRedis()
	if err != nil {
		tb.Fatal(err)
	}
	return start(tb, "unix://"+socket, filepath.Dir(socket), dial("unix", socket), append(command, args...)...)
}

// newRedis makes a new directory, and returns what is needed to run a Redis in it.
func newRedis() (socket string, command []string, err error) {
	binary, err := localserver.Find("redis-server")
	if err != nil {
		return "", nil, err
	}
	dir, err := localserver.TempDir()
	if err != nil {
		return "", nil, err
	}
	socket = filepath.Join(dir, "redis.sock")
	return socket, []string{binary, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", dir}, nil
}
