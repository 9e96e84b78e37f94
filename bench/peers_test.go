// Package bench compares apikey with other ways to authenticate a request, side by
// side in one run: 'make bench'.
package bench

// The peers: each as its documentation has it, in front of the same handler.

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	jwtmiddleware "github.com/auth0/go-jwt-middleware/v2"
	"github.com/auth0/go-jwt-middleware/v2/validator"
	rediscache "github.com/go-redis/cache/v9"
	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	tokencache "k8s.io/apiserver/pkg/authentication/token/cache"
	"k8s.io/apiserver/pkg/authentication/user"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// ttl is how long the peers' caches keep a key: the shortest that is usual.
const ttl = time.Minute

// An environment is the servers that all peers use.
type environment struct {
	databaseURL, redisURL string
	owner                 *pgxpool.Pool
	keys                  *admin.Keys
	plans                 *admin.Plans

	mu    sync.Mutex
	orgID string
}

func newEnvironment(t testing.TB) *environment {
	t.Helper()
	e := &environment{databaseURL: testservers.PostgresURL(t)}
	rdb := testservers.StartRedis(t)
	e.redisURL = rdb.URL
	e.owner = testservers.Pool(t, e.databaseURL)
	e.keys = admin.NewKeys(e.owner)
	e.plans = admin.NewPlans(e.owner)
	if err := e.plans.DefineTier(t.Context(), "starter", true); err != nil {
		t.Fatal(err)
	}
	// A table of a size that is one, and keys of other organisations.
	if _, err := e.owner.Exec(t.Context(), `INSERT INTO api_keys (org_id, key_hash)
		SELECT 'org ' || i, sha256(i::text::bytea) FROM generate_series(1, 10000) i; ANALYZE`); err != nil {
		t.Fatal(err)
	}
	return e
}

// newKey makes a key of the present organisation, or of a new one if that has as
// many as it may have. Most keys share an organisation: keys with one each would be
// truer, and cost a second lookup that the peers, which ask for both at once, do not
// have.
func (e *environment) newKey(t testing.TB) (key string, info admin.KeyInfo) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	key = rand.Text() + rand.Text()
	info, err := e.keys.Import(t.Context(), e.orgID, key, admin.NewKey{})
	if e.orgID == "" || errors.Is(err, admin.ErrKeyLimit) {
		e.orgID = "org_" + rand.Text()
		if err = e.plans.Subscribe(t.Context(), e.orgID, "starter", apikey.PlanActive, time.Time{}); err == nil {
			info, err = e.keys.Import(t.Context(), e.orgID, key, admin.NewKey{})
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return key, info
}

// A counter counts the statements that a pool sends.
type counter struct{ n atomic.Int64 }

func (c *counter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if strings.Contains(data.SQL, "api_keys") || strings.Contains(data.SQL, "org_plans") {
		c.n.Add(1)
	}
	return ctx
}

func (*counter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (e *environment) pool(t testing.TB) (*pgxpool.Pool, *counter) {
	t.Helper()
	config, err := pgxpool.ParseConfig(e.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	c := new(counter)
	config.MaxConns = 10
	config.ConnConfig.Tracer = c
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool, c
}

// An instance is one process with a peer in front of next.
type instance struct {
	http.Handler
	sql   func() int64
	stats func() apikey.CacheStats // of apikey only
	token func(key string) string  // what a client sends for a key; the key itself if nil
}

// A peer is one way to authenticate.
type peer struct {
	name    string
	module  string // whose version the table shows
	redis   bool   // instances share what is in Redis
	store   bool   // it asks PostgreSQL for keys
	memory  bool   // it keeps what it was answered, in the process
	prepare func(t testing.TB, e *environment, next http.Handler) instance
}

const lookupSQL = `SELECT k.org_id FROM api_keys k JOIN org_plans o USING (org_id) JOIN plan_catalogue c ON c.name = o.plan
	WHERE k.key_hash = $1 AND k.active AND coalesce(k.expires_at > now(), true)
		AND o.status = 'active' AND c.api_access AND coalesce(o.ends_at > now(), true)`

var errRefused = errors.New("refused")

// lookup is what the peers ask PostgreSQL: key and plan in one statement.
func lookup(ctx context.Context, pool *pgxpool.Pool, key string) (orgID string, err error) {
	h := sha256.Sum256([]byte(key))
	err = pool.QueryRow(ctx, lookupSQL, h[:]).Scan(&orgID)
	if errors.Is(err, pgx.ErrNoRows) {
		err = errRefused
	}
	return orgID, err
}

type orgKey struct{}

// guard is the least middleware around a function that knows whose a key is.
func guard(next http.Handler, find func(ctx context.Context, key string) (orgID string, err error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok {
			http.Error(w, "unauthorized", http.StatusUnauthorized)
			return
		}
		orgID, err := find(r.Context(), key)
		if err != nil {
			http.Error(w, "unauthorized", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), orgKey{}, orgID)))
	})
}

// secret is that of all caches of apikey.
var secret = []byte("the secret of all caches in this comparison")

var peers = []peer{
	{
		name: "no authentication",
		prepare: func(_ testing.TB, _ *environment, next http.Handler) instance {
			return instance{Handler: next, sql: func() int64 { return 0 }}
		},
	},
	{
		name: "apikey", module: "github.com/trackpilots/apikey", redis: true, store: true, memory: true,
		prepare: func(t testing.TB, e *environment, next http.Handler) instance {
			pool, sql := e.pool(t)
			cache := apikey.NewCache(testservers.RedisAt(t, e.redisURL), secret, nil)
			world.Watch(t, cache, pool)
			world.Ready(t, cache)
			auth := apikey.New(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), &apikey.Options{Cache: cache})
			return instance{Handler: auth.Handler(next), sql: sql.n.Load, stats: cache.Stats}
		},
	},
	{
		name: "Kubernetes token cache", module: "k8s.io/apiserver", store: true, memory: true,
		prepare: func(t testing.TB, e *environment, next http.Handler) instance {
			pool, sql := e.pool(t)
			cached := tokencache.New(authenticator.TokenFunc(func(ctx context.Context, key string) (*authenticator.Response, bool, error) {
				orgID, err := lookup(ctx, pool, key)
				if errors.Is(err, errRefused) {
					return nil, false, nil
				}
				return &authenticator.Response{User: &user.DefaultInfo{Name: orgID}}, err == nil, err
			}), false, ttl, ttl)
			return instance{Handler: guard(next, func(ctx context.Context, key string) (string, error) {
				resp, ok, err := cached.AuthenticateToken(ctx, key)
				if err != nil || !ok {
					return "", errors.Join(err, errRefused)
				}
				return resp.User.GetName(), nil
			}), sql: sql.n.Load}
		},
	},
	{
		name: "go-redis/cache with TinyLFU", module: "github.com/go-redis/cache/v9", redis: true, store: true, memory: true,
		prepare: func(t testing.TB, e *environment, next http.Handler) instance {
			pool, sql := e.pool(t)
			cache := rediscache.New(&rediscache.Options{Redis: testservers.RedisAt(t, e.redisURL), LocalCache: rediscache.NewTinyLFU(131_072, ttl)})
			return instance{Handler: guard(next, func(ctx context.Context, key string) (orgID string, err error) {
				h := sha256.Sum256([]byte(key))
				err = cache.Once(&rediscache.Item{
					Ctx: ctx, Key: "go-redis/cache:" + string(h[:]), Value: &orgID, TTL: ttl,
					Do: func(*rediscache.Item) (any, error) { return lookup(ctx, pool, key) },
				})
				return orgID, err
			}), sql: sql.n.Load}
		},
	},
	{
		name: "rueidis client-side cache", module: "github.com/redis/rueidis", redis: true, store: true, memory: true,
		prepare: func(t testing.TB, e *environment, next http.Handler) instance {
			pool, sql := e.pool(t)
			opts, err := redis.ParseURL(e.redisURL)
			if err != nil {
				t.Fatal(err)
			}
			option := rueidis.ClientOption{InitAddress: []string{opts.Addr}}
			if opts.Network == "unix" {
				option = rueidis.MustParseURL(e.redisURL)
			}
			client, err := rueidis.NewClient(option)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(client.Close)
			return instance{Handler: guard(next, func(ctx context.Context, key string) (string, error) {
				h := sha256.Sum256([]byte(key))
				name := "rueidis:" + string(h[:])
				orgID, err := client.DoCache(ctx, client.B().Get().Key(name).Cache(), ttl).ToString()
				if err == nil {
					return orgID, nil
				}
				if orgID, err = lookup(ctx, pool, key); err == nil {
					err = client.Do(ctx, client.B().Set().Key(name).Value(orgID).Ex(ttl).Build()).Error()
				}
				return orgID, err
			}), sql: sql.n.Load}
		},
	},
	{
		name: "Redis GET, JSON, pgx", module: "github.com/redis/go-redis/v9", redis: true, store: true,
		prepare: func(t testing.TB, e *environment, next http.Handler) instance {
			pool, sql := e.pool(t)
			rdb := testservers.RedisAt(t, e.redisURL)
			type record struct {
				OrgID string `json:"org_id"`
			}
			return instance{Handler: guard(next, func(ctx context.Context, key string) (string, error) {
				h := sha256.Sum256([]byte(key))
				name := "by hand:" + string(h[:])
				var rec record
				if text, err := rdb.Get(ctx, name).Bytes(); err == nil && json.Unmarshal(text, &rec) == nil {
					return rec.OrgID, nil
				}
				orgID, err := lookup(ctx, pool, key)
				if err != nil {
					return "", err
				}
				text, err := json.Marshal(record{orgID})
				if err == nil {
					err = rdb.Set(ctx, name, text, ttl).Err()
				}
				return orgID, err
			}), sql: sql.n.Load}
		},
	},
	{
		name: "pgx, each request", module: "github.com/jackc/pgx/v5", store: true,
		prepare: func(t testing.TB, e *environment, next http.Handler) instance {
			pool, sql := e.pool(t)
			return instance{Handler: guard(next, func(ctx context.Context, key string) (string, error) { return lookup(ctx, pool, key) }), sql: sql.n.Load}
		},
	},
	{
		name: "JWT, HS256", module: "github.com/auth0/go-jwt-middleware/v2",
		prepare: func(t testing.TB, _ *environment, next http.Handler) instance {
			return jwtInstance(t, next, validator.HS256, jwt.SigningMethodHS256, secret, secret)
		},
	},
	{
		name: "JWT, RS256", module: "github.com/auth0/go-jwt-middleware/v2",
		prepare: func(t testing.TB, _ *environment, next http.Handler) instance {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				t.Fatal(err)
			}
			return jwtInstance(t, next, validator.RS256, jwt.SigningMethodRS256, key, &key.PublicKey)
		},
	},
}

// jwtInstance accepts tokens that are signed, and looks nothing up.
func jwtInstance(t testing.TB, next http.Handler, algorithm validator.SignatureAlgorithm, method jwt.SigningMethod, sign, verify any) instance {
	t.Helper()
	v, err := validator.New(func(context.Context) (any, error) { return verify, nil }, algorithm, "https://bench.example/", []string{"bench"})
	if err != nil {
		t.Fatal(err)
	}
	return instance{
		Handler: jwtmiddleware.New(v.ValidateToken).CheckJWT(next),
		sql:     func() int64 { return 0 },
		token: func(string) string {
			token, err := jwt.NewWithClaims(method, jwt.RegisteredClaims{
				Issuer: "https://bench.example/", Audience: jwt.ClaimStrings{"bench"}, Subject: "org_1", ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Hour)),
			}).SignedString(sign)
			if err != nil {
				t.Fatal(err)
			}
			return token
		},
	}
}
