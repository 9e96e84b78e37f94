package apikeytest

// Tests for stores of your own.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
)

// Keys is a key store under test, with functions that change what it holds. The tests use
// times in whole microseconds, as PostgreSQL stores them.
type Keys struct {
	Store apikey.KeyStore

	// Put adds or replaces the key with hash h, and returns the id that the store gives it.
	Put func(t *testing.T, h apikey.KeyHash, k apikey.Key) (id string)

	// Remove removes the key with hash h.
	Remove func(t *testing.T, h apikey.KeyHash)
}

// TestKeyStore tests that a store fulfils the contract of [apikey.KeyStore], and that of
// [apikey.BatchKeyStore] if it implements that.
func TestKeyStore(t *testing.T, keys Keys) {
	now := time.Now().UTC().Truncate(time.Microsecond)
	var many func(context.Context, []apikey.KeyHash) (map[apikey.KeyHash]apikey.Key, error)
	if batch, ok := keys.Store.(apikey.BatchKeyStore); ok {
		many = batch.Keys
	}
	suite[apikey.KeyHash, apikey.Key]{
		look: keys.Store.Key,
		many: many,
		put: func(t *testing.T, h apikey.KeyHash, k apikey.Key) apikey.Key {
			k.ID = keys.Put(t, h, k)
			return k
		},
		remove: keys.Remove,
		subject: func(n int) apikey.KeyHash { // alike in all but the last byte
			h := apikey.HashKey(t.Name())
			h[31] = byte(n)
			return h
		},
		equal: func(a, b apikey.Key) bool {
			same := a.ExpiresAt.Equal(b.ExpiresAt) && a.ExpiresAt.IsZero() == b.ExpiresAt.IsZero()
			a.ExpiresAt, b.ExpiresAt = time.Time{}, time.Time{}
			return same && a == b
		},
		facts: map[string]apikey.Key{
			"live":             {OrgID: "org_1", Active: true},
			"deactivated":      {OrgID: "org_1"},
			"expired":          {OrgID: "org_1", Active: true, ExpiresAt: now.Add(-time.Hour)},
			"expires soon":     {OrgID: "org_1", Active: true, ExpiresAt: now.Add(time.Microsecond)},
			"expires far away": {OrgID: "org_1", Active: true, ExpiresAt: now.AddDate(100, 0, 0)},
			"expired in 1970":  {OrgID: "org_1", Active: true, ExpiresAt: time.Unix(0, 0).UTC()},
			"both":             {OrgID: "org_1", ExpiresAt: now.Add(-time.Hour)},
			"an odd id":        {OrgID: "org 1/ü'\"\\", Active: true},
		},
	}.run(t)
}

// Plans is a plan store under test, with functions that change what it holds.
type Plans struct {
	Store apikey.PlanStore

	// Put adds or replaces the plan of an organisation.
	Put func(t *testing.T, orgID string, p apikey.Plan)

	// Remove removes the plan of an organisation.
	Remove func(t *testing.T, orgID string)
}

// TestPlanStore tests that a store fulfils the contract of [apikey.PlanStore], and that of
// [apikey.BatchPlanStore] if it implements that.
func TestPlanStore(t *testing.T, plans Plans) {
	var many func(context.Context, []string) (map[string]apikey.Plan, error)
	if batch, ok := plans.Store.(apikey.BatchPlanStore); ok {
		many = batch.Plans
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	facts := map[string]apikey.Plan{
		"no end":          Paid(),
		"ends soon":       {Name: "starter", Status: apikey.PlanActive, APIAccess: true, EndsAt: now.Add(time.Microsecond)},
		"ended":           {Name: "starter", Status: apikey.PlanActive, APIAccess: true, EndsAt: now.Add(-time.Hour)},
		"without the API": {Name: "basic", Status: apikey.PlanActive},
	}
	for _, status := range []apikey.PlanStatus{
		apikey.PlanPending, apikey.PlanPastDue, apikey.PlanPaymentFailed, apikey.PlanCancelled, apikey.PlanExpired,
	} {
		facts[string(status)] = apikey.Plan{Name: "starter", Status: status, APIAccess: true}
	}
	suite[string, apikey.Plan]{
		look: plans.Store.Plan,
		many: many,
		put: func(t *testing.T, orgID string, p apikey.Plan) apikey.Plan {
			plans.Put(t, orgID, p)
			return p
		},
		remove:  plans.Remove,
		subject: func(n int) string { return fmt.Sprintf("org %d", n) },
		equal: func(a, b apikey.Plan) bool {
			same := a.EndsAt.Equal(b.EndsAt) && a.EndsAt.IsZero() == b.EndsAt.IsZero()
			a.EndsAt, b.EndsAt = time.Time{}, time.Time{}
			return same && a == b
		},
		facts: facts,
	}.run(t)
}

// A suite has the tests of both kinds of stores.
type suite[S comparable, V any] struct {
	look    func(context.Context, S) (V, error)
	many    func(context.Context, []S) (map[S]V, error) // nil: it has none
	put     func(*testing.T, S, V) V                    // returns what the store is to answer
	remove  func(*testing.T, S)
	subject func(n int) S
	equal   func(a, b V) bool
	facts   map[string]V
}

func (s suite[S, V]) run(t *testing.T) {
	var none V
	n := 0
	next := func() S { n++; return s.subject(n) }
	wantAbsent := func(t *testing.T, subject S) {
		t.Helper()
		if got, err := s.look(t.Context(), subject); !errors.Is(err, apikey.ErrNotFound) || !s.equal(got, none) {
			t.Errorf("%+v, %v; want ErrNotFound and nothing else", got, err)
		}
	}
	want := func(t *testing.T, subject S, fact V) {
		t.Helper()
		if got, err := s.look(t.Context(), subject); err != nil || !s.equal(got, fact) {
			t.Errorf("%+v, %v; want %+v", got, err, fact)
		}
	}

	t.Run("absent", func(t *testing.T) { wantAbsent(t, next()) })
	for name, fact := range s.facts { // verdicts are not the store's to reach
		t.Run("fact, "+name, func(t *testing.T) {
			subject := next()
			want(t, subject, s.put(t, subject, fact))
		})
	}
	t.Run("changes are seen", func(t *testing.T) {
		subject, other := next(), next()
		var kept V
		for _, fact := range s.facts {
			kept = s.put(t, other, fact)
		}
		for _, fact := range s.facts {
			want(t, subject, s.put(t, subject, fact))
		}
		s.remove(t, subject)
		wantAbsent(t, subject)
		want(t, other, kept)
	})
	if s.many != nil {
		t.Run("many at once", func(t *testing.T) {
			facts := map[S]V{}
			var subjects []S
			for _, fact := range s.facts {
				there, absent := next(), next()
				facts[there] = s.put(t, there, fact)
				subjects = append(subjects, there, absent)
			}
			for _, asked := range [][]S{subjects, subjects[:2], subjects[:1], subjects[1:2], nil} {
				found, err := s.many(t.Context(), asked)
				if err != nil {
					t.Fatal(err)
				}
				for _, subject := range asked {
					fact, wanted := facts[subject]
					got, ok := found[subject]
					if ok != wanted || !s.equal(got, fact) {
						t.Errorf("of %d, %v is %+v, %v; want %+v, %v", len(asked), subject, got, ok, fact, wanted)
					}
					delete(found, subject)
				}
				if len(found) > 0 {
					t.Errorf("of %d, found what was not asked for: %+v", len(asked), found)
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if found, err := s.many(ctx, subjects); err == nil {
				t.Errorf("cancelled: found %+v, want an error", found)
			}
		})
	}
	t.Run("a cancelled lookup is not an absence", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := s.look(ctx, next()); err == nil || errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("%+v, %v; want an error that is not ErrNotFound", got, err)
		}
	})
	t.Run("concurrent lookups", func(t *testing.T) {
		facts := map[S]V{}
		for _, fact := range s.facts {
			subject := next()
			facts[subject] = s.put(t, subject, fact)
		}
		var wg sync.WaitGroup
		for range 4 {
			for subject, fact := range facts {
				wg.Go(func() { want(t, subject, fact) })
			}
		}
		wg.Wait()
	})
}
