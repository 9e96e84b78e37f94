package examples

// What services have beside authentication: CORS outside of it, a rate limit for
// each organisation and row-level security inside.

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-chi/httprate"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/rs/cors"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/apikeyclient"
	"github.com/trackpilots/apikey/internal/testservers"
)

// withCORS is a service with CORS. A preflight carries no key, so CORS stands
// outside, and answers it; refusals get its headers too, so that scripts can read
// them.
func withCORS(auth *apikey.Middleware, mux http.Handler) http.Handler {
	c := cors.New(cors.Options{AllowedOrigins: []string{"https://app.example.com"}, AllowedHeaders: []string{"Authorization"}})
	return c.Handler(auth.Handler(mux))
}

func TestCORS(t *testing.T) {
	w := newWorld()
	h := withCORS(apikey.New(w, w, nil), http.HandlerFunc(whoami))
	for name, c := range map[string]struct {
		method, key string
		status      int
	}{
		"preflight": {"OPTIONS", "", 204}, "admitted": {"GET", w.good, 200}, "refused": {"GET", "", 401},
	} {
		r := httptest.NewRequest(c.method, "/", nil)
		r.Header.Set("Origin", "https://app.example.com")
		if c.method == "OPTIONS" {
			r.Header.Set("Access-Control-Request-Method", "GET")
			r.Header.Set("Access-Control-Request-Headers", "authorization")
		}
		if c.key != "" {
			r.Header.Set("Authorization", "Bearer "+c.key)
		}
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Code != c.status || rec.Header().Get("Access-Control-Allow-Origin") != "https://app.example.com" {
			t.Errorf("%s: %d, %v", name, rec.Code, rec.Header())
		}
	}
}

// errRateLimited is answered in the envelope that all errors share.
var errRateLimited = &apikey.Error{
	StatusCode: http.StatusTooManyRequests, StatusMessage: "Too many requests", Message: "Rate limit exceeded", Code: "RATE_LIMITED",
}

// withRateLimit is a service in which each organisation has so many requests a
// minute, by however many keys.
func withRateLimit(auth *apikey.Middleware, mux http.Handler, requests int) http.Handler {
	limit := httprate.LimitBy(requests, time.Minute,
		func(r *http.Request) (string, error) {
			org, _ := apikey.OrgFromContext(r.Context())
			return org.ID, nil
		},
		httprate.WithLimitHandler(func(w http.ResponseWriter, r *http.Request) { apikey.WriteError(w, r, errRateLimited) }))
	return auth.Handler(limit(mux))
}

func TestRateLimit(t *testing.T) {
	w := newWorld()
	w.Subscribe("org_2", apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true})
	_, second := w.Create("org_1", admin.NewKey{})
	h := withRateLimit(apikey.New(w, w, nil), http.HandlerFunc(whoami), 3)
	for i, c := range []struct {
		key    string
		status int
	}{
		{w.good, 200}, {second, 200}, {w.good, 200}, {second, 429}, {w.good, 429}, {w.unpaid, 200}, {w.dead, 401},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+c.key)
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Code != c.status {
			t.Errorf("request %d: %d %s, want %d", i, rec.Code, rec.Body, c.status)
		}
		if err := apikeyclient.FromResponse(rec.Result()); c.status == 429 && err == nil || err != nil && c.status == 200 {
			t.Errorf("request %d: %v", i, err)
		}
	}
}

// rowSecurity lets a role see the rows of one organisation: that of the setting
// app.org_id, and none if that is not set.
const rowSecurity = `
	CREATE TABLE reports (id int, org_id text NOT NULL, title text);
	ALTER TABLE reports ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
	CREATE POLICY own ON reports USING (org_id = current_setting('app.org_id', true));
	INSERT INTO reports VALUES (1, 'org_1', 'ours'), (2, 'org_2', 'theirs');`

// asOrg runs do in a transaction that sees the rows of the authenticated
// organisation. The setting ends with the transaction, so that the next user of the
// connection does not inherit it.
func asOrg(ctx context.Context, pool *pgxpool.Pool, do func(pgx.Tx) error) error {
	org, ok := apikey.OrgFromContext(ctx)
	if !ok {
		return fmt.Errorf("no organisation in the context: is the handler behind the middleware?")
	}
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT set_config('app.org_id', $1, true)`, org.ID); err != nil {
			return err
		}
		return do(tx)
	})
}

func TestRowLevelSecurity(t *testing.T) {
	url := testservers.EmptyPostgresURL(t)
	owner := testservers.Pool(t, url)
	role := "app_" + owner.Config().ConnConfig.Database[12:] // superusers see all
	if _, err := owner.Exec(t.Context(), fmt.Sprintf(`%s; CREATE ROLE %[2]s; GRANT SELECT ON reports TO %[2]s`, rowSecurity, role)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := owner.Exec(context.WithoutCancel(t.Context()), fmt.Sprintf(`DROP OWNED BY %[1]s; DROP ROLE %[1]s`, role)); err != nil {
			t.Error(err)
		}
	})
	config := owner.Config()
	config.MaxConns = 1 // so that every request has the same connection
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "SET ROLE "+role)
		return err
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()

	titles := func(ctx context.Context) (titles []string, err error) {
		err = asOrg(ctx, pool, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, `SELECT title FROM reports`)
			if err != nil {
				return err
			}
			titles, err = pgx.CollectRows(rows, pgx.RowTo[string])
			return err
		})
		return titles, err
	}
	w := newWorld()
	h := apikey.New(w, w, nil).Handler(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		titles, err := titles(r.Context())
		fmt.Fprint(rw, titles, err)
	}))
	w.Subscribe("org_2", apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true})
	for _, c := range []struct{ key, want string }{{w.good, "[ours] <nil>"}, {w.unpaid, "[theirs] <nil>"}, {w.good, "[ours] <nil>"}} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+c.key)
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		if rec.Body.String() != c.want {
			t.Errorf("sees %s, want %s", rec.Body, c.want)
		}
	}
	var n int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM reports`).Scan(&n); err != nil || n != 0 {
		t.Errorf("without an organisation: %d rows, %v; want none", n, err)
	}
	if _, err := titles(t.Context()); err == nil {
		t.Error("a handler that is not behind the middleware reads")
	}
}
