package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

const cacheSecret = "a secret of the caches, 32 bytes long or more"

// A shell runs the command as an operator does, with the servers in its
// environment.
type shell struct {
	databaseURL, redisURL string
}

// run runs the command with a standard input, and returns what it prints and its
// exit status.
func (s shell) run(t *testing.T, stdin string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "DATABASE_URL="+s.databaseURL, "REDIS_URL="+s.redisURL, "APIKEY_CACHE_SECRET="+cacheSecret)
	cmd.Stdin = strings.NewReader(stdin)
	var out, fault strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &fault
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), fault.String(), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.String(), fault.String(), 0
}

// must runs the command and wants it to succeed.
func (s shell) must(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	stdout, stderr, status := s.run(t, stdin, args...)
	if status != 0 || stderr != "" {
		t.Fatalf("%q: exit status %d\n%s%s", args, status, stdout, stderr)
	}
	return stdout
}

// refuse runs the command and wants it to fail with one line that says want.
func (s shell) refuse(t *testing.T, stdin, want string, args ...string) {
	t.Helper()
	stdout, stderr, status := s.run(t, stdin, args...)
	if status != 1 && status != 3 || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 || stdout != "" || strings.Contains(stderr, "tpk_live_") {
		t.Errorf("%q: exit status %d, want 1 and one line with %q\n%s%s", args, status, want, stdout, stderr)
	}
}

// decode runs the command with --json and decodes what it prints.
func decode[V any](t *testing.T, s shell, stdin string, args ...string) (v V) {
	t.Helper()
	out := s.must(t, stdin, append(args, "--json")...)
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return v
}

// serve starts a replica that uses the servers of s, and returns what asks it and
// waits for an answer.
func (s shell) serve(t *testing.T) (wantCode func(key, want string)) {
	t.Helper()
	pool := testservers.Pool(t, s.databaseURL)
	cache := apikey.NewCache(testservers.RedisAt(t, s.redisURL), []byte(cacheSecret), nil)
	world.Watch(t, cache, pool)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error)
	uses := apikey.NewLastUsed(pool, 50*time.Millisecond)
	go func() { done <- uses.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	world.Ready(t, cache)
	auth := apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache, LastUsed: uses})
	h := auth.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		org, _ := apikey.OrgFromContext(r.Context())
		fmt.Fprintf(w, `{"orgId":"%s"}`, org.ID)
	}))
	return func(key, want string) {
		t.Helper()
		var w *httptest.ResponseRecorder
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			r := httptest.NewRequest("GET", "/v1/whoami", nil)
			r.Header.Set("Authorization", "Bearer "+key)
			w = httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if strings.Contains(w.Body.String(), `"`+want+`"`) {
				return
			}
		}
		t.Fatalf("answered %s, want %s", w.Body, want)
	}
}

// TestStory is the life of a customer, by the command, while a replica serves.
func TestStory(t *testing.T) {
	t.Parallel()
	s := shell{testservers.EmptyPostgresURL(t), testservers.RedisURL(t)}
	if _, stderr, status := s.run(t, "", "doctor"); status != 1 || !strings.Contains(stderr, "faults were found") {
		t.Errorf("doctor before there are tables: %d\n%s", status, stderr)
	}
	s.must(t, "", "migrate")
	s.must(t, "", "migrate")
	s.must(t, "", "plan", "define", "--tier", "starter", "--api")
	s.must(t, "", "plan", "define", "--tier", "basic", "--api=false")
	s.must(t, "", "plan", "set", "--org", "acme", "--tier", "starter")
	wantCode := s.serve(t)
	explained := func(stdin, code, verdict string, args ...string) {
		t.Helper()
		e := decode[explanation](t, s, stdin, append([]string{"explain"}, args...)...)
		if e.Code != code || !strings.Contains(e.Verdict, verdict) {
			t.Errorf("explained as %+v, want %q, %q", e, code, verdict)
		}
		text := s.must(t, stdin, append([]string{"explain"}, args...)...)
		if !strings.Contains(text, verdict) {
			t.Errorf("explained as\n%s, want %q", text, verdict)
		}
		if key := strings.TrimSpace(stdin); key != "" && strings.Contains(text, key[9:]) {
			t.Errorf("the key is shown:\n%s", text)
		}
	}

	first := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme", "--name", "CI")
	wantCode(first.Key, "acme")
	explained(first.Key, "", "admitted")
	explained("", "", "admitted", "--id", first.ID)

	second := decode[keyJSON](t, s, "", "keys", "rotate", "--org", "acme", "--id", first.ID, "--overlap", "3s")
	wantCode(first.Key, "acme")
	wantCode(second.Key, "acme")
	wantCode(first.Key, "INVALID_API_KEY") // when the overlap ends
	explained(first.Key, "INVALID_API_KEY", "the key expired at ")
	wantCode(second.Key, "acme")

	s.must(t, "", "keys", "deactivate", "--org", "acme", "--id", second.ID)
	wantCode(second.Key, "INVALID_API_KEY")
	explained(second.Key, "INVALID_API_KEY", "the key is deactivated")
	explained("", "INVALID_API_KEY", "the key is deactivated", "--id", second.ID)
	s.must(t, "", "keys", "activate", "--org", "acme", "--id", second.ID)
	wantCode(second.Key, "acme")

	for _, c := range []struct {
		verdict string
		set     []string
	}{
		{"the subscription is past_due, not active", []string{"--status", "past_due"}},
		{"the tier basic does not include the API", []string{"--status", "active", "--tier", "basic"}},
		{"the plan ended at ", []string{"--tier", "starter", "--ends", "-1h"}},
	} {
		s.must(t, "", append([]string{"plan", "set", "--org", "acme"}, c.set...)...)
		wantCode(second.Key, "PLAN_EXPIRED")
		explained(second.Key, "PLAN_EXPIRED", c.verdict)
	}
	s.must(t, "", "plan", "set", "--org", "acme", "--ends", "720h")
	wantCode(second.Key, "acme")
	explained(second.Key, "", "admitted")

	time.Sleep(200 * time.Millisecond) // for the last use
	list := decode[[]keyJSON](t, s, "", "keys", "list", "--org", "acme")
	if len(list) != 2 || list[0].State != "expired" || list[1].State != "active" || list[0].Name != "CI" || list[1].Name != "CI" ||
		list[0].LastUsedAt == nil || list[1].LastUsedAt == nil || list[0].Key != "" || list[1].Hint != second.Key[9:15] {
		t.Errorf("the list is %+v", list)
	}
	text := s.must(t, "", "keys", "list", "--org", "acme")
	if !strings.Contains(text, "LAST USED") || !strings.Contains(text, second.ID) || strings.Contains(text, second.Key) {
		t.Errorf("the list is\n%s", text)
	}

	s.must(t, "", "keys", "delete", "--org", "acme", "--id", second.ID)
	wantCode(second.Key, "INVALID_API_KEY")
	explained(second.Key, "INVALID_API_KEY", "no such key is on record")
	s.refuse(t, "", "there is no key with this id", "explain", "--id", second.ID)

	for _, state := range decode[[]finding](t, s, "", "doctor") {
		if state.State != stateOK && state.Check != "rights" { // a superuser has migrated
			t.Errorf("doctor: %+v", state)
		}
	}
}

// TestExplainHeaders: what is wrong with a header is told, and the header is not.
func TestExplainHeaders(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	key := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme").Key
	for stdin, want := range map[string][2]string{
		"Bearer " + key:                 {"PLAN_EXPIRED", "the organisation has no subscription"},
		"bearer   " + key:               {"PLAN_EXPIRED", "the organisation has no subscription"},
		"\n  " + key + " \r\n\n":        {"PLAN_EXPIRED", "the organisation has no subscription"},
		"\ufeff" + key + "\r\n":         {"PLAN_EXPIRED", "the organisation has no subscription"},
		"Authorization: Bearer " + key:  {"PLAN_EXPIRED", "the organisation has no subscription"},
		"Token " + key:                  {"INVALID_API_KEY_SCHEMA", "its scheme is not Bearer"},
		"Bearer":                        {"API_KEY_MISSING", "nothing follows Bearer"},
		"Bearer " + key + " " + key:     {"INVALID_API_KEY", "more than one key follows Bearer"},
		key[:57]:                        {"INVALID_API_KEY", "mistyped, cut off or made up"},
		strings.Repeat("k", 513):        {"INVALID_API_KEY", "the key has 513 bytes, and 512 are the most"},
		`Bearer "` + key[:20] + `"`:     {"INVALID_API_KEY", "characters that a key cannot have"},
		"a-key-of-somebody-else-or-not": {"INVALID_API_KEY", "no such key is on record"},
	} {
		e := decode[explanation](t, s, stdin, "explain")
		if e.Code != want[0] || !strings.Contains(e.Verdict, want[1]) {
			t.Errorf("%q: %+v, want %q", stdin, e, want)
		}
		if text := s.must(t, stdin, "explain"); strings.Contains(text, key[9:17]) {
			t.Errorf("%q: the key is shown:\n%s", stdin, text)
		}
	}
	s.refuse(t, "", "standard input holds no key", "explain")
	s.refuse(t, "\n", "standard input holds no key", "explain")
	s.refuse(t, key+"\n"+key, "more than one line", "explain")
}

// TestExplainRedis: what Redis holds is told, with its age and stamp.
func TestExplainRedis(t *testing.T) {
	t.Parallel()
	s := shell{testservers.PostgresURL(t), testservers.StartRedis(t).URL}
	s.must(t, "", "plan", "define", "--tier", "starter", "--api")
	s.must(t, "", "plan", "set", "--org", "acme", "--tier", "starter")
	made := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme")
	states := func() (states [2]string) {
		e := decode[explanation](t, s, made.Key, "explain")
		if len(e.Redis) != 2 {
			t.Fatalf("explained as %+v", e)
		}
		for i, r := range e.Redis {
			states[i] = r.State
			if snapshot := regexp.MustCompile(`^\d+:\d+:`); (r.ReadAt != nil) != snapshot.MatchString(r.Snapshot) {
				t.Errorf("%+v", r)
			}
		}
		return states
	}
	if got, want := states(), [2]string{"none", "none"}; got != want {
		t.Errorf("before a request: %q, want %q", got, want)
	}
	same := "as in PostgreSQL"
	for deadline := time.Now().Add(20 * time.Second); states() != [2]string{same, same}; {
		s.serve(t)(made.Key, "acme") // another replica each time: a SET may fail on a busy machine
		if time.Now().After(deadline) {
			t.Fatalf("after a request: %q", states())
		}
	}
	s.must(t, "", "keys", "deactivate", "--org", "acme", "--id", made.ID)
	stale := "from before a change: not used once that is announced"
	if got, want := states(), [2]string{stale, same}; got != want {
		t.Errorf("after a change: %q, want %q", got, want)
	}
	rdb := testservers.RedisAt(t, s.redisURL)
	for _, name := range rdb.Keys(t.Context(), "*").Val() {
		if err := rdb.Set(t.Context(), name, "forged", 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	forged := "not sealed under this secret: ignored"
	if got, want := states(), [2]string{forged, "none"}; got != want {
		t.Errorf("forged: %q, want %q", got, want)
	}
	text := s.must(t, "", "explain", "--id", made.ID)
	if !strings.Contains(text, "apikey:3:key:") || strings.Contains(text, made.Key) {
		t.Errorf("explained as\n%s", text)
	}
}

func TestImport(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	pool := testservers.Pool(t, s.databaseURL)
	store := apikey.NewPostgresKeyStore(pool)
	imported := decode[[]keyJSON](t, s, "a-key-issued-elsewhere-1\n\na-key-issued-elsewhere-2\r\n", "keys", "import", "--org", "acme", "--name", "old")
	h := apikey.HashKey("a-key-issued-elsewhere-3")
	imported = append(imported, decode[[]keyJSON](t, s, fmt.Sprintf("%X", h), "keys", "import", "--org", "acme", "--sha256")...)
	if len(imported) != 3 || imported[0].Name != "old" {
		t.Errorf("imported %+v", imported)
	}
	for i, k := range imported {
		found, err := store.Key(t.Context(), apikey.HashKey(fmt.Sprintf("a-key-issued-elsewhere-%d", i+1)))
		if err != nil || found.ID != k.ID || found.OrgID != "acme" {
			t.Errorf("key %d is %+v, %v", i+1, found, err)
		}
	}
	for stdin, want := range map[string]string{
		"":     "standard input is empty",
		"\n\n": "standard input is empty",
		"a-new-key-issued-elsewhere\na-key-issued-elsewhere-1\n": "line 2, and nothing was imported: apikey: this key exists already",
		"a-new-key-issued-elsewhere\nshort\n":                    "line 2, and nothing was imported: apikey: key: use 16 to 512",
	} {
		s.refuse(t, stdin, want, "keys", "import", "--org", "acme")
	}
	s.refuse(t, "00ff", "64 hexadecimal digits", "keys", "import", "--org", "acme", "--sha256")
	if _, err := store.Key(t.Context(), apikey.HashKey("a-new-key-issued-elsewhere")); !errors.Is(err, apikey.ErrNotFound) {
		t.Errorf("half of a refused import is there: %v", err)
	}
}

// TestRefusals: what cannot be done is told in one line that says what to do.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	s.must(t, "", "plan", "define", "--tier", "starter", "--api=false")
	made := decode[keyJSON](t, s, "", "keys", "create", "--org", "acme")
	for _, c := range []struct {
		want string
		args []string
	}{
		{"has no key with this id", []string{"keys", "deactivate", "--org", "other", "--id", made.ID}},
		{"'apikey keys list' shows", []string{"keys", "rotate", "--org", "other", "--id", made.ID}},
		{"has no key with this id", []string{"keys", "delete", "--org", "acme", "--id", made.Key}},
		{"is in the past", []string{"keys", "create", "--org", "acme", "--expires", "-1h"}},
		{"use at most 255", []string{"keys", "create", "--org", "acme", "--name", strings.Repeat("n", 256)}},
		{"has no subscription: give --tier", []string{"plan", "set", "--org", "acme", "--status", "active"}},
		{`"gold" is not in plan_catalogue`, []string{"plan", "set", "--org", "acme", "--tier", "gold"}},
		{`"Active" is none of`, []string{"plan", "set", "--org", "acme", "--tier", "starter", "--status", "Active"}},
		{"has no subscription", []string{"plan", "show", "--org", "acme"}},
		{"no answer from PostgreSQL", []string{"keys", "list", "--org", "acme", "--database-url", "postgres://u@127.0.0.1:1/db"}},
		{"set DATABASE_URL", []string{"keys", "list", "--org", "acme", "--database-url", ""}},
	} {
		s.refuse(t, "", c.want, c.args...)
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{"--org is missing", []string{"keys", "create"}},
		{"--id is missing", []string{"keys", "delete", "--org", "acme"}},
		{"nothing to set", []string{"plan", "set", "--org", "acme"}},
		{"use a time such as", []string{"keys", "create", "--org", "acme", "--expires", "tomorrow"}},
		{"unexpected argument", []string{"keys", "list", "--org", "acme", "now"}},
		{"there is no such command", []string{"keys", "frobnicate"}},
		{"there is no such command", []string{"keys"}},
		{"say --api", []string{"plan", "define", "--tier", "starter"}},
		{"use a time such as", []string{"keys", "create", "--org", "acme", "--expires", ""}},
		{"--tier is empty", []string{"plan", "set", "--org", "acme", "--tier", ""}},
		{"use a time such as", []string{"plan", "set", "--org", "acme", "--ends", ""}},
		{"use a duration such as", []string{"keys", "rotate", "--org", "acme", "--id", made.ID, "--overlap", "soon"}},
		{"--overlap is negative", []string{"keys", "rotate", "--org", "acme", "--id", made.ID, "--overlap", "-1h"}},
	} {
		if stdout, stderr, status := s.run(t, "", c.args...); status != 2 || !strings.Contains(stderr, c.want) || stdout != "" {
			t.Errorf("%q: exit status %d, want 2 and %q\n%s%s", c.args, status, c.want, stdout, stderr)
		}
	}
}

func TestPlanShow(t *testing.T) {
	t.Parallel()
	s := shell{databaseURL: testservers.PostgresURL(t)}
	s.must(t, "", "plan", "define", "--tier", "starter", "--api")
	s.must(t, "", "plan", "set", "--org", "acme", "--tier", "starter", "--ends", "2100-01-01T00:00:00Z")
	s.must(t, "", "plan", "set", "--org", "acme", "--status", "cancelled") // and nothing else
	end := time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	got := decode[planJSON](t, s, "", "plan", "show", "--org", "acme")
	if got.EndsAt == nil || !got.EndsAt.Equal(end) {
		t.Errorf("ends at %v", got.EndsAt)
	}
	got.EndsAt = nil
	if want := (planJSON{OrgID: "acme", Tier: "starter", Status: "cancelled", APIAccess: true}); got != want {
		t.Errorf("the plan is %+v, want %+v", got, want)
	}
	s.must(t, "", "plan", "set", "--org", "acme", "--status", "active", "--ends", "never")
	if text := s.must(t, "", "plan", "show", "--org", "acme"); !regexp.MustCompile(`ends +never\nadmits requests +true`).MatchString(text) {
		t.Errorf("the plan is\n%s", text)
	}
}

// TestDoctor: each fault is found, and named.
func TestDoctor(t *testing.T) {
	t.Parallel()
	exec := func(t *testing.T, pool *pgxpool.Pool, sql string) {
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, sql, check, state, want string
	}{
		{"nothing", `SELECT 1`, "", "", ""},
		{"other tables", `DROP TABLE apikey_migrations; ALTER TABLE api_keys DROP COLUMN key_hash CASCADE`, "schema", stateFault, "a table api_keys already that is not of these migrations"},
		{"not always", `ALTER TABLE api_keys ENABLE TRIGGER apikey_announce_update`, "triggers", stateWarning, "api_keys.apikey_announce_update do not fire for logical replication"},
		{"no migration", `DELETE FROM apikey_migrations`, "schema", stateFault, "not applied: 0001_apikey.sql"},
		{"another tool", `DROP TABLE apikey_migrations`, "schema", stateOK, "made by another tool"},
		{"trigger disabled", `ALTER TABLE api_keys DISABLE TRIGGER apikey_announce_update`, "triggers", stateFault, "api_keys.apikey_announce_update is disabled"},
		{"trigger missing", `DROP TRIGGER apikey_announce_truncate ON org_plans`, "triggers", stateFault, "org_plans.apikey_announce_truncate is missing"},
		{
			"column not announced", `DROP TRIGGER apikey_announce_update ON api_keys; CREATE TRIGGER apikey_announce_update AFTER UPDATE ON api_keys
			FOR EACH ROW WHEN (OLD.active IS DISTINCT FROM NEW.active) EXECUTE FUNCTION apikey_announce_key()`,
			"columns", stateFault, "api_keys.expires_at, api_keys.id, api_keys.key_hash, api_keys.org_id",
		},
		{"tier not announced", `DROP TRIGGER apikey_announce_insert_delete ON plan_catalogue`, "triggers", stateFault, "plan_catalogue.apikey_announce_insert_delete is missing"},
		{"table gone", `ALTER TABLE org_plans RENAME TO o`, "lookups", stateFault, "does not exist"},
		{"anybody may use the functions", `GRANT EXECUTE ON FUNCTION apikey_announce_key() TO PUBLIC`, "rights", stateFault, "PUBLIC may EXECUTE apikey_announce_key()"},
		{"anybody may create", `GRANT CREATE ON SCHEMA public TO PUBLIC`, "rights", stateWarning, "PUBLIC may CREATE in the schema public"},
		{"a trigger of somebody on the outbox", `CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
			CREATE TRIGGER mine BEFORE INSERT ON apikey_outbox FOR EACH ROW EXECUTE FUNCTION mine()`, "rights", stateFault, "apikey_outbox has a trigger mine"},
		{"all on all tables", `GRANT ALL ON ALL TABLES IN SCHEMA public TO pg_monitor`, "rights", stateFault, "pg_monitor has TRIGGER on api_keys"},
		{"migrated by a superuser", `SELECT 1`, "rights", stateWarning, "who is superuser"},
		{
			"dead rows", `ALTER TABLE apikey_outbox SET (autovacuum_enabled = false); INSERT INTO apikey_outbox (kind, subject) SELECT 'plan', i FROM generate_series(1, 110000) i;
			DELETE FROM apikey_outbox; SELECT pg_stat_force_next_flush()`, "outbox", stateWarning, "110000 dead rows",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := shell{databaseURL: testservers.PostgresURL(t)}
			exec(t, testservers.Pool(t, s.databaseURL), c.sql)
			stdout, _, status := s.run(t, "", "doctor", "--json")
			var findings []finding
			if err := json.Unmarshal([]byte(stdout), &findings); err != nil {
				t.Fatal(err)
			}
			wantStatus := 0
			if c.state == stateFault {
				wantStatus = 1
			}
			if status != wantStatus {
				t.Errorf("exit status %d, want %d", status, wantStatus)
			}
			i := slices.IndexFunc(findings, func(found finding) bool { return found.Check == c.check })
			if c.check != "" && (i < 0 || findings[i].State != c.state || !strings.Contains(findings[i].Detail, c.want)) {
				t.Errorf("%+v, want %s with %q", findings, c.check, c.want)
			}
			if c.check == "" && slices.ContainsFunc(findings, func(found finding) bool {
				return found.State != stateOK && found.Check != "announcer" && found.Check != "rights"
			}) {
				t.Errorf("%+v", findings)
			}
		})
	}

	t.Run("Redis", func(t *testing.T) {
		t.Parallel()
		s := shell{testservers.PostgresURL(t), testservers.StartRedis(t, "--maxmemory", "10mb").URL}
		if out := s.must(t, "", "doctor"); !strings.Contains(out, "maxmemory-policy is noeviction") || !strings.Contains(out, "SET, and GET in") {
			t.Errorf("doctor says\n%s", out)
		}
		address, proxy := testservers.ProxyRedis(t, s.redisURL)
		proxy.Delay(40 * time.Millisecond) // of each round trip; connecting takes several
		s.redisURL = address
		for timeout, want := range map[string]string{
			"10s": "caches use it with a RedisTimeout of 10s", "1ms": "they never use it", "60ms": "they use it, but under load",
		} {
			world.WaitFor(t, func() bool { // on a busy machine it takes longer
				out, _, status := s.run(t, "", "doctor", "--redis-timeout", timeout)
				return strings.Contains(out, want) && (status == 1) == (timeout == "1ms")
			})
		}
		s.redisURL = "redis://127.0.0.1:1"
		if out, _, status := s.run(t, "", "doctor"); status != 1 || !strings.Contains(out, "no answer from Redis") {
			t.Errorf("doctor says %d\n%s", status, out)
		}
	})
	t.Run("PgBouncer", func(t *testing.T) {
		t.Parallel()
		s := shell{databaseURL: testservers.PgBouncer(t, testservers.PostgresURL(t)) + "&default_query_exec_mode=simple_protocol"}
		if out, _, status := s.run(t, "", "doctor"); status != 1 || !strings.Contains(out, "a pooler is in between") {
			t.Errorf("doctor says %d\n%s", status, out)
		}
		shared := testservers.Pool(t, s.databaseURL) // the connections to PostgreSQL that it leaves behind
		for range 20 {
			var listens int
			if err := shared.QueryRow(t.Context(), `SELECT count(*) FROM pg_listening_channels()`).Scan(&listens); err != nil || listens > 0 {
				t.Fatalf("a connection that others share listens to %d channels, %v", listens, err)
			}
		}
	})
	t.Run("PostgreSQL away", func(t *testing.T) {
		if out, _, status := (shell{databaseURL: "postgres://u@127.0.0.1:1/db"}).run(t, "", "doctor"); status != 1 || !strings.Contains(out, "no answer") {
			t.Errorf("doctor says %d\n%s", status, out)
		}
	})
}
