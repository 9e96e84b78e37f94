package systemtest

// What must not come out, and what nobody needs to be allowed.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// secretsFile is where the process that fails in every way writes the keys it
// used: all else that it writes is searched for them.
const secretsFile = "APIKEY_SECRETS_FILE"

// TestNoSecrets fails in every way in a process of its own, which prints whatever
// there is to print, and looks for eight characters of a key in it.
func TestNoSecrets(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "keys")
	cmd := exec.Command(os.Args[0], "-test.run=^TestFailInEveryWay$", "-test.v")
	cmd.Env = append(os.Environ(), secretsFile+"="+file)
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 2 {
		t.Fatalf("%v, want the exit status of a panic\n%s", err, out)
	}
	var keys []string
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &keys)
	}
	if err != nil || len(keys) < 10 {
		t.Fatalf("%d keys, %v\n%s", len(keys), err, out)
	}
	for _, want := range []string{
		"SERVICE_UNAVAILABLE", "PLAN_EXPIRED", "INVALID_API_KEY", "nil map", "does not exist", "level=WARN msg=refused", "http: panic serving",
		"apikey:3:key:", "panic: the last one", "OrgID:org_", "RedisErrors:4",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in the output, so not everything was tried", want)
		}
	}
	if part := world.PartOf(string(out)+keys[0][20:28], keys...); part != keys[0][20:28] {
		t.Error("the search does not find a part that is there")
	}
	if part := world.PartOf(string(out), keys...); part != "" {
		t.Errorf("%q is part of a key, and in the output:\n%s", part, out)
	}
}

// TestFailInEveryWay is the other process of TestNoSecrets.
func TestFailInEveryWay(t *testing.T) {
	file := os.Getenv(secretsFile)
	if file == "" {
		return // and not the process itself
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stdout, nil)))
	var keys []string
	w := world.NewPostgres(t)
	server := testservers.StartRedis(t)
	rdb := testservers.RedisAt(t, server.URL)
	show := func(values ...any) {
		for _, v := range values {
			fmt.Printf("%v\n%+v\n%#v\n", v, v, v)
			log.Print(v)
			slog.Info("shown", "value", v)
		}
	}
	with := func(cache *apikey.Cache) *apikey.Options {
		return &apikey.Options{Cache: cache, Observe: func(_ context.Context, d apikey.Decision) {
			show(d)
			slog.Warn("refused", "decision", d, "err", d.Err)
		}}
	}
	ask := func(m *apikey.Middleware, authorization string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", authorization)
		org, err := m.Authenticate(r)
		rec := httptest.NewRecorder()
		m.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			org, _ := apikey.OrgFromContext(r.Context())
			show(org)
		})).ServeHTTP(rec, r)
		show(org, err, rec.Code, rec.Header(), rec.Body.String())
		for ; err != nil; err = errors.Unwrap(err) {
			show(err)
		}
	}
	newKey := func(k world.KeyState, p world.PlanState) string {
		key, _ := w.Enrol(t, k, p)
		keys = append(keys, key)
		return key
	}
	newCache := func(rdb redis.UniversalClient, secret []byte) *apikey.Cache { return apikey.NewCache(rdb, secret, nil) }

	secret := world.NewSecret()
	cache := newCache(rdb, secret)
	auth := apikey.New(w, w, with(cache))
	good := newKey(world.Live, world.Paid)
	for _, authorization := range []string{
		"Bearer " + good, "Bearer " + newKey(world.Deactivated, world.Paid), "Bearer " + newKey(world.Unknown, world.Paid), "Bearer " + newKey(world.Expired, world.Paid),
		"Bearer " + newKey(world.Live, world.PastDue), "Bearer " + newKey(world.Live, world.NoSubscription),
		"Token " + good, good, "Bearer" + good, "Bearer " + good + " " + good, "Bearer " + good + "x", `Bearer "` + good + `"`,
		"Bearer " + good + strings.Repeat("x", 512), "Bearer \xff" + good, "Bearer " + strings.ToUpper(good), "Basic " + good,
	} {
		ask(auth, authorization)
	}
	world.WaitFor(t, func() bool { return rdb.DBSize(t.Context()).Val() > 2 })
	for _, name := range rdb.Keys(t.Context(), "*").Val() {
		show(name, rdb.Get(t.Context(), name).Val())
		world.MustNot(t, rdb.Set(t.Context(), name, "forged", 0).Err())
	}
	forged := newCache(rdb, secret)
	ask(apikey.New(w, w, with(forged)), "Bearer "+good)

	server.Crash(t)
	noRedis := newCache(rdb, secret)
	ask(apikey.New(w, w, with(noRedis)), "Bearer "+newKey(world.Live, world.Paid))
	fails := apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) { return apikey.Key{}, world.ErrStore })
	panics := apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) { panic("nil map") })
	for _, store := range []apikey.KeyStore{fails, panics, w} {
		broken := newCache(rdb, secret)
		if store == apikey.KeyStore(w) {
			testservers.Exec(t, w.Pool, `ALTER TABLE api_keys RENAME TO gone`)
		}
		for range 4 { // the last finds the breaker open
			ask(apikey.New(store, w, with(broken)), "Bearer "+newLostKey(&keys))
		}
		show(broken, broken.Stats())
	}
	ask(apikey.New(fails, w, with(nil)), "Bearer "+newLostKey(&keys))
	show(auth, cache, cache.Stats(), noRedis.Stats(), w.PostgresKeyStore, apikey.Key{}, apikey.Plan{})

	// A store that panics and has no cache before it: the server logs that.
	web := httptest.NewServer(apikey.New(panics, w, nil).Handler(http.NotFoundHandler()))
	r, err := http.NewRequest("GET", web.URL, nil)
	world.MustNot(t, err)
	r.Header.Set("Authorization", "Bearer "+newLostKey(&keys))
	if resp, err := http.DefaultClient.Do(r); err == nil {
		resp.Body.Close()
		t.Error("the server answers although the store panics")
	}
	web.Close()

	text, err := json.Marshal(keys)
	world.MustNot(t, err)
	world.MustNot(t, os.WriteFile(file, text, 0o600))
	apiKey := newLostKey(&keys)
	h := apikey.New(apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) { panic("the last one") }), w, nil)
	ask(h, "Bearer "+apiKey) // ends the process, with a stack trace
}

// newLostKey returns a well-formed key that no store has.
func newLostKey(keys *[]string) string {
	key := keyformat.New(keyformat.Live)
	*keys = append(*keys, key)
	return key
}

// asReader creates the role for services, as the documents have it, and returns the URL of
// the database for it. What recording last uses takes is granted, or returned.
func asReader(t *testing.T, w *world.Postgres, records bool) (readerURL, toRecord string) {
	t.Helper()
	block := regexp.MustCompile("(?s)```sql\n(CREATE ROLE apikey_reader.*?)(GRANT [^\n]*api_key_uses[^\n]*)\n```").FindStringSubmatch(document(t, "docs/operations.md"))
	if block == nil {
		t.Fatal("there is no SQL that creates apikey_reader")
	}
	role := "apikey_reader_" + strings.ToLower(w.Pool.Config().ConnConfig.Database[12:])
	testservers.Exec(t, w.Pool, strings.ReplaceAll(block[1], "apikey_reader", role))
	t.Cleanup(func() { testservers.Exec(t, w.Pool, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	testservers.Exec(t, w.Pool, "ALTER ROLE "+role+" PASSWORD 'reader'")
	toRecord = strings.ReplaceAll(block[2], "apikey_reader", role)
	if records {
		testservers.Exec(t, w.Pool, toRecord)
	}
	as, err := url.Parse(w.Pool.Config().ConnString())
	world.MustNot(t, err)
	as.User = url.UserPassword(role, "reader")
	return as.String(), toRecord
}

// TestReaderRole: the role for services is enough for the middleware, and for
// nothing else.
func TestReaderRole(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	readerURL, toRecord := asReader(t, w, false)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	pool := testservers.Pool(t, readerURL)
	r := world.NewWatchedReplica(t, pool, testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: time.Minute})
	r.WantCode(t, apiKey, world.Admitted)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE id = $1`, org.KeyID)
	world.WaitFor(t, func() bool { return r.Ask(apiKey) == world.Invalid })

	for _, sql := range []string{
		`UPDATE api_keys SET active = true`, `DELETE FROM api_keys`, `TRUNCATE api_keys`, `UPDATE org_plans SET status = 'active'`,
		`INSERT INTO plan_catalogue VALUES ('x', true)`, `UPDATE plan_catalogue SET api_access = true`, `SELECT name FROM api_keys`,
		`SELECT last_used_at FROM api_key_uses`, `SELECT * FROM organisations`, `DELETE FROM apikey_migrations`,
		`CREATE FUNCTION apikey_announce_key() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'`,
		`INSERT INTO apikey_outbox (kind) VALUES ('all')`, `DELETE FROM apikey_outbox`, `UPDATE apikey_announced SET seen = NULL`, `UPDATE apikey_settings SET announce_every = '1 minute'`,
	} {
		if _, err := pool.Exec(t.Context(), sql); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: %v, want permission denied", sql, err)
		}
	}

	// What recording last uses takes, on top of that.
	apiKey, org = w.Enrol(t, world.Live, world.Paid)
	record := func() error {
		uses := apikey.NewLastUsed(pool, 0)
		auth := world.Replica{Middleware: apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{LastUsed: uses})}
		auth.WantCode(t, apiKey, world.Admitted)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		return uses.Run(ended)
	}
	if err := record(); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("recording a use: %v, want permission denied", err)
	}
	testservers.Exec(t, w.Pool, toRecord)
	world.MustNot(t, record())
	if info, err := admin.NewKeys(w.Pool).Find(t.Context(), org.KeyID); err != nil || info.LastUsedAt.IsZero() {
		t.Errorf("last used %v, %v", info.LastUsedAt, err)
	}
}
