package apikey_test

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
	"os/signal"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
)

// A service's whole set-up, on PostgreSQL and Redis.
func Example() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	redisOptions, err := redis.ParseURL(os.Getenv("REDIS_URL"))
	if err != nil {
		log.Fatal(err)
	}
	redisOptions.ContextTimeoutEnabled = true
	rdb := redis.NewClient(redisOptions)
	secret := []byte(os.Getenv("APIKEY_CACHE_SECRET")) // at least 32 random bytes

	keys, plans := apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool)
	cache := apikey.NewCache(rdb, secret, nil)
	go cache.Watch(ctx, pool) //nolint:errcheck // an error is misuse: no pool, or watched already
	auth := apikey.New(keys, plans, &apikey.Options{Cache: cache})

	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/whoami", func(w http.ResponseWriter, r *http.Request) {
		org, _ := apikey.OrgFromContext(r.Context())
		fmt.Fprintln(w, org.ID)
	})
	log.Fatal(http.ListenAndServe(":8080", auth.Handler(mux)))
}

// exampleStores know one key, of an organisation on a paid plan.
func exampleStores() (apikey.KeyStore, apikey.PlanStore) {
	known := apikey.HashKey("a-key-issued-elsewhere")
	return apikey.KeyStoreFunc(func(_ context.Context, h apikey.KeyHash) (apikey.Key, error) {
			if h != known {
				return apikey.Key{}, apikey.ErrNotFound
			}
			return apikey.Key{ID: "key_1", OrgID: "org_1", Active: true}, nil
		}), apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) {
			return apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true}, nil
		})
}

func ExampleMiddleware_Handler() {
	keys, plans := exampleStores()
	auth := apikey.New(keys, plans, nil)
	h := auth.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		org, _ := apikey.OrgFromContext(r.Context())
		fmt.Fprintf(w, "hello, %s on %s", org.ID, org.Plan.Name)
	}))

	for _, header := range []string{"Bearer a-key-issued-elsewhere", "Bearer something-made-up", "Token k"} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", header)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Body)
	}
	// Output:
	// 200 hello, org_1 on starter
	// 401 {"success":false,"statusCode":401,"statusMessage":"Authentication failed","data":null,"error":{"message":"Provided API key is invalid or inactive","code":"INVALID_API_KEY"}}
	// 401 {"success":false,"statusCode":401,"statusMessage":"Invalid authentication token schema","data":null,"error":{"message":"Authorization header must start with 'Bearer'","code":"INVALID_API_KEY_SCHEMA"}}
}

// The decision without the reply, for a service that answers in its own way.
func ExampleMiddleware_Authenticate() {
	keys, plans := exampleStores()
	auth := apikey.New(keys, plans, nil)

	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer a-key-issued-elsewhere")
	org, err := auth.Authenticate(r)
	fmt.Println(org.ID, org.KeyID, err)

	r.Header.Del("Authorization")
	_, err = auth.Authenticate(r)
	fmt.Println(errors.Is(err, apikey.ErrAuthorizationHeaderMissing))
	// Output:
	// org_1 key_1 <nil>
	// true
}

// Decisions go to the log. A refusal is the client's affair, an outage is ours.
// A request of gRPC has its header in metadata.
func ExampleMiddleware_AuthenticateHeader() {
	keys, plans := exampleStores()
	auth := apikey.New(keys, plans, nil)
	metadata := map[string][]string{"authorization": {"Bearer some-key-that-nobody-has"}}
	_, err := auth.AuthenticateHeader(context.Background(), metadata["authorization"])
	fmt.Println(errors.Is(err, apikey.ErrInvalidAPIKey))
	// Output: true
}

func ExampleOptions() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == "took" { // never the same twice
				return slog.Attr{}
			}
			return a
		},
	}))
	keys, _ := exampleStores()
	broken := apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) {
		return apikey.Plan{}, errors.New("connection refused")
	})
	auth := apikey.New(keys, broken, &apikey.Options{
		Observe: func(ctx context.Context, d apikey.Decision) {
			level := slog.LevelInfo
			if errors.Is(d.Err, apikey.ErrUnavailable) {
				level = slog.LevelError
			}
			logger.Log(ctx, level, "authentication",
				"code", d.Code, "org", d.OrgID, "key", d.KeyID, "source", d.Source, "took", d.Duration, "err", d.Err)
		},
	})

	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer a-key-issued-elsewhere")
	auth.Handler(http.NotFoundHandler()).ServeHTTP(httptest.NewRecorder(), r)
	// Output:
	// level=ERROR msg=authentication code=SERVICE_UNAVAILABLE org=org_1 key=key_1 source=store err="SERVICE_UNAVAILABLE: Authentication is temporarily unavailable: connection refused"
}

// A handler answers with an error of its own, in the same envelope.
func ExampleWriteError() {
	errNoSuchReport := &apikey.Error{
		StatusCode: http.StatusNotFound, StatusMessage: "Not found", Message: "There is no such report", Code: "REPORT_NOT_FOUND",
	}
	w := httptest.NewRecorder()
	apikey.WriteError(w, httptest.NewRequest("GET", "/v1/reports/7", nil), errNoSuchReport)
	fmt.Println(w.Code, w.Body)
	// Output:
	// 404 {"success":false,"statusCode":404,"statusMessage":"Not found","data":null,"error":{"message":"There is no such report","code":"REPORT_NOT_FOUND"}}
}

// A test of a handler that stands behind the middleware.
func ExampleContextWithOrg() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		org, _ := apikey.OrgFromContext(r.Context())
		fmt.Fprint(w, org.ID)
	}
	r := httptest.NewRequest("GET", "/", nil)
	w := httptest.NewRecorder()
	handler(w, r.WithContext(apikey.ContextWithOrg(r.Context(), apikey.Org{ID: "org_1"})))
	fmt.Println(w.Body)
	// Output: org_1
}

// Keys in tables of one's own: not found is ErrNotFound, all else is an outage.
func ExampleKeyStoreFunc() {
	var pool *pgxpool.Pool // the service's own
	keys := apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
		key := apikey.Key{Active: true}
		err := pool.QueryRow(ctx, `SELECT id, tenant FROM tokens WHERE sha256 = $1 AND revoked_at IS NULL`, h[:]).
			Scan(&key.ID, &key.OrgID)
		if errors.Is(err, pgx.ErrNoRows) {
			err = apikey.ErrNotFound
		}
		return key, err
	})
	plans := apikey.NewPostgresPlanStore(pool)
	_ = apikey.New(keys, plans, nil)
}

// A client of the API tells errors apart by their codes.
// Plans that another service knows: a status of 404 is an answer, all else that is
// not one is an outage.
func ExamplePlanStoreFunc() {
	plans := apikey.PlanStoreFunc(func(ctx context.Context, orgID string) (plan apikey.Plan, err error) {
		r, err := http.NewRequestWithContext(ctx, "GET", "http://billing.internal/plans/"+url.PathEscape(orgID), nil)
		if err != nil {
			return plan, err
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			return plan, err
		}
		defer resp.Body.Close()
		switch resp.StatusCode {
		case http.StatusOK:
			return plan, json.NewDecoder(resp.Body).Decode(&plan)
		case http.StatusNotFound:
			return plan, apikey.ErrNotFound
		}
		return plan, fmt.Errorf("billing answers %s", resp.Status)
	})
	keys, _ := exampleStores()
	_ = apikey.New(keys, plans, nil)
}

func ExamplePlan_AllowsAPI() {
	plan := apikey.Plan{
		Name: "starter", Status: apikey.PlanActive, APIAccess: true, EndsAt: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	fmt.Println(plan.AllowsAPI(plan.EndsAt.Add(-time.Nanosecond)), plan.AllowsAPI(plan.EndsAt))
	// Output: true false
}

// When keys were last used is written off the request path, and at the end.
func ExampleNewLastUsed() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var pool *pgxpool.Pool // the service's own
	uses := apikey.NewLastUsed(pool, time.Minute)
	keys, plans := exampleStores()
	_ = apikey.New(keys, plans, &apikey.Options{LastUsed: uses})
	if err := uses.Run(ctx); err != nil { // returns when ctx ends
		log.Print(err)
	}
}

// A page for the operators of the service.
func ExampleCache_Stats() {
	var cache *apikey.Cache // the service's own
	http.HandleFunc("GET /internal/apikey", func(w http.ResponseWriter, _ *http.Request) {
		stats := cache.Stats()
		if !stats.FeedLive {
			fmt.Fprintln(w, "changes are noticed after MaxStaleness:", stats.FeedErr)
		}
		if stats.Unannounced > 0 {
			fmt.Fprintln(w, "look at the triggers: some changes were not announced")
		}
	})
}
