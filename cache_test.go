package apikey_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
)

func newSecret() []byte {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	return secret
}

// A fakeRedis is a Redis inside the client: for tests on a fake clock, which a
// socket would stop, and for faults at a given command.
type fakeRedis struct {
	mu     sync.Mutex
	values map[string]fakeValue
	gets   int
	sets   int
	fault  func(ctx context.Context) error // for every command, if not nil
}

type fakeValue struct {
	value   []byte
	expires time.Time
}

func (f *fakeRedis) client() *redis.Client {
	f.values = map[string]fakeValue{}
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ContextTimeoutEnabled: true}) // no name to resolve
	rdb.AddHook(f)
	return rdb
}

func (f *fakeRedis) DialHook(redis.DialHook) redis.DialHook {
	return func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no network here") }
}

func (f *fakeRedis) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		var first error
		for _, cmd := range cmds {
			if err := f.process(ctx, cmd); err != nil && first == nil {
				first = err
			}
		}
		return first
	}
}

func (f *fakeRedis) ProcessHook(redis.ProcessHook) redis.ProcessHook { return f.process }

func (f *fakeRedis) process(ctx context.Context, cmd redis.Cmder) error {
	f.mu.Lock()
	fault := f.fault
	f.mu.Unlock()
	if fault != nil {
		cmd.SetErr(fault(ctx))
		return cmd.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	args := cmd.Args()
	switch cmd := cmd.(type) {
	case *redis.StringCmd: // GET
		f.gets++
		v, ok := f.values[args[1].(string)]
		if !ok || !time.Now().Before(v.expires) {
			cmd.SetErr(redis.Nil)
			return redis.Nil
		}
		cmd.SetVal(string(v.value))
	case *redis.StatusCmd: // SET name value EX|PX n
		f.sets++
		unit := map[string]time.Duration{"ex": time.Second, "px": time.Millisecond}[args[3].(string)]
		ttl := unit * time.Duration(args[4].(int64))
		f.values[args[1].(string)] = fakeValue{bytes.Clone(args[2].([]byte)), time.Now().Add(ttl)}
	default:
		panic(fmt.Sprintf("the cache sends %v", args))
	}
	return nil
}

func (f *fakeRedis) counts() (gets, sets int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.gets, f.sets
}

func (f *fakeRedis) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// A noSet is a Redis hook that lets no SET through, so that what a test has put
// there stays.
type noSet struct{}

func (noSet) DialHook(next redis.DialHook) redis.DialHook { return next }

func (noSet) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (noSet) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if cmds[0].Name() == "set" { // a batch has no other commands
			return nil
		}
		return next(ctx, cmds)
	}
}

// A replica is one process with its own memory in front of a shared world.
type replica struct {
	*apikey.Middleware
	cache *apikey.Cache
}

func newReplica(w world, rdb redis.UniversalClient, secret []byte, opts *apikey.CacheOptions) replica {
	cache := apikey.NewCache(rdb, secret, opts)
	return replica{apikey.New(w, w, &apikey.Options{Cache: cache}), cache}
}

// ask sends a request with apiKey and returns the code of the answer.
func (r replica) ask(apiKey string) string {
	return r.askContext(context.Background(), apiKey)
}

func (r replica) askContext(ctx context.Context, apiKey string) string {
	req := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
	req.Header.Set("Authorization", "Bearer "+apiKey)
	_, err := r.Authenticate(req)
	if err == nil {
		return admitted
	}
	e, ok := errors.AsType[*apikey.Error](err)
	if !ok {
		return err.Error()
	}
	return e.Code
}

func (r replica) wantCode(t *testing.T, apiKey, want string) {
	t.Helper()
	if got := r.ask(apiKey); got != want {
		t.Errorf("answered %q, want %q", got, want)
	}
}

// meetStore has the replica look up a key of its own, so that it knows the tables that
// the records in Redis must be of.
func (r replica) meetStore(t testing.TB, w world) apikey.CacheStats {
	t.Helper()
	apiKey, _ := w.enrol(t, live, paid)
	if code := r.ask(apiKey); code != admitted {
		t.Errorf("a new key is answered %q", code)
	}
	return r.cache.Stats()
}

// fillRedis asks for a key until Redis holds the records of it. A single SET may
// fail, when the machine is busy for longer than its budget.
func fillRedis(t testing.TB, w world, rdb *redis.Client, secret []byte, apiKey, orgID string) (keyName, planName string) {
	t.Helper()
	r := newReplica(w, rdb, secret, &apikey.CacheOptions{MemoryEntries: -1})
	keyName, planName = r.cache.RedisNames(apikey.HashKey(apiKey), orgID)
	waitFor(t, func() bool {
		r.ask(apiKey)
		return rdb.Exists(context.WithoutCancel(t.Context()), keyName, planName).Val() == 2
	})
	return keyName, planName
}

// TestCacheLayers: a key is read from the store once, a second replica finds it
// in Redis, and from then on memory answers.
func TestCacheLayers(t *testing.T) {
	w, rdb, secret := newPostgresWorld(t), testservers.Redis(t), newSecret()
	apiKey, org := w.enrol(t, live, paid)
	first := newReplica(w, rdb, secret, nil)
	for range 3 {
		first.wantCode(t, apiKey, admitted)
	}
	if got := first.cache.Stats(); got.StoreReads != 2 || got.RedisHits != 0 || got.StoreErrors != 0 {
		t.Errorf("the first replica did %+v, want 2 lookups", got)
	}
	key, plan := fillRedis(t, w, rdb, secret, apiKey, org.ID)
	waitFor(t, func() bool { // a GET may fail, when the machine is busy for longer than its budget
		second := newReplica(w, rdb, secret, nil)
		before := second.meetStore(t, w)
		for range 3 {
			second.wantCode(t, apiKey, admitted)
		}
		before.RedisHits, before.RedisGets, before.RedisBatches = before.RedisHits+2, before.RedisGets+2, before.RedisBatches+2
		return second.cache.Stats() == before
	})
	for _, name := range []string{key, plan} {
		if ttl := rdb.PTTL(t.Context(), name).Val(); ttl <= 14*time.Minute || ttl > 15*time.Minute {
			t.Errorf("%s lives for %v, want StaleIfError", name, ttl)
		}
	}
}

// waitFor waits for what happens in the background.
func waitFor(t testing.TB, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}

// TestRecords: what comes out of Redis is what was read, field by field.
func TestRecords(t *testing.T) {
	w := newMemoryWorld()
	server := miniredis.RunT(t)
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	defer rdb.Close()
	secret := newSecret()
	for i, key := range []apikey.Key{
		{ID: "id", OrgID: "org", Active: true, ExpiresAt: time.Now().Add(time.Hour)},
		{ID: "id\x00\xff", OrgID: "org \xff{x}\r\n", Active: true},
		{OrgID: strings.Repeat("o", 1000), Active: true, ExpiresAt: time.Date(12345, 6, 7, 8, 9, 10, 11, time.FixedZone("", 3600))},
	} {
		plan := apikey.Plan{Name: "n\xff", Status: apikey.PlanActive, APIAccess: true, EndsAt: key.ExpiresAt}
		apiKey := fmt.Sprintf("a-key-issued-elsewhere-%d", i)
		w.set(func() { w.keys[apikey.HashKey(apiKey)], w.plans[key.OrgID] = key, plan })
		for _, where := range []string{"store", "Redis"} {
			r := newReplica(w, rdb, secret, nil)
			req := httptest.NewRequest("GET", "/", nil)
			req.Header.Set("Authorization", "Bearer "+apiKey)
			org, err := r.Authenticate(req)
			if err != nil || org.ID != key.OrgID || org.KeyID != key.ID || org.Plan.Name != plan.Name ||
				org.Plan.Status != plan.Status || !org.Plan.EndsAt.Equal(plan.EndsAt) {
				t.Errorf("from %s: %+v, %v", where, org, err)
			}
			if where == "Redis" && r.cache.Stats() != (apikey.CacheStats{RedisHits: 2, RedisGets: 2, RedisBatches: 2}) {
				t.Errorf("the second time: %+v", r.cache.Stats())
			}
			fillRedis(t, w, rdb, secret, apiKey, key.OrgID)
		}
	}
}

// TestStaleness: how long an answer may stand, on the clock. No feed of changes
// helps: this is the bound that always holds.
func TestStaleness(t *testing.T) {
	type step struct {
		after  time.Duration // since the step before
		change func(w *memoryWorld, h apikey.KeyHash, orgID string)
		want   string
	}
	setKey := func(change func(*apikey.Key)) func(*memoryWorld, apikey.KeyHash, string) {
		return func(w *memoryWorld, h apikey.KeyHash, _ string) {
			key := w.keys[h]
			change(&key)
			w.keys[h] = key
		}
	}
	setPlan := func(change func(*apikey.Plan)) func(*memoryWorld, apikey.KeyHash, string) {
		return func(w *memoryWorld, _ apikey.KeyHash, orgID string) {
			plan := w.plans[orgID]
			change(&plan)
			w.plans[orgID] = plan
		}
	}
	const almost = time.Second - time.Millisecond
	for name, c := range map[string]struct {
		key   keyState
		plan  planState
		steps []step
	}{
		"revoked": {live, paid, []step{
			{0, nil, admitted},
			{0, setKey(func(k *apikey.Key) { k.Active = false }), admitted},
			{9 * time.Second, nil, admitted},
			{time.Second, nil, invalid}, // MaxStaleness after the read
		}},
		"deleted": {live, paid, []step{
			{0, nil, admitted},
			{5 * time.Second, func(w *memoryWorld, h apikey.KeyHash, _ string) { delete(w.keys, h) }, admitted},
			{5 * time.Second, nil, invalid},
			{time.Millisecond, nil, invalid},
		}},
		"activated again": {deactivated, paid, []step{
			{0, nil, invalid},
			{0, setKey(func(k *apikey.Key) { k.Active = true }), invalid},
			{almost, nil, invalid},
			{time.Millisecond, nil, admitted}, // a refusal stands for a second at most
		}},
		"created after it was asked for": {unknown, paid, []step{
			{0, nil, invalid},
			{0, func(w *memoryWorld, h apikey.KeyHash, orgID string) {
				w.keys[h] = apikey.Key{ID: "key_1", OrgID: orgID, Active: true}
			}, invalid},
			{almost, nil, invalid},
			{time.Millisecond, nil, admitted},
			{9 * time.Second, nil, admitted},
		}},
		"paid": {live, pastDue, []step{
			{0, nil, planExpired},
			{0, setPlan(func(p *apikey.Plan) { p.Status = apikey.PlanActive }), planExpired},
			{almost, nil, planExpired},
			{time.Millisecond, nil, admitted},
		}},
		"subscribed": {live, noSubscription, []step{
			{0, nil, planExpired},
			{0, func(w *memoryWorld, _ apikey.KeyHash, orgID string) { w.plans[orgID] = planFacts()[paid] }, planExpired},
			{time.Second, nil, admitted},
		}},
		"downgraded": {live, paid, []step{
			{0, nil, admitted},
			{0, setPlan(func(p *apikey.Plan) { p.APIAccess = false }), admitted},
			{10 * time.Second, nil, planExpired},
		}},
		"the plan ends while it is cached": {live, paid, []step{
			{0, setPlan(func(p *apikey.Plan) { p.EndsAt = time.Now().Add(3 * time.Second) }), admitted},
			{3*time.Second - time.Nanosecond, nil, admitted},
			{time.Nanosecond, nil, planExpired}, // at the instant, whatever the cache
		}},
		"the key ends while it is cached": {live, paid, []step{
			{0, setKey(func(k *apikey.Key) { k.ExpiresAt = time.Now().Add(3 * time.Second) }), admitted},
			{3*time.Second - time.Nanosecond, nil, admitted},
			{time.Nanosecond, nil, invalid},
		}},
		"renewed before the end": {live, paid, []step{
			{0, setPlan(func(p *apikey.Plan) { p.EndsAt = time.Now().Add(3 * time.Second) }), admitted},
			{2 * time.Second, setPlan(func(p *apikey.Plan) { p.EndsAt = time.Time{} }), admitted},
			{time.Second, nil, admitted}, // would be refused on what is cached, and is read again first
		}},
	} {
		for _, layer := range []string{"memory and Redis", "Redis"} {
			t.Run(name+", "+layer, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newMemoryWorld()
					apiKey, org := w.enrol(t, c.key, c.plan)
					opts := new(apikey.CacheOptions)
					if layer == "Redis" {
						opts.MemoryEntries = -1
					}
					rdb := new(fakeRedis).client()
					defer rdb.Close()
					r := newReplica(w, rdb, newSecret(), opts)
					for i, step := range c.steps {
						time.Sleep(step.after)
						if step.change != nil {
							w.set(func() { step.change(w, apikey.HashKey(apiKey), org.ID) })
						}
						want := step.want
						if absent := c.key == unknown || c.plan == noSubscription; absent && layer == "Redis" && i > 0 {
							want = admitted // absence is not in Redis, so it is never stale
						}
						if got := r.ask(apiKey); got != want {
							t.Errorf("step %d: answered %q, want %q", i, got, want)
						}
						synctest.Wait() // for the SET
					}
				})
			})
		}
	}
}

// TestAbsentStaysOut: made-up keys leave nothing in Redis, and an absent key is
// looked for once a second.
func TestAbsentStaysOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, fake := newMemoryWorld(), new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		r := newReplica(w, rdb, newSecret(), nil)
		apiKey, _ := w.enrol(t, unknown, paid)
		for range 100 {
			r.wantCode(t, apiKey, invalid)
		}
		synctest.Wait()
		if gets, sets := fake.counts(); gets != 1 || sets != 0 || w.readCount() != 1 {
			t.Errorf("%d GETs, %d SETs, %d lookups; want 1, 0, 1", gets, sets, w.readCount())
		}
	})
}

// TestDeletedStaysOut: once a key is found to be gone, its old record does not
// bring on a lookup for every request.
func TestDeletedStaysOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newMemoryWorld()
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		r := newReplica(w, rdb, newSecret(), nil)
		apiKey, _ := w.enrol(t, live, paid)
		r.wantCode(t, apiKey, admitted)
		w.set(func() { delete(w.keys, apikey.HashKey(apiKey)) })
		time.Sleep(10 * time.Second)
		before := w.readCount()
		for range 100 {
			r.wantCode(t, apiKey, invalid)
		}
		if n := w.readCount() - before; n != 1 {
			t.Errorf("%d lookups, want 1", n)
		}
	})
}

// TestSecondLook: a request that found nothing in memory, and then comes too late
// for the flight it wanted to join, finds what that one brought.
func TestSecondLook(t *testing.T) {
	w, fake := newMemoryWorld(), new(fakeRedis)
	rdb := fake.client()
	defer rdb.Close()
	r := newReplica(w, rdb, newSecret(), nil)
	apiKey, org := w.enrol(t, live, paid)
	r.wantCode(t, apiKey, admitted)
	key, err := r.cache.KeysBehind(apikey.KeyStoreFunc(func(context.Context, apikey.KeyHash) (apikey.Key, error) {
		t.Error("looks again")
		return apikey.Key{}, errStore
	})).Fetch(t.Context(), apikey.HashKey(apiKey))
	if err != nil || key.ID != org.KeyID {
		t.Errorf("fetched %+v, %v", key, err)
	}
}

// TestSecretRotation: replicas with the new secret and with the old one use each
// other's records, if they accept them.
func TestSecretRotation(t *testing.T) {
	w, rdb, old, secret := newPostgresWorld(t), testservers.Redis(t), newSecret(), newSecret()
	for name, c := range map[string]struct {
		writes, reads []byte
		accepts       [][]byte
		hits          uint64
	}{
		"before":                     {old, old, [][]byte{secret}, 2},
		"the new one comes":          {secret, old, [][]byte{secret}, 2},
		"the old one goes":           {old, secret, [][]byte{old}, 2},
		"one that nobody has agreed": {old, secret, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			apiKey, org := w.enrol(t, live, paid)
			fillRedis(t, w, rdb, c.writes, apiKey, org.ID)
			waitFor(t, func() bool { // a GET may fail, when the machine is busy for longer than its budget
				r := newReplica(w, rdb, c.reads, &apikey.CacheOptions{AcceptedSecrets: c.accepts})
				before := r.meetStore(t, w)
				r.wantCode(t, apiKey, admitted)
				got := r.cache.Stats()
				return got.RedisHits-before.RedisHits == c.hits && got.RedisRejected-before.RedisRejected == 2-c.hits
			})
		})
	}
}

// TestForgery: whatever somebody with access to Redis does to a record, it is a
// miss, is counted, and the store decides.
func TestForgery(t *testing.T) {
	w, rdb, secret := newPostgresWorld(t), testservers.Redis(t), newSecret()
	apiKey, org := w.enrol(t, live, paid)
	revokedKey, revokedOrg := w.enrol(t, deactivated, pastDue)
	names := func(apiKey string, org apikey.Org) (string, string) {
		return newReplica(w, rdb, secret, nil).cache.RedisNames(apikey.HashKey(apiKey), org.ID)
	}
	keyName, planName := names(apiKey, org)
	revokedName, revokedPlan := names(revokedKey, revokedOrg)

	fillRedis(t, w, rdb, secret, apiKey, org.ID)
	goodKey, _ := rdb.Get(t.Context(), keyName).Bytes()
	goodPlan, _ := rdb.Get(t.Context(), planName).Bytes()
	put := func(name string, value []byte) {
		if err := rdb.Set(t.Context(), name, value, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
	}
	// rejected asks a replica without memory and wants n values rejected.
	reader := testservers.Redis(t)
	reader.AddHook(noSet{})
	rejected := func(what, apiKey, want string, n uint64) {
		t.Helper()
		r := newReplica(w, reader, secret, &apikey.CacheOptions{MemoryEntries: -1})
		if got := r.ask(apiKey); got != want {
			t.Errorf("%s: answered %q, want %q", what, got, want)
		}
		if got := r.cache.Stats(); got.RedisRejected != n || got.RedisMisses < n {
			t.Errorf("%s: %+v, want %d rejected and missed", what, got, n)
		}
	}

	for _, record := range []struct {
		name  string
		value []byte
	}{{keyName, goodKey}, {planName, goodPlan}} {
		for i := range record.value {
			flipped := bytes.Clone(record.value)
			flipped[i] ^= 0x40
			put(record.name, flipped)
			rejected(fmt.Sprintf("byte %d of %s flipped", i, record.name), apiKey, admitted, 1)
			put(record.name, record.value[:i])
			rejected(fmt.Sprintf("%s cut off after %d", record.name, i), apiKey, admitted, 1)
		}
		put(record.name, []byte(`{"active":true}`))
		rejected("made up", apiKey, admitted, 1)
		put(record.name, record.value)
	}
	rejected("as it was", apiKey, admitted, 0)

	put(revokedName, goodKey)
	rejected("a live key's record for a revoked key", revokedKey, invalid, 1)
	testservers.Exec(t, w.pool, `UPDATE api_keys SET active = true WHERE id = $1`, revokedOrg.KeyID)
	if err := rdb.Del(t.Context(), revokedName).Err(); err != nil {
		t.Fatal(err)
	}
	put(revokedPlan, goodPlan)
	rejected("a paid plan's record for another organisation", revokedKey, planExpired, 1)
	put(keyName, goodPlan)
	rejected("a plan's record for a key", apiKey, admitted, 1)

	put(keyName, goodKey)
	other := newReplica(w, reader, newSecret(), nil)
	other.wantCode(t, apiKey, admitted)
	if got := other.cache.Stats(); got.RedisRejected == 0 || got.StoreReads != 2 {
		t.Errorf("under another secret: %+v", got)
	}
	if err := rdb.Del(t.Context(), keyName).Err(); err != nil {
		t.Fatal(err)
	}
	if err := rdb.LPush(t.Context(), keyName, "x").Err(); err != nil {
		t.Fatal(err)
	}
	if got := newReplica(w, reader, secret, nil).ask(apiKey); got != admitted {
		t.Errorf("a value of another type: answered %q", got)
	}
}

// TestReplay: a record that was good once does not come back when it is put back.
func TestReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, fake, secret := newMemoryWorld(), new(fakeRedis), newSecret()
		rdb := fake.client()
		defer rdb.Close()
		apiKey, org := w.enrol(t, live, paid)
		newReplica(w, rdb, secret, nil).wantCode(t, apiKey, admitted)
		synctest.Wait()
		keyName, _ := newReplica(w, rdb, secret, nil).cache.RedisNames(apikey.HashKey(apiKey), org.ID)
		var old fakeValue
		fake.set(func() { old = fake.values[keyName] })
		old.expires = time.Now().Add(time.Hour)

		w.set(func() { delete(w.keys, apikey.HashKey(apiKey)) })
		time.Sleep(10 * time.Second)
		fake.set(func() { fake.values[keyName] = old })
		r := newReplica(w, rdb, secret, nil)
		r.wantCode(t, apiKey, invalid)
		if got := r.cache.Stats(); got.RedisMisses != 1 || got.RedisRejected != 0 {
			t.Errorf("%+v, want a miss that is not rejected", got)
		}
	})
}

// TestRecordFromTheFuture: a replica whose clock is ahead cannot make its records
// live longer on others.
func TestRecordFromTheFuture(t *testing.T) {
	w, secret := newMemoryWorld(), newSecret()
	apiKey, org := w.enrol(t, live, paid)
	var ahead fakeValue
	var keyName string
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Minute)
		fake := new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		r := newReplica(w, rdb, secret, nil)
		r.wantCode(t, apiKey, admitted)
		synctest.Wait()
		keyName, _ = r.cache.RedisNames(apikey.HashKey(apiKey), org.ID)
		fake.set(func() { ahead = fake.values[keyName] })
	})
	synctest.Test(t, func(t *testing.T) { // the clock starts anew
		fake := new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		fake.values[keyName] = ahead
		r := newReplica(w, rdb, secret, nil)
		r.wantCode(t, apiKey, admitted)
		if got := r.cache.Stats(); got.RedisHits != 0 || got.RedisRejected != 0 {
			t.Errorf("%+v, want the record ignored", got)
		}
	})
}

// A slowWorld holds lookups back until release is closed.
type slowWorld struct {
	*memoryWorld
	started chan struct{}
	release chan struct{}
}

func (w slowWorld) Key(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
	w.started <- struct{}{}
	select {
	case <-w.release:
	case <-ctx.Done():
		return apikey.Key{}, ctx.Err()
	}
	return w.memoryWorld.Key(ctx, h)
}

// TestStampede: a thousand requests for one cold key cause one GET and one lookup
// of each kind, and those who give up do not disturb the others.
func TestStampede(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		w := slowWorld{newMemoryWorld(), make(chan struct{}, 1000), make(chan struct{})}
		r := newReplica(w, rdb, newSecret(), nil)
		apiKey, _ := w.enrol(t, live, paid)

		impatient, giveUp := context.WithCancel(t.Context())
		first, other := make(chan string), make(chan string)
		go func() { first <- r.askContext(impatient, apiKey) }() // makes the lookup
		<-w.started
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { r.wantCode(t, apiKey, admitted) })
		}
		go func() { other <- r.askContext(impatient, apiKey) }()
		synctest.Wait()
		giveUp()
		if got := <-other; got != unavailable {
			t.Errorf("who gave up was answered %q, want %q", got, unavailable)
		}
		close(w.release)
		wg.Wait()
		if got := <-first; got != unavailable && got != admitted { // it may leave before the plan is looked up
			t.Errorf("who made the lookup, and gave up, was answered %q", got)
		}
		if gets, _ := fake.counts(); gets != 2 || w.readCount() != 2 {
			t.Errorf("%d GETs and %d lookups, want 2 and 2: one for the key, one for the plan", gets, w.readCount())
		}
	})
}

// TestOneCacheManyMiddlewares: a service may mount several.
func TestOneCacheManyMiddlewares(t *testing.T) {
	w, server := newMemoryWorld(), miniredis.RunT(t)
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	defer rdb.Close()
	apiKey, _ := w.enrol(t, live, paid)
	cache := apikey.NewCache(rdb, newSecret(), nil)
	for range 3 {
		r := replica{apikey.New(w, w, &apikey.Options{Cache: cache}), cache}
		r.wantCode(t, apiKey, admitted)
	}
	if n := w.readCount(); n != 2 {
		t.Errorf("%d lookups, want 2: the middlewares share the records", n)
	}
}

func TestCacheConfigurationFaults(t *testing.T) {
	good := new(fakeRedis).client()
	defer good.Close()
	deaf := redis.NewClient(&redis.Options{})
	defer deaf.Close()
	deafCluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}})
	defer deafCluster.Close()
	deafRing := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}})
	defer deafRing.Close()
	for name, c := range map[string]struct {
		construct func()
		want      string
	}{
		"no client":    {func() { apikey.NewCache(nil, newSecret(), nil) }, "pass a Redis client"},
		"nil client":   {func() { apikey.NewCache((*redis.Client)(nil), newSecret(), nil) }, "pass a Redis client"},
		"deaf client":  {func() { apikey.NewCache(deaf, newSecret(), nil) }, "set ContextTimeoutEnabled: true"},
		"deaf cluster": {func() { apikey.NewCache(deafCluster, newSecret(), nil) }, "set ContextTimeoutEnabled: true"},
		"deaf ring":    {func() { apikey.NewCache(deafRing, newSecret(), nil) }, "set ContextTimeoutEnabled: true"},
		"no secret":    {func() { apikey.NewCache(good, nil, nil) }, "0 bytes: use at least 32"},
		"short secret": {func() { apikey.NewCache(good, make([]byte, 31), nil) }, "31 bytes: use at least 32"},
		"negative staleness": {func() {
			apikey.NewCache(good, newSecret(), &apikey.CacheOptions{MaxStaleness: -1})
		}, "use at least 100ms"},
		"refresh before stale": {func() {
			apikey.NewCache(good, newSecret(), &apikey.CacheOptions{RefreshAfter: time.Second})
		}, "use at least MaxStaleness, 10s"},
		"no grace at all": {func() {
			apikey.NewCache(good, newSecret(), &apikey.CacheOptions{StaleIfError: time.Second})
		}, "StaleIfError is 1s: use at least MaxStaleness, 10s"},
	} {
		t.Run(name, func(t *testing.T) { wantPanic(t, c.construct, c.want) })
	}
}
