// Package testservers gives tests real PostgreSQL and Redis servers: those that
// TEST_DATABASE_URL and TEST_REDIS_URL name, else throw-away ones, started from
// the installed binaries on Unix sockets in a temporary directory and stopped
// with the test process. Without either the test fails, and says what to install.
package testservers

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"log"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/migrations"
)

const startTimeout = 30 * time.Second

// Main runs the tests of a package, stops the servers they started, and fails if
// the tests leave a goroutine behind:
//
//	func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }
func Main(m *testing.M) int {
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

// settles waits for the goroutines that are about to end.
func settles(before int) bool {
	for range 500 {
		if goroutines() <= before {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

// goroutines counts them, but for the one that os/signal starts once and keeps.
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
	server, err := postgres()
	if err != nil {
		tb.Fatal(err)
	}
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
	conn, err := pgx.Connect(tb.Context(), u.String())
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(tb.Context()))
	if err := migrations.Apply(tb.Context(), conn); err != nil {
		tb.Fatal(err)
	}
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

// Redis returns a client of RedisURL, fit for apikey.NewCache, that is closed
// when the test ends.
func Redis(tb testing.TB) *redis.Client {
	tb.Helper()
	opts, err := redis.ParseURL(RedisURL(tb))
	if err != nil {
		tb.Fatal(err)
	}
	opts.ContextTimeoutEnabled = true
	rdb := redis.NewClient(opts)
	tb.Cleanup(func() { _ = rdb.Close() })
	return rdb
}

// PgBouncer returns the URL of databaseURL behind a PgBouncer in transaction mode,
// which is stopped when the test ends.
func PgBouncer(tb testing.TB, databaseURL string) string {
	tb.Helper()
	binary, err := find("pgbouncer")
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := tempDir()
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
`, db.Host, db.Port, db.User, password, dir)
	file := filepath.Join(dir, "pgbouncer.ini")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		tb.Fatal(err)
	}
	stop, err := start(dir, dial(filepath.Join(dir, ".s.PGSQL.6432")), binary, file)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(stop)
	return fmt.Sprintf("postgres://%s@/%s?host=%s&port=6432", url.PathEscape(db.User), db.Database, url.QueryEscape(dir))
}

// stops ends the servers that all tests share.
var stops []func()

var postgres = sync.OnceValues(func() (string, error) {
	if u := os.Getenv("TEST_DATABASE_URL"); u != "" {
		return u, nil
	}
	initdb, err := find("initdb")
	if err != nil {
		return "", err
	}
	dir, err := tempDir()
	if err != nil {
		return "", err
	}
	data := filepath.Join(dir, "data")
	out, err := as(dir, initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("testservers: initdb: %w\n%s", err, out)
	}
	initdb, err = filepath.EvalSymlinks(initdb) // the server stands beside it
	if err != nil {
		return "", err
	}
	server := "postgres://postgres@/postgres?host=" + url.QueryEscape(dir)
	return server, startShared(dir,
		func(ctx context.Context) error {
			conn, err := pgx.Connect(ctx, server)
			if err != nil {
				return err
			}
			return conn.Close(ctx)
		},
		filepath.Join(filepath.Dir(initdb), "postgres"), "-D", data, "-k", dir, "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "max_connections=200")
})

var redisServer = sync.OnceValues(func() (string, error) {
	if u := os.Getenv("TEST_REDIS_URL"); u != "" {
		return u, nil
	}
	binary, err := find("redis-server")
	if err != nil {
		return "", err
	}
	dir, err := tempDir()
	if err != nil {
		return "", err
	}
	socket := filepath.Join(dir, "redis.sock")
	return "unix://" + socket, startShared(dir, dial(socket),
		binary, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", dir)
})

// find returns the path of a server's binary.
func find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/lib/postgresql/*/bin/", "/usr/sbin/"} { // out of PATH on Debian
		if paths, _ := filepath.Glob(dir + name); len(paths) > 0 {
			return paths[len(paths)-1], nil
		}
	}
	return "", fmt.Errorf("testservers: %s is not installed: run 'make servers', or on Debian "+
		"'apt-get install postgresql redis-server pgbouncer'", name)
}

// tempDir returns a new directory that belongs to the user of as. Its path is
// short, since that of a Unix socket may have no more than 107 bytes.
func tempDir() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "apikey")
	if err != nil {
		return "", err
	}
	if id := servant(); id != nil {
		err = os.Chown(dir, int(id.Uid), int(id.Gid))
	}
	return dir, err
}

// servant is whom servers run as: nil for the present user, or somebody without
// rights if that is root, as whom PostgreSQL refuses to run.
func servant() *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	return nil
}

func as(dir, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: servant(), Setpgid: true}
	return cmd
}

// keeper runs a server until its standard input is closed, which happens even
// when the test process is killed, and removes the directory then.
const keeper = `dir=$1; shift
"$@" >"$dir/log" 2>&1 &
read -r _
kill -INT $!
wait
rm -rf "$dir"`

// startShared starts a server that Main stops.
func startShared(dir string, ready func(context.Context) error, command ...string) error {
	stop, err := start(dir, ready, command...)
	if err == nil {
		stops = append(stops, stop)
	}
	return err
}

// start starts a server and waits until ready succeeds.
func start(dir string, ready func(context.Context) error, command ...string) (stop func(), err error) {
	cmd := as(dir, "/bin/sh", append([]string{"-c", keeper, "keeper", dir}, command...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		_ = stdin.Close()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	}

	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return stop, nil
		}
		select {
		case <-ctx.Done():
			out, _ := fs.ReadFile(os.DirFS(dir), "log")
			stop()
			return nil, fmt.Errorf("testservers: %s does not answer: %w\n%s", command[0], err, out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// dial is ready when somebody listens on the socket.
func dial(socket string) func(context.Context) error {
	return func(context.Context) error {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}
