package apikey_test

import (
	"context"
	"crypto/sha256"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
)

// discard is a ResponseWriter that costs next to nothing.
type discard struct{ header http.Header }

func (d discard) Header() http.Header             { return d.header }
func (discard) Write(b []byte) (int, error)       { return len(b), nil }
func (discard) WriteString(s string) (int, error) { return len(s), nil }
func (discard) WriteHeader(int)                   {}

func withKey(authorization string) *http.Request {
	r := httptest.NewRequest("GET", "/v1/things", nil)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return r
}

// kept holds what a handler is given, as a real one would.
var kept *http.Request

func keep(_ http.ResponseWriter, r *http.Request) { kept = r }

// BenchmarkFloor is what any middleware that knows its keys has to do: hash,
// look up, and pass on a request with a context of its own.
func BenchmarkFloor(b *testing.B) {
	apiKey := keyformat.New(keyformat.Live)
	orgs := map[[32]byte]*apikey.Org{sha256.Sum256([]byte(apiKey)): {ID: "org_1"}}
	type key struct{}
	floor := func(w http.ResponseWriter, r *http.Request) {
		org := orgs[sha256.Sum256([]byte(r.Header.Get("Authorization")[len("Bearer "):]))]
		keep(w, r.WithContext(context.WithValue(r.Context(), key{}, org)))
	}
	r := withKey("Bearer " + apiKey)
	w := discard{http.Header{}}
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			floor(w, r)
		}
	})
}

// BenchmarkAccept is the way of a good key, by where its facts are found.
func BenchmarkAccept(b *testing.B) {
	world := newPostgresWorld(b)
	rdb, secret := testservers.Redis(b), newSecret()
	apiKey, _ := world.enrol(b, live, paid)
	r := withKey("Bearer " + apiKey)
	hour := &apikey.CacheOptions{MaxStaleness: time.Hour}
	noMemory := &apikey.CacheOptions{MaxStaleness: time.Hour, MemoryEntries: -1}
	serve := func(b *testing.B, h http.Handler) {
		b.Helper()
		b.ReportAllocs()
		w := discard{http.Header{}}
		for b.Loop() {
			h.ServeHTTP(w, r)
		}
	}
	next := http.HandlerFunc(keep)

	b.Run("memory", func(b *testing.B) { serve(b, newReplica(world, rdb, secret, hour).Handler(next)) })
	b.Run("memory, parallel", func(b *testing.B) {
		h := newReplica(world, rdb, secret, hour).Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			w := discard{http.Header{}}
			for pb.Next() {
				h.ServeHTTP(w, r)
			}
		})
	})
	b.Run("Redis", func(b *testing.B) { serve(b, newReplica(world, rdb, secret, noMemory).Handler(next)) })
	b.Run("PostgreSQL", func(b *testing.B) { serve(b, apikey.New(world, world, nil).Handler(next)) })
	b.Run("cold", func(b *testing.B) { // neither has it
		reader := testservers.Redis(b)
		reader.AddHook(noSet{})
		serve(b, newReplica(world, reader, newSecret(), noMemory).Handler(next))
	})
}

// BenchmarkReject is what refusals cost.
func BenchmarkReject(b *testing.B) {
	world := newMemoryWorld()
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	unpaid, _ := world.enrol(b, live, pastDue)
	for name, authorization := range map[string]string{
		"no header":      "",
		"other scheme":   "Basic dXNlcjpwYXNz",
		"malformed":      "Bearer not a key",
		"wrong checksum": "Bearer tpk_live_00000000000000000000000000000000000000000002nd1uY",
		"absent":         "Bearer " + keyformat.New(keyformat.Live),
		"plan expired":   "Bearer " + unpaid,
	} {
		b.Run(name, func(b *testing.B) {
			h := newReplica(world, rdb, newSecret(), nil).Handler(http.HandlerFunc(keep))
			r := withKey(authorization)
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(discard{http.Header{}}, r)
			}
		})
	}
}
