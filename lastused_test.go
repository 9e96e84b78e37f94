package apikey_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestLastUsed: uses are written in batches, to the rows that are there, at the
// end too; and nothing is announced.
func TestLastUsed(t *testing.T) {
	t.Parallel()
	f := world.NewPostgres(t)
	uses := apikey.NewLastUsed(f.Pool, time.Hour) // so that only the end writes
	cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), nil)
	auth := world.Replica{Middleware: apikey.New(f, f, &apikey.Options{Cache: cache, LastUsed: uses})}
	used, org := f.Enrol(t, world.Live, world.Paid)
	refused, refusedOrg := f.Enrol(t, world.Live, world.PastDue)
	foreign := "a-key-of-another-store"
	other := apikey.New(apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) {
		return apikey.Key{ID: "not-a-uuid", OrgID: org.ID, Active: true}, nil
	}), f, &apikey.Options{LastUsed: uses})
	before := time.Now()
	for range 100 {
		auth.WantCode(t, used, world.Admitted)
		auth.WantCode(t, refused, world.PlanExpired)
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+foreign)
	if _, err := other.Authenticate(r); err != nil {
		t.Fatal(err)
	}
	testservers.Exec(t, f.Pool, `TRUNCATE apikey_outbox`)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := uses.Run(ctx); err != nil {
		t.Fatal(err)
	}
	store := admin.NewKeys(f.Pool)
	info, err := store.Find(t.Context(), org.KeyID)
	if err != nil || info.LastUsedAt.Before(before.Add(-time.Millisecond)) || info.LastUsedAt.After(time.Now()) {
		t.Errorf("last used at %v, %v", info.LastUsedAt, err)
	}
	if info, err := store.Find(t.Context(), refusedOrg.KeyID); err != nil || !info.LastUsedAt.IsZero() {
		t.Errorf("a refused key was last used at %v, %v", info.LastUsedAt, err)
	}
	var waiting int
	if err := f.Pool.QueryRow(t.Context(), `SELECT count(*) FROM apikey_outbox`).Scan(&waiting); err != nil || waiting > 0 {
		t.Errorf("%d uses are to be announced, %v", waiting, err)
	}
	if n := uses.Dropped(); n != 0 {
		t.Errorf("%d uses dropped", n)
	}

	// What cannot be written is told in the end.
	testservers.Exec(t, f.Pool, `ALTER TABLE api_keys RENAME TO gone`)
	again := apikey.NewLastUsed(f.Pool, 0)
	if _, err := apikey.New(apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) {
		return apikey.Key{ID: org.KeyID, OrgID: org.ID, Active: true}, nil
	}), f, &apikey.Options{LastUsed: again}).Authenticate(r); err != nil {
		t.Fatal(err)
	}
	if err := again.Run(ctx); err == nil || !strings.Contains(err.Error(), "recording the last use of 1 keys") {
		t.Errorf("Run = %v", err)
	}
	wantPanic(t, func() { apikey.NewLastUsed(nil, 0) }, "pass a *pgxpool.Pool")
	wantPanic(t, func() { apikey.NewLastUsed(f.Pool, -1) }, "use 0 for a minute")
}

// TestLastUsedAside: who changes a key does not wait for who writes down uses, and one
// replica's writing is enough for all.
func TestLastUsedAside(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	store := admin.NewKeys(w.Pool)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	use := func(db apikey.DB, interval time.Duration) time.Time {
		t.Helper()
		uses := apikey.NewLastUsed(db, interval)
		world.Replica{Middleware: apikey.New(w.PostgresKeyStore, w.PostgresPlanStore, &apikey.Options{LastUsed: uses})}.WantCode(t, apiKey, world.Admitted)
		if err := uses.Run(ended); err != nil {
			t.Fatal(err)
		}
		info, err := store.Find(t.Context(), org.KeyID)
		if err != nil {
			t.Fatal(err)
		}
		return info.LastUsedAt
	}
	first := use(w.Pool, time.Hour)
	if first.IsZero() {
		t.Fatal("the use is not written")
	}
	for range 10 { // other replicas
		if again := use(w.Pool, time.Hour); !again.Equal(first) {
			t.Errorf("written again within the interval: %v, %v", first, again)
		}
	}
	if later := use(w.Pool, time.Nanosecond); !later.After(first) {
		t.Errorf("not written after the interval: %v, %v", first, later)
	}

	tx, err := w.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	use(tx, time.Nanosecond) // and it does not come to an end
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	if err := errors.Join(store.Deactivate(ctx, org.ID, org.KeyID), store.Activate(ctx, org.ID, org.KeyID), store.Expire(ctx, org.ID, org.KeyID, time.Now())); err != nil {
		t.Errorf("while uses are written: %v", err)
	}
}
