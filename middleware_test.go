package apikey_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/contract"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// A requestCase is one request and its answer. It is sent three ways: to the
// handler itself, as bytes over HTTP/1.1, and over HTTP/2.
type requestCase struct {
	name   string
	method string   // "GET" if empty
	target string   // "/v1/things" if empty
	lines  []string // raw header lines; {key} is the key
	body   string
	key    world.KeyState  // live if empty
	plan   world.PlanState // paid if empty

	want  string // the code, "" for admitted
	only1 bool   // cannot be said in HTTP/2
}

func auth(values ...string) []string {
	for i, v := range values {
		values[i] = "Authorization: " + v
	}
	return values
}

func requestCases() []requestCase {
	upgrade := []string{
		"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
	}
	cases := []requestCase{
		{name: "no header", want: world.HeaderMissing},
		{name: "key in another header", lines: []string{"X-Api-Key: {key}", "Proxy-Authorization: Bearer {key}"}, want: world.HeaderMissing},
		{name: "key in the query", target: "/v1/things?access_token={key}&api_key={key}", want: world.HeaderMissing},
		{name: "key in a cookie", lines: []string{"Cookie: Authorization=Bearer {key}; api_key={key}"}, want: world.HeaderMissing},
		{
			name: "key in the body", method: "POST", body: "access_token={key}",
			lines: []string{"Content-Type: application/x-www-form-urlencoded"}, want: world.HeaderMissing,
		},

		{name: "empty", lines: auth(""), want: world.Schema},
		{name: "blanks", lines: auth("  \t "), want: world.Schema},
		{name: "Token scheme", lines: auth("Token {key}"), want: world.Schema},
		{name: "bare key", lines: auth("{key}"), want: world.Schema},
		{name: "no blank", lines: auth("Bearer{key}"), want: world.Schema},
		{name: "colon", lines: auth("Bearer:{key}"), want: world.Schema},
		{name: "colon and blank", lines: auth("Bearer: {key}"), want: world.Schema},
		{name: "equals", lines: auth("Bearer={key}"), want: world.Schema},
		{name: "tab", lines: auth("Bearer\t{key}"), want: world.Schema},
		{name: "Basic", lines: auth("Basic dXNlcjpwYXNz"), want: world.Schema},
		{name: "Digest with parameters", lines: auth(`Digest username="u", realm="api"`), want: world.Schema},
		{name: "scheme in quotes", lines: auth(`"Bearer" {key}`), want: world.Schema},
		{name: "a longer word", lines: auth("Bearers {key}"), want: world.Schema},
		{name: "a shorter word", lines: auth("Beare {key}"), want: world.Schema},
		{name: "non-ASCII look-alike", lines: auth("Βearer {key}"), want: world.Schema}, // Greek Beta
		{name: "non-breaking space", lines: auth("Bearer\u00a0{key}"), want: world.Schema},
		{name: "blanks before", lines: auth(" \t Bearer {key}")},
		{name: "blanks before another scheme", lines: auth(" Token {key}"), want: world.Schema},

		{name: "Bearer", lines: auth("Bearer"), want: world.KeyMissing},
		{name: "Bearer and blank", lines: auth("Bearer "), want: world.KeyMissing},
		{name: "Bearer and blanks", lines: auth("Bearer    "), want: world.KeyMissing},
		{name: "Bearer, blank and tab", lines: auth("Bearer \t "), want: world.KeyMissing},
		{name: "lower case, no key", lines: auth("bearer "), want: world.KeyMissing},

		{name: "key", lines: auth("Bearer {key}")},
		{name: "lower case", lines: auth("bearer {key}")},
		{name: "upper case, several blanks", lines: auth("BEARER   {key}")},
		{name: "mixed case", lines: auth("bEaReR {key}")},
		{name: "lower-case field name", lines: []string{"authorization: Bearer {key}"}},
		{name: "no blank after the colon", lines: []string{"Authorization:Bearer {key}"}},
		{name: "blanks after the key", lines: auth("Bearer {key} \t ")},
		{name: "non-breaking space after the key", lines: auth("Bearer {key}\u00a0"), want: world.Invalid},
		{name: "tab before the key", lines: auth("Bearer \t{key}"), want: world.Invalid},
		{name: "junk after the key", lines: auth("Bearer {key} junk"), want: world.Invalid},
		{name: "comma after the key", lines: auth("Bearer {key},"), want: world.Invalid},
		{name: "padding after the key", lines: auth("Bearer {key}="), want: world.Invalid},
		{name: "key in quotes", lines: auth(`Bearer "{key}"`), want: world.Invalid},
		{name: "key in brackets", lines: auth("Bearer <{key}>"), want: world.Invalid},
		{name: "percent-encoded", lines: auth("Bearer %74{key}"), want: world.Invalid},
		{name: "non-ASCII", lines: auth("Bearer ключ"), want: world.Invalid},
		{name: "invalid UTF-8", lines: auth("Bearer \xff\xfe{key}"), want: world.Invalid},
		{name: "equals only", lines: auth("Bearer ===="), want: world.Invalid},
		{name: "the word undefined", lines: auth("Bearer undefined"), want: world.Invalid},
		{name: "512 bytes", lines: auth("Bearer " + strings.Repeat("a", 512)), want: world.Invalid},
		{name: "513 bytes", lines: auth("Bearer " + strings.Repeat("a", 513)), want: world.Invalid},
		{name: "1 MiB", lines: auth("Bearer " + strings.Repeat("a", 1<<20)), want: world.Invalid},
		{name: "1 MiB of another scheme", lines: auth(strings.Repeat("a", 1<<20)), want: world.Schema},
		{name: "wrong checksum", lines: auth("Bearer tpk_live_00000000000000000000000000000000000000000002nd1uY"), want: world.Invalid},

		{name: "two keys, joined", lines: auth("Bearer {key}, Bearer {key}"), want: world.Invalid},
		{name: "two headers", lines: auth("Bearer {key}", "Bearer {key}"), want: world.Invalid},
		{name: "two headers, the second empty", lines: auth("Bearer {key}", ""), want: world.Invalid},
		{name: "two headers, the first without key", lines: auth("Bearer", "Bearer {key}"), want: world.Invalid},
		{name: "the same, joined", lines: auth("Bearer, Bearer {key}"), want: world.Invalid},
		{name: "two headers that would join to a key", lines: auth("Bearer", "{key}"), want: world.Invalid},
		{name: "two headers, another scheme second", lines: auth("Bearer {key}", "Basic dXNlcjpwYXNz"), want: world.Invalid},
		{name: "two headers, another scheme first", lines: auth("Basic dXNlcjpwYXNz", "Bearer {key}"), want: world.Schema},
		{name: "two headers, the first empty", lines: auth("", "Bearer {key}"), want: world.Schema},
		{name: "two headers in two spellings", lines: []string{"Authorization: Bearer {key}", "AUTHORIZATION: Bearer {key}"}, want: world.Invalid},

		{name: "could not look", lines: auth("Bearer {key}"), key: "outage", want: world.Unavailable},

		{name: "HEAD with a key", method: "HEAD", lines: auth("Bearer {key}")},
		{name: "HEAD without", method: "HEAD", want: world.HeaderMissing},
		{name: "OPTIONS with a key", method: "OPTIONS", lines: auth("Bearer {key}")},
		{name: "OPTIONS without", method: "OPTIONS", lines: []string{"Origin: https://example.com", "Access-Control-Request-Method: GET"}, want: world.HeaderMissing},
		{name: "unknown method with a key", method: "FROBNICATE", lines: auth("Bearer {key}")},
		{name: "unknown method without", method: "FROBNICATE", want: world.HeaderMissing},
		{name: "POST with a body and a key", method: "POST", body: "x=1", lines: auth("Bearer {key}")},
		{name: "WebSocket with a key", lines: append(auth("Bearer {key}"), upgrade...), only1: true},
		{name: "WebSocket without", lines: upgrade, want: world.HeaderMissing, only1: true},
		{name: "WebSocket with the key as protocol", lines: append([]string{"Sec-WebSocket-Protocol: bearer, {key}"}, upgrade...), want: world.HeaderMissing, only1: true},
	}
	for _, k := range world.KeyStates {
		for _, p := range world.PlanStates {
			cases = append(cases, requestCase{
				name: fmt.Sprintf("key %s, plan %s", k, p), key: k, plan: p, lines: auth("Bearer {key}"), want: world.WantCode(k, p),
			})
		}
	}
	return cases
}

// A spy is the handler behind the middleware.
type spy struct {
	calls atomic.Int32
	org   atomic.Pointer[apikey.Org]
}

func (s *spy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.calls.Add(1)
	if org, ok := apikey.OrgFromContext(r.Context()); ok {
		s.org.Store(&org)
	}
	_, _ = io.WriteString(w, "handled")
}

// A way sends a request to h.
type way struct {
	name string
	open func(t *testing.T, h http.Handler) func(t *testing.T, c requestCase) *http.Response
}

var ways = []way{{"recorder", openRecorder}, {"HTTP/1.1", openHTTP1}, {"HTTP/2", openHTTP2}}

func openRecorder(_ *testing.T, h http.Handler) func(*testing.T, requestCase) *http.Response {
	return func(_ *testing.T, c requestCase) *http.Response {
		r := httptest.NewRequest(c.method, c.target, strings.NewReader(c.body))
		r.Header = c.header()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if c.method == "HEAD" {
			w.Body.Reset() // as servers do
		}
		return w.Result()
	}
}

func openHTTP1(t *testing.T, h http.Handler) func(*testing.T, requestCase) *http.Response {
	server := httptest.NewUnstartedServer(h)
	server.Config.MaxHeaderBytes = 2 << 20
	server.Start()
	t.Cleanup(server.Close)
	return func(t *testing.T, c requestCase) *http.Response {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		lines := append([]string{c.method + " " + c.target + " HTTP/1.1", "Host: api.example.com"}, c.lines...)
		if c.body != "" {
			lines = append(lines, fmt.Sprintf("Content-Length: %d", len(c.body)))
		}
		if _, err := io.WriteString(conn, strings.Join(lines, "\r\n")+"\r\n\r\n"+c.body); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: c.method})
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body = io.NopCloser(bytes.NewReader(body))
		return resp
	}
}

func openHTTP2(t *testing.T, h http.Handler) func(*testing.T, requestCase) *http.Response {
	server := httptest.NewUnstartedServer(h)
	server.Config.MaxHeaderBytes = 2 << 20
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	return func(t *testing.T, c requestCase) *http.Response {
		r, err := http.NewRequestWithContext(t.Context(), c.method, server.URL+c.target, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header = c.header()
		resp, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if resp.ProtoMajor != 2 {
			t.Fatalf("the request went over %s", resp.Proto)
		}
		return resp
	}
}

// header is c.lines as fields, with all blanks but the one after the colon.
func (c requestCase) header() http.Header {
	h := http.Header{}
	for _, line := range c.lines {
		name, value, _ := strings.Cut(line, ":")
		h.Add(name, strings.TrimPrefix(value, " "))
	}
	return h
}

// prepared is c with its defaults and a key of its own.
func (c requestCase) prepared(t *testing.T, w world.World) (requestCase, apikey.Org) {
	if c.method == "" {
		c.method = "GET"
	}
	if c.target == "" {
		c.target = "/v1/things"
	}
	if c.key == "" {
		c.key = world.Live
	}
	if c.plan == "" {
		c.plan = world.Paid
	}
	apiKey, org := w.Enrol(t, c.key, c.plan)
	insert := strings.NewReplacer("{key}", apiKey)
	c.target, c.body = insert.Replace(c.target), insert.Replace(c.body)
	lines := make([]string, len(c.lines))
	for i, line := range c.lines {
		lines[i] = insert.Replace(line)
	}
	c.lines = lines
	return c, org
}

// check compares an answer, and what the handler saw, with the contract.
func (c requestCase) check(t *testing.T, resp *http.Response, handler *spy, org apikey.Org, want string, bodies map[string]string) {
	t.Helper()
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != wantStatus(want) {
		t.Fatalf("status %d, want %d; body %s", resp.StatusCode, wantStatus(want), body)
	}

	if want == world.Admitted {
		if calls := handler.calls.Load(); calls != 1 {
			t.Errorf("the handler ran %d times, want once", calls)
		}
		if got := handler.org.Load(); got == nil || *got != org {
			t.Errorf("the handler saw %+v, want %+v", got, org)
		}
		return
	}
	if calls := handler.calls.Load(); calls != 0 {
		t.Errorf("the handler ran %d times, want never", calls)
	}
	wantBody := bodies[want]
	if wantBody == "" {
		t.Fatalf("no body for %q", want)
	}
	header := resp.Header.Clone()
	for _, name := range []string{"Date", "Connection"} { // the server's own
		header.Del(name)
	}
	if want := wantHeaders(want, wantBody); !maps.EqualFunc(header, want, func(a, b []string) bool { return fmt.Sprint(a) == fmt.Sprint(b) }) {
		t.Errorf("headers\n%v, want\n%v", header, want)
	}
	if c.method == "HEAD" {
		wantBody = ""
	}
	if string(body) != wantBody {
		t.Errorf("body\n%s, want\n%s", body, wantBody)
	}
}

func TestRequests(t *testing.T) {
	bodies := contract.BodiesAndOutage(t)
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			w := world.NewMemory()
			var handler atomic.Pointer[spy]
			keys := apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
				key, err := w.Key(ctx, h)
				if errors.Is(err, apikey.ErrNotFound) {
					err = fmt.Errorf("wrapped: %w", err)
				}
				return key, err
			})
			mw := apikey.New(keys, w, nil)
			send := way.open(t, mw.Handler(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				handler.Load().ServeHTTP(rw, r)
			})))
			for _, c := range requestCases() {
				if c.only1 && way.name == "HTTP/2" {
					continue
				}
				t.Run(c.name, func(t *testing.T) {
					c, org := c.prepared(t, w)
					w.Set(func() {
						w.Err = nil
						if c.key == "outage" {
							w.Err = world.ErrStore
						}
					})
					handler.Store(new(spy))
					c.check(t, send(t, c), handler.Load(), org, c.want, bodies)
				})
			}
		})
	}
}

// TestRequestsOnServers is the main job whole: every state of a key and a plan,
// in PostgreSQL, behind the cache, in front of a real server; twice each, so
// that the second answer comes from the cache.
func TestRequestsOnServers(t *testing.T) {
	t.Parallel()
	bodies := contract.BodiesAndOutage(t)
	w := world.NewPostgres(t)
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), nil)
	mw := apikey.New(w, w, &apikey.Options{Cache: cache})
	var handler atomic.Pointer[spy]
	send := openHTTP1(t, mw.Handler(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		handler.Load().ServeHTTP(rw, r)
	})))
	for _, k := range world.KeyStates {
		for _, p := range world.PlanStates {
			t.Run(fmt.Sprintf("key %s, plan %s", k, p), func(t *testing.T) {
				c, org := requestCase{key: k, plan: p, lines: auth("Bearer {key}")}.prepared(t, w)
				for range 2 {
					handler.Store(new(spy))
					c.check(t, send(t, c), handler.Load(), org, world.WantCode(k, p), bodies)
				}
			})
		}
	}
}

// TestNoLookups shows that a request that cannot succeed asks no store, and that
// a dead key does not reach the plan.
func TestNoLookups(t *testing.T) {
	for _, c := range requestCases() {
		t.Run(c.name, func(t *testing.T) {
			w := world.NewMemory()
			c, _ := c.prepared(t, w)
			mw := apikey.New(w, w, nil)
			openRecorder(t, mw.Handler(new(spy)))(t, c).Body.Close()
			want := 2
			switch {
			case c.want == world.HeaderMissing, c.want == world.Schema, c.want == world.KeyMissing:
				want = 0
			case c.name == "512 bytes", c.name == "the word undefined", c.want == world.Invalid && c.key != world.Live:
				want = 1 // looks like a key issued elsewhere, or is one
			case c.want == world.Invalid:
				want = 0
			}
			if got := w.ReadCount(); got != want {
				t.Errorf("%d lookups, want %d", got, want)
			}
		})
	}
}

func TestAuthenticate(t *testing.T) {
	w := world.NewMemory()
	mw := apikey.New(w, w, nil)
	request := func(key string) *http.Request {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+key)
		return r
	}

	key, want := w.Enrol(t, world.Live, world.Paid)
	if org, err := mw.Authenticate(request(key)); err != nil || org != want {
		t.Errorf("Authenticate = %+v, %v, want %+v", org, err, want)
	}
	key, _ = w.Enrol(t, world.Live, world.Cancelled)
	if org, err := mw.Authenticate(request(key)); !errors.Is(err, apikey.ErrPlanExpired) || org != (apikey.Org{}) {
		t.Errorf("Authenticate = %+v, %v, want no Org and ErrPlanExpired", org, err)
	}

	w.Err = world.ErrStore
	org, err := mw.Authenticate(request(key))
	if !errors.Is(err, apikey.ErrUnavailable) || !errors.Is(err, world.ErrStore) || org != (apikey.Org{}) {
		t.Errorf("Authenticate = %+v, %v, want ErrUnavailable with its cause", org, err)
	}
	if errors.Is(err, apikey.ErrInvalidAPIKey) {
		t.Error("an outage is called an invalid key")
	}
}

// TestPlanOutage: the key could be looked up and the plan could not.
func TestPlanOutage(t *testing.T) {
	w := world.NewMemory()
	key, want := w.Enrol(t, world.Live, world.Paid)
	var got apikey.Decision
	mw := apikey.New(w, apikey.PlanStoreFunc(func(context.Context, string) (apikey.Plan, error) {
		return apikey.Plan{}, world.ErrStore
	}), &apikey.Options{Observe: func(_ context.Context, d apikey.Decision) { got = d }})
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+key)
	if _, err := mw.Authenticate(r); !errors.Is(err, apikey.ErrUnavailable) {
		t.Errorf("Authenticate = %v, want ErrUnavailable", err)
	}
	if got.Code != world.Unavailable || got.OrgID != want.ID || !errors.Is(got.Err, world.ErrStore) {
		t.Errorf("observed %+v", got)
	}
}

// TestStoreWithoutOrg: a store that returns a key without its organisation admits nobody.
func TestStoreWithoutOrg(t *testing.T) {
	w := world.NewMemory()
	key, _ := w.Enrol(t, world.Live, world.Paid)
	mw := apikey.New(apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) {
		return apikey.Key{ID: "key_1", Active: true}, nil
	}), w, nil)
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+key)
	if _, err := mw.Authenticate(r); !errors.Is(err, apikey.ErrUnavailable) {
		t.Errorf("Authenticate = %v, want ErrUnavailable", err)
	}
}

func TestObserve(t *testing.T) {
	w := world.NewMemory()
	var got []apikey.Decision
	mw := apikey.New(w, w, &apikey.Options{Observe: func(ctx context.Context, d apikey.Decision) {
		if ctx == nil || d.Duration <= 0 {
			t.Errorf("observed %+v in %v", d, ctx)
		}
		d.Duration = 0
		got = append(got, d)
	}})
	handler := new(spy)
	send := openRecorder(t, mw.Handler(handler))
	for _, c := range []struct {
		requestCase
		named bool // the organisation is known
	}{
		{requestCase{}, false},
		{requestCase{lines: auth("Bearer {key}"), key: world.Unknown}, false},
		{requestCase{lines: auth("Bearer {key}"), key: world.Deactivated}, true},
		{requestCase{lines: auth("Bearer {key}"), plan: world.PastDue}, true},
		{requestCase{lines: auth("Bearer {key}")}, true},
	} {
		got = nil
		r, org := c.prepared(t, w)
		send(t, r).Body.Close()
		want := apikey.Decision{Code: world.HeaderMissing, Err: apikey.ErrAuthorizationHeaderMissing}
		if len(r.lines) > 0 {
			want.Code = world.WantCode(r.key, r.plan)
			want.Err = map[string]error{world.Invalid: apikey.ErrInvalidAPIKey, world.PlanExpired: apikey.ErrPlanExpired}[want.Code]
		}
		if len(r.lines) > 0 {
			want.Source = apikey.SourceStore
		}
		if c.named {
			want.OrgID, want.KeyID = org.ID, org.KeyID
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("observed %+v, want once %+v", got, want)
		}
	}
}

// TestCanceled: a client that hangs up while its key is looked up is no outage, with a
// cache and without. One that the service has given a deadline is.
func TestCanceled(t *testing.T) {
	for _, cached := range []bool{false, true} {
		t.Run(fmt.Sprint("cached ", cached), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := world.NewMemory()
				key, _ := w.Enrol(t, world.Live, world.Paid)
				keys := apikey.KeyStoreFunc(func(ctx context.Context, _ apikey.KeyHash) (apikey.Key, error) {
					<-ctx.Done()
					return apikey.Key{}, ctx.Err()
				})
				codes := make(chan string, 2)
				opts := apikey.Options{Observe: func(_ context.Context, d apikey.Decision) { codes <- d.Code }}
				if cached {
					rdb := (&fakeRedis{fault: func(context.Context) error { return world.ErrStore }}).client()
					defer rdb.Close()
					opts.Cache = apikey.NewCache(rdb, world.NewSecret(), nil)
				}
				mw := apikey.New(keys, w, &opts)
				ask := func(ctx context.Context) {
					r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
					r.Header.Set("Authorization", "Bearer "+key)
					if _, err := mw.Authenticate(r); !errors.Is(err, apikey.ErrUnavailable) {
						t.Errorf("Authenticate = %v", err)
					}
				}
				impatient, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				go ask(impatient) // with a cache its lookup goes on
				synctest.Wait()
				gone, hangUp := context.WithCancel(t.Context())
				time.AfterFunc(10*time.Millisecond, hangUp)
				ask(gone)
				if got := [2]string{<-codes, <-codes}; got != [2]string{apikey.CodeCanceled, world.Unavailable} {
					t.Errorf("observed %q", got)
				}
			})
		})
	}
}

func TestErrorHandler(t *testing.T) {
	w := world.NewMemory()
	var got error
	mw := apikey.New(w, w, &apikey.Options{
		Realm: "partners",
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			got = err
			w.Header().Set("X-Request-Id", "42")
			apikey.WriteError(w, r, err)
		},
	})
	resp := openRecorder(t, mw.Handler(new(spy)))(t, requestCase{method: "GET", target: "/"})
	defer resp.Body.Close()
	if !errors.Is(got, apikey.ErrAuthorizationHeaderMissing) {
		t.Errorf("the ErrorHandler got %v", got)
	}
	if resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("X-Request-Id") != "42" {
		t.Errorf("the answer is %+v", resp)
	}
	if challenge := resp.Header.Get("WWW-Authenticate"); challenge != `Bearer realm="partners"` {
		t.Errorf("the challenge is %s, want the realm of the middleware", challenge)
	}
}

func TestContext(t *testing.T) {
	if org, ok := apikey.OrgFromContext(nil); ok || org != (apikey.Org{}) { //nolint:staticcheck // nil must not panic
		t.Errorf("OrgFromContext(nil) = %+v, %v", org, ok)
	}
	if org, ok := apikey.OrgFromContext(t.Context()); ok || org != (apikey.Org{}) {
		t.Errorf("OrgFromContext = %+v, %v, want none", org, ok)
	}
	type other struct{}
	want := apikey.Org{ID: "org_1", KeyID: "key_1", Plan: apikey.Plan{Name: world.Starter}}
	ctx := apikey.ContextWithOrg(context.WithValue(t.Context(), other{}, 1), want)
	if ctx.Value(other{}) != 1 {
		t.Error("ContextWithOrg hides other values")
	}
	got, ok := apikey.OrgFromContext(context.WithValue(ctx, other{}, 2))
	if !ok || got != want {
		t.Errorf("OrgFromContext = %+v, %v, want %+v", got, ok, want)
	}
	got.ID = "org_2"
	if again, _ := apikey.OrgFromContext(ctx); again != want {
		t.Error("a change to the returned Org reaches the context")
	}
	if inner, _ := apikey.OrgFromContext(apikey.ContextWithOrg(ctx, got)); inner != got {
		t.Errorf("the inner Org is %+v, want %+v", inner, got)
	}
	if org, ok := apikey.OrgFromContext(apikey.ContextWithOrg(nil, want)); !ok || org != want { //nolint:staticcheck // nil must not panic
		t.Errorf("ContextWithOrg(nil): %+v, %v", org, ok)
	}
}

// TestConfigurationFaults: what cannot work panics at construction and says what
// to do.
func TestConfigurationFaults(t *testing.T) {
	w := world.NewMemory()
	mw := apikey.New(w, w, nil)
	for name, c := range map[string]struct {
		construct func()
		want      string
	}{
		"no key store":      {func() { apikey.New(nil, w, nil) }, "pass a KeyStore"},
		"no plan store":     {func() { apikey.New(w, nil, nil) }, "pass a KeyStore and a PlanStore"},
		"quote in realm":    {func() { apikey.New(w, w, &apikey.Options{Realm: `a"b`}) }, "printable ASCII"},
		"newline in realm":  {func() { apikey.New(w, w, &apikey.Options{Realm: "a\r\nb"}) }, "printable ASCII"},
		"umlaut in realm":   {func() { apikey.New(w, w, &apikey.Options{Realm: "ä"}) }, "printable ASCII"},
		"nil function":      {func() { apikey.New(apikey.KeyStoreFunc(nil), w, nil) }, "pass a KeyStore"},
		"no handler":        {func() { mw.Handler(nil) }, "pass the handler"},
		"nil handler func":  {func() { mw.Handler(http.HandlerFunc(nil)) }, "pass the handler"},
		"nil pool":          {func() { apikey.NewPostgresKeyStore((*pgxpool.Pool)(nil)) }, "pass a *pgxpool.Pool"},
		"no key database":   {func() { apikey.NewPostgresKeyStore(nil) }, "pass a *pgxpool.Pool"},
		"no plans database": {func() { apikey.NewPostgresPlanStore(nil) }, "pass a *pgxpool.Pool"},
	} {
		t.Run(name, func(t *testing.T) { wantPanic(t, c.construct, c.want) })
	}
}

func wantPanic(t *testing.T, construct func(), want string) {
	t.Helper()
	defer func() {
		if p := fmt.Sprint(recover()); !strings.HasPrefix(p, "apikey: ") || !strings.Contains(p, want) {
			t.Errorf("panics with %q, want %q in it", p, want)
		}
	}()
	construct()
}
