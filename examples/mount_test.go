// Package examples shows how to mount the middleware in routers, and beside what
// else services have, by tests, so that what it shows is true.
package examples

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
	"github.com/gorilla/mux"
	echov4 "github.com/labstack/echo/v4"
	"github.com/labstack/echo/v5"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/apikeytest"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

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

func echoRouter(auth *apikey.Middleware) http.Handler {
	e := echo.New()
	e.Use(echo.WrapMiddleware(auth.Handler))
	e.GET("/v1/whoami", func(c *echo.Context) error {
		org, _ := apikey.OrgFromContext(c.Request().Context())
		return c.String(http.StatusOK, org.ID)
	})
	return e
}

func echoV4Router(auth *apikey.Middleware) http.Handler {
	e := echov4.New()
	e.Use(echov4.WrapMiddleware(auth.Handler))
	e.GET("/v1/whoami", func(c echov4.Context) error {
		org, _ := apikey.OrgFromContext(c.Request().Context())
		return c.String(http.StatusOK, org.ID)
	})
	return e
}

// gorillaRouterUse is wrong: it answers 404 and 405 to who has no key.
func gorillaRouterUse(auth *apikey.Middleware) http.Handler {
	r := mux.NewRouter()
	r.Use(auth.Handler)
	r.HandleFunc("/v1/whoami", whoami).Methods("GET")
	return r
}

// chiRouterInside is wrong in the same way: inside a group, the middleware guards
// the group's routes and nothing else.
func chiRouterInside(auth *apikey.Middleware) http.Handler {
	r := chi.NewRouter()
	r.Group(func(r chi.Router) {
		r.Use(auth.Handler)
		r.Get("/v1/whoami", whoami)
	})
	return r
}

// A world is stores with a key in each state.
type world struct {
	*apikeytest.Store
	good, unpaid, dead string
}

func newWorld() *world {
	w := &world{Store: apikeytest.NewStore()}
	w.Subscribe("org_1", apikeytest.Paid())
	_, w.good = w.Create("org_1", admin.NewKey{})
	_, w.unpaid = w.Create("org_2", admin.NewKey{})
	id, dead := w.Create("org_1", admin.NewKey{})
	w.Deactivate(id)
	w.dead = dead
	return w
}

// A request is what is sent, and what must come back.
type request struct {
	name    string
	method  string
	path    string
	headers []string // Authorization values; {good}, {unpaid} and {dead} are keys
	status  int
	want    string // in the body
}

func requests() []request {
	const there, nowhere = "/v1/whoami", "/v1/nothing"
	cases := []request{
		{"admitted", "GET", there, []string{"Bearer {good}"}, 200, "org_1"},
		{"lower case", "GET", there, []string{"bearer  {good}"}, 200, "org_1"},
		{"repeated", "GET", there, []string{"Bearer {good}", "Bearer {good}"}, 401, "INVALID_API_KEY"},
		{"joined", "GET", there, []string{"Bearer {good}, Bearer {good}"}, 401, "INVALID_API_KEY"},
		{"another scheme", "GET", there, []string{"Token {good}"}, 401, "INVALID_API_KEY_SCHEMA"},
		{"nothing after Bearer", "GET", there, []string{"Bearer"}, 401, "API_KEY_MISSING"},
		{"nowhere", "GET", nowhere, []string{"Bearer {good}"}, 404, ""},
		{"wrong method", "POST", there, []string{"Bearer {good}"}, 405, ""},
	}
	for _, method := range []string{"GET", "POST", "OPTIONS", "DELETE"} {
		for _, path := range []string{there, nowhere, "/"} { // what is there is nobody's business
			cases = append(cases,
				request{"no header", method, path, nil, 401, "AUTHORIZATION_HEADER_MISSING"},
				request{"unknown", method, path, []string{"Bearer some-other-key-entirely"}, 401, "INVALID_API_KEY"},
				request{"deactivated", method, path, []string{"Bearer {dead}"}, 401, "INVALID_API_KEY"},
				request{"unpaid", method, path, []string{"Bearer {unpaid}"}, 401, "PLAN_EXPIRED"},
			)
		}
	}
	return cases
}

// send sends a request over HTTP/1.1, as bytes.
func sendHTTP1(t *testing.T, server *httptest.Server, r request) (int, string) {
	t.Helper()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n", r.method, r.path)
	for _, h := range r.headers {
		text += "Authorization: " + h + "\r\n"
	}
	if _, err := io.WriteString(conn, text+"\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: r.method})
	return answer(t, resp, err, 1)
}

// sendHTTP2 sends a request over HTTP/2.
func sendHTTP2(t *testing.T, server *httptest.Server, r request) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), r.method, server.URL+r.path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.headers) > 0 {
		req.Header["Authorization"] = r.headers
	}
	resp, err := server.Client().Do(req)
	return answer(t, resp, err, 2)
}

func answer(t *testing.T, resp *http.Response, err error, version int) (int, string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.ProtoMajor != version {
		t.Fatalf("%s: %v", resp.Proto, err)
	}
	return resp.StatusCode, string(body)
}

// TestMountings sends the same requests through every router, over real
// connections.
func TestMountings(t *testing.T) {
	for name, mount := range map[string]func(*apikey.Middleware) http.Handler{
		"net/http": netHTTP, "chi": chiRouter, "gorilla": gorillaRouter, "echo": echoRouter, "echo v4": echoV4Router,
	} {
		w := newWorld()
		plain := httptest.NewServer(mount(apikey.New(w, w, nil)))
		defer plain.Close()
		tls := httptest.NewUnstartedServer(mount(apikey.New(w, w, nil)))
		tls.EnableHTTP2 = true
		tls.StartTLS()
		defer tls.Close()
		fill := strings.NewReplacer("{good}", w.good, "{unpaid}", w.unpaid, "{dead}", w.dead)
		for way, send := range map[string]func(request) (int, string){
			"HTTP/1.1": func(r request) (int, string) { return sendHTTP1(t, plain, r) },
			"HTTP/2":   func(r request) (int, string) { return sendHTTP2(t, tls, r) },
		} {
			t.Run(name+" over "+way, func(t *testing.T) {
				for _, r := range requests() {
					for i, h := range r.headers {
						r.headers[i] = fill.Replace(h)
					}
					if status, body := send(r); status != r.status || !strings.Contains(body, r.want) {
						t.Errorf("%s, %s %s: %d %s, want %d %s", r.name, r.method, r.path, status, body, r.status, r.want)
					}
				}
				w.Fail(errors.New("away"))
				defer w.Fail(nil)
				if status, body := send(request{method: "GET", path: "/v1/nothing", headers: []string{"Bearer " + w.good}}); status != 503 {
					t.Errorf("in an outage: %d %s, want 503", status, body)
				}
			})
		}
	}
}

// TestWrongMountings shows what becomes of a middleware inside of a router: who
// has no key finds out what is there.
func TestWrongMountings(t *testing.T) {
	for name, c := range map[string]struct {
		mount          func(*apikey.Middleware) http.Handler
		nowhere, wrong int // what a request without a key is answered
	}{
		"gorilla by Use":     {gorillaRouterUse, 404, 405},
		"chi inside a group": {chiRouterInside, 404, 405},
	} {
		w := newWorld()
		h := c.mount(apikey.New(w, w, nil))
		for _, r := range []request{
			{"there", "GET", "/v1/whoami", nil, 401, ""}, {"nowhere", "GET", "/v1/nothing", nil, c.nowhere, ""}, {"wrong method", "POST", "/v1/whoami", nil, c.wrong, ""},
		} {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, httptest.NewRequestWithContext(context.Background(), r.method, r.path, nil))
			if rec.Code != r.status {
				t.Errorf("%s, %s: %d, want %d", name, r.name, rec.Code, r.status)
			}
		}
	}
}
