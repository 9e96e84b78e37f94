package apikeytest_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/apikeytest"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// A service's own test: its router behind the real middleware, on stores in memory.
func Example() {
	store := apikeytest.NewStore()
	store.Subscribe("org_1", apikeytest.Paid())
	id, key := store.Create("org_1", admin.NewKey{})

	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/things", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "three things") })
	service := apikey.New(store, store, nil).Handler(mux)
	get := func() {
		r := httptest.NewRequest("GET", "/v1/things", nil)
		r.Header.Set("Authorization", "Bearer "+key)
		w := httptest.NewRecorder()
		service.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Body)
	}
	get()
	store.Deactivate(id)
	get()
	store.Fail(errors.New("connection refused"))
	get()
	// Output:
	// 200 three things
	// 401 {"success":false,"statusCode":401,"statusMessage":"Authentication failed","data":null,"error":{"message":"Provided API key is invalid or inactive","code":"INVALID_API_KEY"}}
	// 503 {"success":false,"statusCode":503,"statusMessage":"Service unavailable","data":null,"error":{"message":"Authentication is temporarily unavailable","code":"SERVICE_UNAVAILABLE"}}
}

// A test of one handler, without the middleware.
func ExampleNewRequest() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		org, _ := apikey.OrgFromContext(r.Context())
		fmt.Fprint(w, "hello, ", org.ID)
	}
	w := httptest.NewRecorder()
	handler(w, apikeytest.NewRequest("GET", "/", nil, apikey.Org{ID: "org_1", Plan: apikeytest.Paid()}))
	fmt.Println(w.Body)
	// Output: hello, org_1
}

func TestStore(t *testing.T) {
	s := apikeytest.NewStore()
	apikeytest.TestKeyStore(t, apikeytest.Keys{
		Store:  s,
		Put:    func(_ *testing.T, h apikey.KeyHash, k apikey.Key) string { return apikeytest.Put(s, h, k) },
		Remove: func(_ *testing.T, h apikey.KeyHash) { apikeytest.Remove(s, h) },
	})
	apikeytest.TestPlanStore(t, apikeytest.Plans{
		Store:  s,
		Put:    func(_ *testing.T, orgID string, p apikey.Plan) { s.Subscribe(orgID, p) },
		Remove: func(_ *testing.T, orgID string) { s.Unsubscribe(orgID) },
	})
}

// TestLife: what a test can do to a key and a plan, and what comes of it.
func TestLife(t *testing.T) {
	store := apikeytest.NewStore()
	auth := apikey.New(store, store, nil)
	id, key := store.Create("org_1", admin.NewKey{Environment: admin.EnvironmentTest})
	for i, c := range []struct {
		change func()
		want   error
	}{
		{func() {}, apikey.ErrPlanExpired},
		{func() { store.Subscribe("org_1", apikeytest.Paid()) }, nil},
		{func() { store.Deactivate(id) }, apikey.ErrInvalidAPIKey},
		{func() { store.Activate(id) }, nil},
		{func() { store.Expire(id, time.Now()) }, apikey.ErrInvalidAPIKey},
		{func() { store.Expire(id, time.Time{}) }, nil},
		{func() { store.Fail(errors.New("away")) }, apikey.ErrUnavailable},
		{func() { store.Fail(nil) }, nil},
		{func() { store.Unsubscribe("org_1") }, apikey.ErrPlanExpired},
		{func() { store.Delete(id) }, apikey.ErrInvalidAPIKey},
	} {
		c.change()
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+key)
		if _, err := auth.Authenticate(r); !errors.Is(err, c.want) {
			t.Errorf("step %d: %v, want %v", i, err, c.want)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a change of a key that is not there goes unnoticed")
		}
	}()
	store.Activate(id)
}
