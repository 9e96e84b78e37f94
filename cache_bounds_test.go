package apikey_test

// For how long after its revocation a key may be admitted, whatever the options are.

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/world"
)

// broken is what does not work from the revocation on.
type broken string

const (
	nothing         broken = "nothing"
	theFeed         broken = "the feed"
	theTriggers     broken = "the triggers"
	theStore        broken = "the store, after the revocation was announced"
	storeAndFeed    broken = "the store and the feed"
	feedAlreadyGone broken = "the feed from the start"
)

// bound returns for how long after its revocation a key may be admitted, counted from when the
// key was last read if that is later than what was heard. It is what the documents say.
func bound(o apikey.CacheOptions, b broken) time.Duration {
	switch b {
	case nothing, theStore:
		return 0
	case theFeed, feedAlreadyGone:
		return o.MaxStaleness
	case theTriggers:
		return o.RefreshAfter
	}
	return o.StaleIfError
}

// option is a value of an option, and its name.
type option struct {
	name string
	set  func(*apikey.CacheOptions)
}

// TestBounds: each option at its smallest, default and largest, in all combinations.
func TestBounds(t *testing.T) {
	const smallest, largest = 100 * time.Millisecond, 48 * time.Hour
	var dimensions = [][]option{
		{
			{"MaxStaleness smallest", func(o *apikey.CacheOptions) { o.MaxStaleness = smallest }},
			{"default", func(*apikey.CacheOptions) {}},
			{"largest", func(o *apikey.CacheOptions) { o.MaxStaleness = largest / 2 }},
		},
		{
			{"RefreshAfter smallest", func(o *apikey.CacheOptions) { o.RefreshAfter = apikey.Defaults(o).MaxStaleness }},
			{"default", func(*apikey.CacheOptions) {}},
			{"largest", func(o *apikey.CacheOptions) { o.RefreshAfter = largest }},
		},
		{
			{"StaleIfError smallest", func(o *apikey.CacheOptions) { o.StaleIfError = apikey.Defaults(o).MaxStaleness }},
			{"default", func(*apikey.CacheOptions) {}},
			{"largest", func(o *apikey.CacheOptions) { o.StaleIfError = largest }},
		},
		{
			{"no memory", func(o *apikey.CacheOptions) { o.MemoryEntries = -1 }},
			{"memory", func(*apikey.CacheOptions) {}},
		},
	}
	combinations := []option{{"", func(*apikey.CacheOptions) {}}}
	for _, values := range dimensions {
		var next []option
		for _, c := range combinations {
			for _, v := range values {
				next = append(next, option{c.name + v.name + ", ", func(o *apikey.CacheOptions) { c.set(o); v.set(o) }})
			}
		}
		combinations = next
	}
	for _, c := range combinations {
		t.Run(c.name, func(t *testing.T) {
			var o apikey.CacheOptions
			c.set(&o)
			synctest.Test(t, func(t *testing.T) {
				for _, b := range []broken{nothing, theFeed, theTriggers, theStore, storeAndFeed, feedAlreadyGone} {
					testBound(t, o, b)
				}
			})
		})
	}
}

// testBound asks for a key at many times after its revocation, each time in a world of its own, in
// which the key was read just before.
func testBound(t *testing.T, o apikey.CacheOptions, b broken) {
	t.Helper()
	full := apikey.Defaults(&o)
	const moment = 2 * time.Millisecond
	limit := bound(full, b)
	ages := []time.Duration{moment, limit - moment, limit + moment}
	for _, d := range []time.Duration{full.MaxStaleness, full.RefreshAfter, full.StaleIfError} {
		ages = append(ages, d/2, d-moment, d+moment, 2*d+moment, 5*d)
	}
	for _, age := range ages {
		if age <= 0 {
			continue
		}
		life := max(full.RefreshAfter, full.StaleIfError)
		for _, lead := range []time.Duration{life - age/4, life/2 - age/4} {
			switch code := askAt(t, o, b, age, max(lead, 0)); {
			case age > limit && code == world.Admitted:
				t.Errorf("%s is broken: admitted %v after the revocation, bound %v", b, age, limit)
			case age < limit && age > limit-2*moment && o.MemoryEntries == 0 && code != world.Admitted:
				t.Errorf("%s is broken: %q %v after the revocation, although the bound is %v", b, code, age, limit)
			}
		}
	}
}

// askAt returns the answer at an age of the revocation. lead is for how long others were announced before.
func askAt(t *testing.T, o apikey.CacheOptions, b broken, age, lead time.Duration) string {
	t.Helper()
	rdb := new(fakeRedis).client()
	defer rdb.Close()
	w := world.NewMemory()
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	h := apikey.HashKey(apiKey)
	cache := apikey.NewCache(rdb, world.NewSecret(), &o)
	log := cache.Log()
	xid := uint64(10) // the next transaction
	stamp := func(ctx context.Context) { snapshot.Report(ctx, fmt.Sprintf("%d:%[1]d:", xid), 1) }
	r := world.ReplicaOn(apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
		stamp(ctx)
		return w.Key(ctx, h)
	}), apikey.PlanStoreFunc(func(ctx context.Context, orgID string) (apikey.Plan, error) {
		stamp(ctx)
		return w.Plan(ctx, orgID)
	}), cache)

	if b != feedAlreadyGone {
		first, err := snapshot.Parse("9:9:")
		world.MustNot(t, err)
		log.Begin("history", first.On(1), world.Instant())
		// The log is about to forget what is old when the key is revoked.
		log.Announce(feed.KeyTopic(1<<63), 1, world.Instant())
		time.Sleep(lead)
		log.Renew(world.Instant())
	}
	r.WantCode(t, apiKey, world.Admitted)
	synctest.Wait() // for Redis

	w.Set(func() {
		k := w.KeyRows[h]
		k.Active = false
		w.KeyRows[h] = k
	})
	revoked := xid
	xid++
	if b == theFeed || b == storeAndFeed {
		log.End(nil)
	}
	if b == nothing || b == theStore {
		log.Announce(world.KeyTopic(h), revoked, world.Instant())
	}
	if b == theStore || b == storeAndFeed {
		w.Set(func() { w.Err = world.ErrStore })
	}
	// Others go on meanwhile, so that what is old is forgotten.
	const parts = 8
	for i := range parts {
		time.Sleep(age*time.Duration(i+1)/parts - age*time.Duration(i)/parts)
		if b == nothing || b == theTriggers || b == theStore {
			log.Announce(feed.KeyTopic(uint64(i)), xid, world.Instant())
			xid++
			log.Renew(world.Instant())
		}
	}
	return r.Ask(apiKey)
}
