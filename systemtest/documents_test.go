package systemtest

// What the documents say is true: programs compile, commands and SQL run, and the tests
// and files that they name are there.

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// document returns the text of a document.
func document(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	world.MustNot(t, err)
	return string(text)
}

func readme(t *testing.T) string { return document(t, "README.md") }

// documents are all of them.
func documents(t *testing.T) (names []string) {
	t.Helper()
	for _, pattern := range []string{"*.md", "*/*.md", "*/*/*.md"} {
		files, err := filepath.Glob(pattern)
		world.MustNot(t, err)
		names = append(names, files...)
	}
	return names
}

// TestReadmeProgram builds the program, and runs it as the role for services: it admits a
// key, and when it is told to end it has written when that was used.
func TestReadmeProgram(t *testing.T) {
	t.Parallel()
	program := regexp.MustCompile("(?s)```go\n(package main.*?)```").FindStringSubmatch(readme(t))
	if program == nil {
		t.Fatal("the README has no program")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	world.MustNot(t, err)
	addr := listener.Addr().String()
	world.MustNot(t, listener.Close())
	dir := t.TempDir()
	file, binary := filepath.Join(dir, "main.go"), filepath.Join(dir, "service")
	world.MustNot(t, os.WriteFile(file, []byte(strings.Replace(program[1], `":8080"`, strconv.Quote(addr), 1)), 0o600))
	for _, args := range [][]string{{"vet", file}, {"build", "-o", binary, file}} {
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}

	w := world.NewPostgres(t)
	url, _ := asReader(t, w, true)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	cmd := exec.Command(binary)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+url, "REDIS_URL="+testservers.RedisURL(t), fmt.Sprintf("APIKEY_CACHE_SECRET=%x", world.NewSecret()))
	var log lines
	cmd.Stdout, cmd.Stderr = &log, &log
	world.MustNot(t, cmd.Start())
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer cmd.Process.Kill() //nolint:errcheck // it has ended
	var body []byte
	world.WaitFor(t, func() bool {
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+addr+"/v1/whoami", nil)
		world.MustNot(t, err)
		r.Header.Set("Authorization", "Bearer "+apiKey)
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, _ = io.ReadAll(resp.Body)
		return resp.StatusCode == http.StatusOK
	})
	http.DefaultClient.CloseIdleConnections()
	if want := org.ID + " " + org.KeyID + " starter\n"; string(body) != want {
		t.Errorf("it answers %q, want %q", body, want)
	}
	resp, err := http.Get("http://" + addr + "/v1/whoami")
	world.MustNot(t, err)
	body, err = io.ReadAll(resp.Body)
	world.MustNot(t, err)
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(readme(t), "\n    "+string(body)+"\n") {
		t.Errorf("without a key it answers %d %s, which is not in the README", resp.StatusCode, body)
	}
	world.MustNot(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := <-exited; err != nil {
		t.Errorf("it ends with %v\n%s", err, log.take())
	}
	if info, err := admin.NewKeys(w.Pool).Find(t.Context(), org.KeyID); err != nil || info.LastUsedAt.IsZero() {
		t.Errorf("the last use is not written: %v, %v\n%s", info.LastUsedAt, err, log.take())
	}
}

// TestSnippets compiles the Go of the documents that is no program.
func TestSnippets(t *testing.T) {
	t.Parallel()
	const around = `package snippet

import (
	"context"
	"net/http/httputil"
	"net/url"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
)

var _, _, _ = os.Getenv, pgxpool.New, httputil.NewSingleHostReverseProxy

func _(ctx context.Context, upstream *url.URL, cache *apikey.Cache) {
	%s
}
`
	n := 0
	for _, name := range documents(t) {
		for _, snippet := range regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(document(t, name), -1) {
			if strings.HasPrefix(snippet[1], "package main") {
				continue
			}
			n++
			file := filepath.Join(t.TempDir(), "snippet.go")
			world.MustNot(t, os.WriteFile(file, fmt.Appendf(nil, around, snippet[1]), 0o600))
			out, _ := exec.Command("go", "build", "-gcflags=-e", file).CombinedOutput()
			for line := range strings.Lines(string(out)) {
				if !strings.HasPrefix(line, "#") && !strings.Contains(line, "declared and not used") {
					t.Errorf("%s: %s%s", name, line, snippet[1])
				}
			}
		}
	}
	if n < 2 {
		t.Errorf("the documents have %d snippets only", n)
	}
}

// TestReadmeCommands runs the block that begins with DATABASE_URL, on a database
// of the test's own.
func TestReadmeCommands(t *testing.T) {
	t.Parallel()
	block := regexp.MustCompile(`(?m)^    export DATABASE_URL=\S+\n((?:    .+\n)+)`).FindStringSubmatch(readme(t))
	if block == nil || strings.Count(block[1], "\n") < 7 {
		t.Fatalf("the README has no commands: %q", block)
	}
	file := filepath.Join(t.TempDir(), "key")
	world.MustNot(t, os.WriteFile(file, []byte(keyformat.New(keyformat.Live)), 0o600))
	cmd := exec.Command("sh", "-ec", strings.ReplaceAll(block[1], "file-with-the-key", file))
	cmd.Env = append(os.Environ(), "DATABASE_URL="+testservers.EmptyPostgresURL(t), "REDIS_URL=")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "CI") || !strings.Contains(string(out), "INVALID_API_KEY") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestReadmeNames: each test that is said to show something exists.
func TestReadmeNames(t *testing.T) {
	var sources strings.Builder
	for _, pattern := range []string{"*_test.go", "*/*_test.go", "*/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		world.MustNot(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			world.MustNot(t, err)
			sources.Write(text)
		}
	}
	n := 0
	for _, name := range documents(t) {
		text := document(t, name)
		for _, test := range regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z]\\w+)`").FindAllStringSubmatch(text, -1) {
			n++
			if !strings.Contains(sources.String(), "func "+test[1]+"(") {
				t.Errorf("%s: there is no %s", name, test[1])
			}
		}
		for _, link := range regexp.MustCompile(`\]\(([^)#:]+)[#)]`).FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(name), link[1])); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if n < 60 {
		t.Errorf("the documents name %d tests only", n)
	}
}

// TestAlterType: the way to change the type of a column that triggers look at.
func TestAlterType(t *testing.T) {
	t.Parallel()
	block := regexp.MustCompile("(?s)```sql\n(BEGIN;.*?COMMIT;)\n```").FindStringSubmatch(document(t, "docs/operations.md"))
	if block == nil {
		t.Fatal("there is no such SQL")
	}
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `INSERT INTO api_keys (org_id, key_hash) VALUES ('o', sha256('k'))`)
	testservers.Exec(t, pool, block[1])
	testservers.Exec(t, pool, `TRUNCATE apikey_outbox`)
	testservers.Exec(t, pool, `SET session_replication_role = replica; UPDATE api_keys SET active = false; RESET session_replication_role`)
	var waiting int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox`).Scan(&waiting); err != nil || waiting != 1 {
		t.Errorf("%d changes wait to be announced, %v, want 1", waiting, err)
	}
}

// TestRenameSchema: the documented way to rename the schema keeps changes announced.
func TestRenameSchema(t *testing.T) {
	t.Parallel()
	block := regexp.MustCompile("(?s)```sql\n(BEGIN;\nALTER SCHEMA app.*?COMMIT;)\n```").FindStringSubmatch(document(t, "docs/operations.md"))
	if block == nil {
		t.Fatal("there is no such SQL")
	}
	url := testservers.EmptyPostgresURL(t)
	super := testservers.Pool(t, url)
	testservers.Exec(t, super, `CREATE SCHEMA app`)
	testservers.Migrated(t, url+"&search_path=app")
	testservers.Exec(t, super, block[1])
	pool := testservers.Pool(t, url+"&search_path=keys")
	testservers.Exec(t, pool, `INSERT INTO plan_catalogue VALUES ('starter', true); INSERT INTO org_plans (org_id, plan, status) VALUES ('o', 'starter', 'active');
		INSERT INTO api_keys (org_id, key_hash) SELECT 'o', sha256(i::text::bytea) FROM generate_series(1, 5000) i; SELECT apikey_tidy()`)
	testservers.Exec(t, pool, `SELECT apikey_announce()`)
	testservers.Exec(t, pool, `TRUNCATE api_keys CASCADE`)
	var waiting int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox`).Scan(&waiting); err != nil || waiting != 1 {
		t.Errorf("%d changes wait to be announced, %v, want 1", waiting, err)
	}
	var announced bool
	if err := pool.QueryRow(t.Context(), `SELECT has_function_privilege('pg_monitor', 'apikey_announce()', 'EXECUTE')`).Scan(&announced); err != nil || announced {
		t.Errorf("the new functions are for everybody: %v, %v", announced, err)
	}
}

// TestReadmeScanner: the pattern for secret scanners finds keys, and no less.
func TestReadmeScanner(t *testing.T) {
	pattern := regexp.MustCompile("`(.btpk_[^`]*)`").FindStringSubmatch(document(t, "docs/security.md"))
	if pattern == nil {
		t.Fatal("there is no pattern for scanners")
	}
	scanner := regexp.MustCompile(pattern[1])
	for _, env := range []keyformat.Environment{keyformat.Live, keyformat.Test} {
		key := keyformat.New(env)
		if got := scanner.FindString(`{"key": "` + key + `"}`); got != key {
			t.Errorf("found %q in a line with %s", got, key)
		}
		if got := scanner.FindString(key + "0"); got != "" {
			t.Errorf("found %q in what is no key", got)
		}
	}
}
