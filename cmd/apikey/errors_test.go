package main

// What users meet in practice: one clear line each, an exit status, nothing secret, and
// nothing half done.

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/testservers"
)

// TestNoPasswords runs every command with every kind of wrong input, and passwords in
// the environment and in flags: none is printed.
func TestNoPasswords(t *testing.T) {
	t.Parallel()
	const mark = "hunter2-the-password"
	stdin := "tpk_live_" + mark + "\n"
	urls := map[string]string{
		"away":       "://u:" + mark + "@127.0.0.1:1/db",
		"bad port":   "://u:" + mark + "@127.0.0.1:x/db",
		"bad escape": "://u:" + mark + "%zz@127.0.0.1:1/db",
		"bad host":   "://u:" + mark + "@[::1/db",
		"blank":      "://u:" + mark + "@a b/db",
		"hash":       "://u:" + mark + "#x@127.0.0.1:1/db",
		"slash":      "://u:x/" + mark + "@127.0.0.1:1/db",
		"option":     "://127.0.0.1:1/db?sslmode=" + mark + "&db=" + mark + "&protocol=" + mark,
		"no scheme":  mark,
	}
	inputs := [][]string{
		{}, {"-h"}, {"--frobnicate"}, {"left over"}, {mark}, {"--org", "acme", "--id", mark, "--tier", "t", "--api"}, {"--expires", "soon", "--org", "o", "--id", "i"},
		{"--json", "--org", "acme", "--id", "x", "--tier", "t", "--api"}, {"--overlap", "soon"}, {"--ends", "soon", "--org", "o"}, {"--addr", "nonsense"},
	}
	look := func(env, flags []string, what string) {
		for _, c := range commands {
			name := c.name
			for _, input := range inputs[:testservers.Sized(6, len(inputs))] {
				if name == "demo" && !slices.Contains(flags, "--database-url") && len(env) == 0 {
					continue // it would serve
				}
				args := slices.Concat(strings.Fields(name), flags, input)
				cmd := exec.CommandContext(t.Context(), binary, args...)
				cmd.Env = append(os.Environ(), env...)
				cmd.Stdin = strings.NewReader(stdin)
				out, _ := cmd.CombinedOutput()
				if strings.Contains(string(out), mark) || strings.Contains(string(out), "hunter2") {
					t.Errorf("%s: %v prints\n%s", what, name, out)
				}
			}
		}
	}
	for what, rest := range urls {
		t.Run(what, func(t *testing.T) {
			if what != "away" {
				testservers.Long(t)
			}
			t.Parallel()
			look([]string{"DATABASE_URL=postgres" + rest, "REDIS_URL=redis" + rest, "APIKEY_CACHE_SECRET=" + mark}, nil, what)
			look(nil, []string{"--database-url", "postgres" + rest}, what+" as a flag")
		})
	}
	t.Run("Redis", func(t *testing.T) {
		for what, rest := range urls {
			s := shell{testservers.PostgresURL(t), "redis" + rest}
			for _, name := range []string{"explain", "doctor"} {
				if out, fault, _ := s.run(t, "some-key-of-somebody", name); strings.Contains(out+fault, "hunter2") {
					t.Errorf("%s, %s prints\n%s%s", what, name, out, fault)
				}
			}
		}
	})
}

// TestEverydayErrors: each is told in one line that says what to do.
func TestEverydayErrors(t *testing.T) {
	t.Parallel()
	good := testservers.PostgresURL(t)
	pool := testservers.Pool(t, good)
	role := "everyday_" + strings.ToLower(pool.Config().ConnConfig.Database[12:])
	if _, err := pool.Exec(t.Context(), `CREATE ROLE `+role+` LOGIN PASSWORD 'p'`); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = pool.Exec(t.Context(), `DROP ROLE `+role) }()
	with := func(change func(u *url.URL)) string {
		u, err := url.Parse(good)
		if err != nil {
			t.Fatal(err)
		}
		change(u)
		return u.String()
	}
	old := testservers.PostgresURL(t)
	if _, err := testservers.Pool(t, old).Exec(t.Context(), `ALTER TABLE api_keys DROP COLUMN environment; DELETE FROM apikey_migrations WHERE name LIKE '0003%'`); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ url, want string }{
		"no such database":    {with(func(u *url.URL) { u.Path = "/nowhere" }), "create the database"},
		"no such role":        {with(func(u *url.URL) { u.User = url.UserPassword("nobody", "p") }), "look at the user, the password"},
		"TLS wanted":          {with(func(u *url.URL) { u.RawQuery = "sslmode=require"; u.Host = "127.0.0.1:1" }), "no answer from PostgreSQL"},
		"no tables":           {testservers.EmptyPostgresURL(t), "run 'apikey migrate'"},
		"old tables":          {old, "older than this program: run 'apikey migrate'"},
		"a role that may not": {with(func(u *url.URL) { u.User = url.UserPassword(role, "p") }), "this role may not do that"},
	} {
		t.Run(name, func(t *testing.T) {
			s := shell{databaseURL: c.url}
			s.refuse(t, "", c.want, "keys", "list", "--org", "acme")
			_, fault, status := s.run(t, "", "keys", "list", "--org", "acme", "--json")
			var e struct{ Error string }
			if err := json.Unmarshal([]byte(fault), &e); err != nil || !strings.Contains(e.Error, c.want) || status != 1 {
				t.Errorf("for programs: status %d, %s", status, fault)
			}
		})
	}
	t.Run("PgBouncer", func(t *testing.T) {
		s := shell{databaseURL: testservers.PgBouncer(t, good)}
		for range 5 {
			s.must(t, "", "keys", "list", "--org", "acme")
		}
	})
	t.Run("not there", func(t *testing.T) {
		for _, args := range [][]string{
			{"keys", "delete", "--org", "acme", "--id", "00000000-0000-0000-0000-000000000000"}, {"plan", "show", "--org", "nobody"},
			{"explain", "--id", "00000000-0000-0000-0000-000000000000"},
		} {
			if _, _, status := (shell{databaseURL: good}).run(t, "", args...); status != 3 {
				t.Errorf("%v: exit status %d, want 3", args, status)
			}
		}
	})
	t.Run("version", func(t *testing.T) {
		if out := (shell{}).must(t, "", "version"); !strings.Contains(out, "go1.") {
			t.Errorf("version prints %q", out)
		}
	})
}

// TestRoles: the roles of the documents are enough for the commands that they are for.
func TestRoles(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	owner := testservers.PostgresURL(t)
	pool := testservers.Pool(t, owner)
	as := func(role string) shell {
		block := regexp.MustCompile("(?s)```sql\n(CREATE ROLE " + role + ".*?)```").FindSubmatch(text)
		if block == nil {
			t.Fatalf("there is no SQL that creates %s", role)
		}
		name := role + "_" + strings.ToLower(pool.Config().ConnConfig.Database[12:])
		sql := strings.ReplaceAll(string(block[1]), role, name) + "; ALTER ROLE " + name + " PASSWORD 'p'"
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_, _ = testservers.Pool(t, owner).Exec(context.Background(), "DROP OWNED BY "+name+"; DROP ROLE "+name)
		})
		u, err := url.Parse(owner)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword(name, "p")
		return shell{databaseURL: u.String()}
	}
	admin, reader := as("apikey_admin"), as("apikey_reader")
	admin.must(t, "", "plan", "define", "--tier", "starter", "--api")
	admin.must(t, "", "plan", "set", "--org", "acme", "--tier", "starter")
	made := decode[keyJSON](t, admin, "", "keys", "create", "--org", "acme")
	made = decode[keyJSON](t, admin, "", "keys", "rotate", "--org", "acme", "--id", made.ID)
	admin.must(t, "a-key-from-elsewhere", "keys", "import", "--org", "acme")
	for _, args := range [][]string{
		{"keys", "list", "--org", "acme"}, {"keys", "deactivate", "--org", "acme", "--id", made.ID}, {"keys", "activate", "--org", "acme", "--id", made.ID},
		{"explain", "--id", made.ID}, {"plan", "show", "--org", "acme"}, {"doctor"}, {"keys", "prune"}, {"keys", "delete", "--org", "acme", "--id", made.ID}, {"migrate"},
	} {
		admin.must(t, "", args...)
	}
	reader.must(t, "", "doctor")
	reader.must(t, "", "migrate") // nothing is missing
	reader.refuse(t, "", "this role may not do that", "keys", "list", "--org", "acme")
}

// TestRedisAsItIs: a cluster, and a user who may only do what a cache does.
func TestRedisAsItIs(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	_, addrs := testservers.StartRedisCluster(t, 3)
	_, limited := testservers.StartRedisTCP(t)
	if err := testservers.RedisAt(t, "redis://"+limited).Do(t.Context(), "ACL", "SETUSER", "cache", "on", ">p", "~apikey:*", "-@all", "+getrange", "+set").Err(); err != nil {
		t.Fatal(err)
	}
	for name, redisURL := range map[string]string{"a cluster": "redis://" + addrs[0], "a user with GETRANGE and SET": "redis://cache:p@" + limited} {
		t.Run(name, func(t *testing.T) {
			s := shell{testservers.PostgresURL(t), redisURL}
			s.must(t, "", "plan", "define", "--tier", "starter", "--api")
			s.must(t, "", "plan", "set", "--org", "acme", "--tier", "starter")
			for _, found := range decode[[]finding](t, s, "", "doctor") {
				if found.State == stateFault {
					t.Errorf("doctor: %+v", found)
				}
			}
			for range 3 {
				made := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme")
				if e := decode[explanation](t, s, made.Key, "explain"); e.RedisFault != "" || len(e.Redis) != 2 || e.Verdict != "admitted" {
					t.Errorf("explained as %+v", e)
				}
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		s := shell{testservers.PostgresURL(t), "redis://127.0.0.1:1"}
		made := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme")
		if e := decode[explanation](t, s, made.Key, "explain"); e.Code != "PLAN_EXPIRED" || !strings.Contains(e.RedisFault, "no answer from Redis") {
			t.Errorf("explained as %+v", e)
		}
	})
}

// TestNobodyHasSeenIt: a key that could not be shown was not made, and the one that it
// takes the place of lives.
func TestNobodyHasSeenIt(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	old := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme")
	closed, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	defer w.Close()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for name, out := range map[string]*os.File{"a full disk": full, "a closed pipe": w} {
		for _, args := range [][]string{
			{"keys", "create", "--org", "acme"}, {"keys", "create", "--org", "acme", "--json"}, {"keys", "rotate", "--org", "acme", "--id", old.ID, "--overlap", "0s"},
		} {
			cmd := exec.Command(binary, args...)
			cmd.Env = append(os.Environ(), "DATABASE_URL="+s.databaseURL)
			cmd.Stdout = out
			if err := cmd.Run(); err == nil {
				t.Errorf("%s: %v succeeds", name, args)
			}
		}
	}
	if list := decode[[]keyJSON](t, s, "", "keys", "list", "--org", "acme"); len(list) != 1 || list[0].State != "active" {
		t.Errorf("there are %+v", list)
	}
}

// TestInterrupted: a command that waits for input ends when it is told to, and has held
// no transaction open meanwhile.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	pool := testservers.Pool(t, s.databaseURL)
	for _, args := range [][]string{{"keys", "import", "--org", "acme"}, {"explain"}} {
		stdin, w := io.Pipe()
		cmd := exec.Command(binary, args...)
		cmd.Env = append(os.Environ(), "DATABASE_URL="+s.databaseURL)
		var fault strings.Builder
		cmd.Stdin, cmd.Stderr = stdin, &fault
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond) // until it waits
		var open int
		if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'`).Scan(&open); err != nil || open > 0 {
			t.Errorf("%v: %d transactions are open, %v", args, open, err)
		}
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = cmd.Process.Wait()
		}()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Errorf("%v goes on", args)
			_ = cmd.Process.Kill()
		}
		_ = w.Close()
	}
}

// TestRotateByCommand: what nobody asks for stays as it is.
func TestRotateByCommand(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	old := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme", "--test", "--expires", "30d")
	for _, c := range []struct {
		args []string
		same bool
	}{{nil, true}, {[]string{"--expires", "60d"}, false}, {[]string{"--expires", "never"}, false}} {
		made := decode[keyJSON](t, s, "", slices.Concat([]string{"keys", "rotate", "--org", "acme", "--id", old.ID, "--overlap", "7d"}, c.args)...)
		if !strings.HasPrefix(made.Key, "tpk_test_") || made.Environment != string(admin.EnvironmentTest) {
			t.Errorf("%v: another environment: %+v", c.args, made.Environment)
		}
		if same := made.ExpiresAt != nil && made.ExpiresAt.Equal(*old.ExpiresAt); same != c.same {
			t.Errorf("%v: it ends at %v, the old one at %v", c.args, fmt.Sprint(made.ExpiresAt), old.ExpiresAt)
		}
	}
}

// TestManyByCommand: what would be done is told before it is.
func TestManyByCommand(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	for range 3 {
		s.must(t, "", "keys", "create", "--org", "acme")
	}
	if _, err := testservers.Pool(t, s.databaseURL).Exec(t.Context(), `INSERT INTO api_keys (org_id, key_hash, expires_at) VALUES ('old', sha256('k'), now() - interval '100 days')`); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{"3 active keys of acme would be", []string{"keys", "deactivate-all", "--org", "acme", "--dry-run"}},
		{"3 active keys of acme were", []string{"keys", "deactivate-all", "--org", "acme"}},
		{"0 active keys of acme were", []string{"keys", "deactivate-all", "--org", "acme"}},
		{"0 keys would be", []string{"keys", "prune", "--expired", "120d", "--dry-run"}},
		{"1 keys would be", []string{"keys", "prune", "--dry-run"}},
		{"1 keys were", []string{"keys", "prune"}},
	} {
		if out := s.must(t, "", c.args...); !strings.Contains(out, c.want) {
			t.Errorf("%v: %q, want %q", c.args, out, c.want)
		}
	}
}
