// Package apikeytest is for tests of services that use apikey, and of stores. It has a store
// in memory, authenticated requests, and tests that every store must pass.
package apikeytest

// A store in memory, and authenticated requests.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/keyformat"
)

// A Store is an [apikey.BatchKeyStore] and an [apikey.BatchPlanStore] in memory. It is safe
// for concurrent use. Methods that change a key panic if there is no such key, since that is
// a mistake in the test.
type Store struct {
	mu     sync.Mutex
	keys   map[apikey.KeyHash]apikey.Key
	plans  map[string]apikey.Plan
	hashes map[string]apikey.KeyHash // by key id
	err    error
}

// NewStore returns an empty Store.
func NewStore() *Store {
	return &Store{
		keys: map[apikey.KeyHash]apikey.Key{}, plans: map[string]apikey.Plan{}, hashes: map[string]apikey.KeyHash{},
	}
}

// Paid returns a plan that admits requests.
func Paid() apikey.Plan {
	return apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true}
}

// Key implements [apikey.KeyStore].
func (s *Store) Key(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
	return lookup(ctx, s, s.keys, h)
}

// Plan implements [apikey.PlanStore].
func (s *Store) Plan(ctx context.Context, orgID string) (apikey.Plan, error) {
	return lookup(ctx, s, s.plans, orgID)
}

// Keys implements [apikey.BatchKeyStore].
func (s *Store) Keys(ctx context.Context, hashes []apikey.KeyHash) (map[apikey.KeyHash]apikey.Key, error) {
	return lookupMany(ctx, s.Key, hashes)
}

// Plans implements [apikey.BatchPlanStore].
func (s *Store) Plans(ctx context.Context, orgIDs []string) (map[string]apikey.Plan, error) {
	return lookupMany(ctx, s.Plan, orgIDs)
}

func lookupMany[S comparable, V any](ctx context.Context, look func(context.Context, S) (V, error), subjects []S) (map[S]V, error) {
	found := map[S]V{}
	for _, subject := range subjects {
		fact, err := look(ctx, subject)
		switch {
		case err == nil:
			found[subject] = fact
		case !errors.Is(err, apikey.ErrNotFound):
			return nil, err
		}
	}
	return found, nil
}

func lookup[S comparable, V any](ctx context.Context, s *Store, facts map[S]V, subject S) (V, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var none V
	if err := ctx.Err(); err != nil {
		return none, err
	}
	if s.err != nil {
		return none, s.err
	}
	fact, ok := facts[subject]
	if !ok {
		return none, apikey.ErrNotFound
	}
	return fact, nil
}

// Fail makes every lookup fail with err, as in an outage, until Fail(nil).
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// Create creates a key for an organisation, and returns its id and the key as clients send
// it. k.ExpiresAt may be in the past.
func (s *Store) Create(orgID string, k admin.NewKey) (id, key string) {
	key = keyformat.New(keyformat.Environment(cmp.Or(k.Environment, admin.EnvironmentLive)))
	return s.Import(orgID, key, k), key
}

// Import adds a key that clients have already, and returns its id.
func (s *Store) Import(orgID, key string, k admin.NewKey) (id string) {
	return s.put(apikey.HashKey(key), apikey.Key{OrgID: orgID, Active: true, ExpiresAt: k.ExpiresAt})
}

// put adds or replaces a key, and gives it an id if it has none.
func (s *Store) put(h apikey.KeyHash, key apikey.Key) (id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if key.ID == "" {
		key.ID = fmt.Sprintf("key_%d", len(s.hashes)+1)
	}
	s.keys[h], s.hashes[key.ID] = key, h
	return key.ID
}

// Deactivate deactivates a key.
func (s *Store) Deactivate(keyID string) { s.change(keyID, func(k *apikey.Key) { k.Active = false }) }

// Activate undoes Deactivate.
func (s *Store) Activate(keyID string) { s.change(keyID, func(k *apikey.Key) { k.Active = true }) }

// Expire sets when a key expires; zero means never.
func (s *Store) Expire(keyID string, at time.Time) {
	s.change(keyID, func(k *apikey.Key) { k.ExpiresAt = at })
}

func (s *Store) change(keyID string, change func(*apikey.Key)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key, ok := s.keys[s.hashes[keyID]]
	if !ok {
		panic(fmt.Sprintf("apikeytest: there is no key with id %q", keyID))
	}
	change(&key)
	s.keys[s.hashes[keyID]] = key
}

// Delete deletes a key.
func (s *Store) Delete(keyID string) {
	s.change(keyID, func(*apikey.Key) {})
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, s.hashes[keyID])
}

// Subscribe sets the plan of an organisation.
func (s *Store) Subscribe(orgID string, p apikey.Plan) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plans[orgID] = p
}

// Unsubscribe removes the plan of an organisation.
func (s *Store) Unsubscribe(orgID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.plans, orgID)
}

// NewRequest is like [httptest.NewRequest], for handlers behind the middleware: the context
// of the request has org.
func NewRequest(method, target string, body io.Reader, org apikey.Org) *http.Request {
	r := httptest.NewRequest(method, target, body)
	return r.WithContext(apikey.ContextWithOrg(r.Context(), org))
}
