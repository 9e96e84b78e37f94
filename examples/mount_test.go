// Package examples shows how to mount the middleware in routers, by tests, so
// that what it shows is true.
package examples

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/go-chi/chi/v5"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

const goodKey = "a-key-of-a-paying-organisation"

func newAuth() *apikey.Middleware {
	return apikey.New(
		apikey.KeyStoreFunc(func(_ context.Context, h apikey.KeyHash) (apikey.Key, error) {
			if h != apikey.HashKey(goodKey) {
				return apikey.Key{}, apikey.ErrNotFound
			}
			return apikey.Key{ID: "key_1", OrgID: "org_1", Active: true}, nil
		}),
		apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) {
			return apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true}, nil
		}), nil)
}

func whoami(w http.ResponseWriter, r *http.Request) {
	org, _ := apikey.OrgFromContext(r.Context())
	_, _ = io.WriteString(w, org.ID)
}

func netHTTP(auth *apikey.Middleware) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/whoami", whoami)
	return auth.Handler(mux)
}

func chiRouter(auth *apikey.Middleware) http.Handler {
	r := chi.NewRouter()
	r.Use(auth.Handler)
	r.Get("/v1/whoami", whoami)
	return r
}

func gorillaRouter(auth *apikey.Middleware) http.Handler {
	r := mux.NewRouter()
	r.HandleFunc("/v1/whoami", whoami).Methods("GET")
	return auth.Handler(r)
}

// gorillaRouterUse is wrong: it answers 404 and 405 to who has no key.
func gorillaRouterUse(auth *apikey.Middleware) http.Handler {
	r := mux.NewRouter()
	r.Use(auth.Handler)
	r.HandleFunc("/v1/whoami", whoami).Methods("GET")
	return r
}

func echoRouter(auth *apikey.Middleware) http.Handler {
	e := echo.New()
	e.Use(echo.WrapMiddleware(auth.Handler))
	e.GET("/v1/whoami", func(c echo.Context) error {
		org, _ := apikey.OrgFromContext(c.Request().Context())
		return c.String(http.StatusOK, org.ID)
	})
	return e
}

func TestMountings(t *testing.T) {
	for name, mount := range map[string]func(*apikey.Middleware) http.Handler{
		"net/http": netHTTP, "chi": chiRouter, "gorilla": gorillaRouter, "echo": echoRouter,
	} {
		t.Run(name, func(t *testing.T) {
			h := mount(newAuth())
			want(t, h, "GET", "/v1/whoami", goodKey, 200, "org_1")
			want(t, h, "GET", "/v1/nothing", goodKey, 404, "")
			want(t, h, "POST", "/v1/whoami", goodKey, 405, "")
			for _, path := range []string{"/v1/whoami", "/v1/nothing", "/"} {
				for _, method := range []string{"GET", "POST", "OPTIONS"} {
					want(t, h, method, path, "", 401, "")
					want(t, h, method, path, "some-other-key", 401, "")
				}
			}
		})
	}
}

// TestGorillaUse shows why gorilla's router is wrapped, and not given the
// middleware by Use.
func TestGorillaUse(t *testing.T) {
	h := gorillaRouterUse(newAuth())
	want(t, h, "GET", "/v1/whoami", "", 401, "")
	want(t, h, "GET", "/v1/nothing", "", 404, "")
	want(t, h, "POST", "/v1/whoami", "", 405, "")
}

func want(t *testing.T, h http.Handler, method, path, key string, status int, body string) {
	t.Helper()
	r := httptest.NewRequest(method, path, nil)
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != status || body != "" && w.Body.String() != body {
		t.Errorf("%s %s with key %q: %d %s, want %d %s", method, path, key, w.Code, w.Body, status, body)
	}
}
