package apikey_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/shared"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

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
	case *redis.StringCmd: // GETRANGE name 0 last
		f.gets++
		if v, ok := f.values[args[1].(string)]; ok && time.Now().Before(v.expires) {
			cmd.SetVal(string(v.value[:min(len(v.value), 1+int(args[3].(int64)))]))
		}
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

// TestCacheLayers: a key is read from the store once, a second replica finds it
// in Redis, and from then on memory answers.
func TestCacheLayers(t *testing.T) {
	w, rdb, secret := world.NewPostgres(t), testservers.Redis(t), world.NewSecret()
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	first := world.NewReplica(w, rdb, secret, nil)
	for range 3 {
		first.WantCode(t, apiKey, world.Admitted)
	}
	if got := first.Cache.Stats(); got.StoreReads != 2 || got.RedisHits != 0 || got.StoreErrors != 0 {
		t.Errorf("the first replica did %+v, want 2 lookups", got)
	}
	key, plan := world.FillRedis(t, w, rdb, secret, apiKey, org.ID)
	world.WaitFor(t, func() bool { // a GET may fail, when the machine is busy for longer than its budget
		second := world.NewReplica(w, rdb, secret, nil)
		before := second.MeetStore(t, w)
		for range 3 {
			second.WantCode(t, apiKey, world.Admitted)
		}
		before.RedisHits, before.RedisGets, before.RedisBatches = before.RedisHits+2, before.RedisGets+2, before.RedisBatches+2
		return second.Cache.Stats() == before
	})
	for _, name := range []string{key, plan} {
		if ttl := rdb.PTTL(t.Context(), name).Val(); ttl <= 14*time.Minute || ttl > 15*time.Minute {
			t.Errorf("%s lives for %v, want StaleIfError", name, ttl)
		}
	}
}

// TestRecords: what comes out of Redis is what was read, field by field.
func TestRecords(t *testing.T) {
	w := world.NewMemory()
	server := miniredis.RunT(t)
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	defer rdb.Close()
	secret := world.NewSecret()
	for i, key := range []apikey.Key{
		{ID: "id", OrgID: "org", Active: true, ExpiresAt: time.Now().Add(time.Hour)},
		{ID: "id\x00\xff", OrgID: "org \xff{x}\r\n", Active: true},
		{OrgID: strings.Repeat("o", 1000), Active: true, ExpiresAt: time.Date(12345, 6, 7, 8, 9, 10, 11, time.FixedZone("", 3600))},
	} {
		plan := apikey.Plan{Name: "n\xff", Status: apikey.PlanActive, APIAccess: true, EndsAt: key.ExpiresAt}
		apiKey := fmt.Sprintf("a-key-issued-elsewhere-%d", i)
		w.Set(func() { w.KeyRows[apikey.HashKey(apiKey)], w.PlanRows[key.OrgID] = key, plan })
		for _, where := range []string{"store", "Redis"} {
			r := world.NewReplica(w, rdb, secret, nil)
			req := httptest.NewRequest("GET", "/", nil)
			req.Header.Set("Authorization", "Bearer "+apiKey)
			org, err := r.Authenticate(req)
			if err != nil || org.ID != key.OrgID || org.KeyID != key.ID || org.Plan.Name != plan.Name ||
				org.Plan.Status != plan.Status || !org.Plan.EndsAt.Equal(plan.EndsAt) {
				t.Errorf("from %s: %+v, %v", where, org, err)
			}
			if where == "Redis" && r.Cache.Stats() != (apikey.CacheStats{RedisHits: 2, RedisGets: 2, RedisBatches: 2}) {
				t.Errorf("the second time: %+v", r.Cache.Stats())
			}
			world.FillRedis(t, w, rdb, secret, apiKey, key.OrgID)
		}
	}
}

// TestStaleness: how long an answer may stand, on the clock. No feed of changes
// helps: this is the bound that always holds.
func TestStaleness(t *testing.T) {
	type step struct {
		after  time.Duration // since the step before
		change func(w *world.Memory, h apikey.KeyHash, orgID string)
		want   string
	}
	setKey := func(change func(*apikey.Key)) func(*world.Memory, apikey.KeyHash, string) {
		return func(w *world.Memory, h apikey.KeyHash, _ string) {
			key := w.KeyRows[h]
			change(&key)
			w.KeyRows[h] = key
		}
	}
	setPlan := func(change func(*apikey.Plan)) func(*world.Memory, apikey.KeyHash, string) {
		return func(w *world.Memory, _ apikey.KeyHash, orgID string) {
			plan := w.PlanRows[orgID]
			change(&plan)
			w.PlanRows[orgID] = plan
		}
	}
	const almost = time.Second - time.Millisecond
	for name, c := range map[string]struct {
		key   world.KeyState
		plan  world.PlanState
		steps []step
	}{
		"revoked": {world.Live, world.Paid, []step{
			{0, nil, world.Admitted},
			{0, setKey(func(k *apikey.Key) { k.Active = false }), world.Admitted},
			{9 * time.Second, nil, world.Admitted},
			{time.Second, nil, world.Invalid}, // MaxStaleness after the read
		}},
		"deleted": {world.Live, world.Paid, []step{
			{0, nil, world.Admitted},
			{5 * time.Second, func(w *world.Memory, h apikey.KeyHash, _ string) { delete(w.KeyRows, h) }, world.Admitted},
			{5 * time.Second, nil, world.Invalid},
			{time.Millisecond, nil, world.Invalid},
		}},
		"activated again": {world.Deactivated, world.Paid, []step{
			{0, nil, world.Invalid},
			{0, setKey(func(k *apikey.Key) { k.Active = true }), world.Invalid},
			{almost, nil, world.Invalid},
			{time.Millisecond, nil, world.Admitted}, // a refusal stands for a second at most
		}},
		"created after it was asked for": {world.Unknown, world.Paid, []step{
			{0, nil, world.Invalid},
			{0, func(w *world.Memory, h apikey.KeyHash, orgID string) {
				w.KeyRows[h] = apikey.Key{ID: "key_1", OrgID: orgID, Active: true}
			}, world.Invalid},
			{almost, nil, world.Invalid},
			{time.Millisecond, nil, world.Admitted},
			{9 * time.Second, nil, world.Admitted},
		}},
		"paid": {world.Live, world.PastDue, []step{
			{0, nil, world.PlanExpired},
			{0, setPlan(func(p *apikey.Plan) { p.Status = apikey.PlanActive }), world.PlanExpired},
			{almost, nil, world.PlanExpired},
			{time.Millisecond, nil, world.Admitted},
		}},
		"subscribed": {world.Live, world.NoSubscription, []step{
			{0, nil, world.PlanExpired},
			{0, func(w *world.Memory, _ apikey.KeyHash, orgID string) {
				w.PlanRows[orgID] = world.PlanFacts()[world.Paid]
			}, world.PlanExpired},
			{time.Second, nil, world.Admitted},
		}},
		"downgraded": {world.Live, world.Paid, []step{
			{0, nil, world.Admitted},
			{0, setPlan(func(p *apikey.Plan) { p.APIAccess = false }), world.Admitted},
			{10 * time.Second, nil, world.PlanExpired},
		}},
		"the plan ends while it is cached": {world.Live, world.Paid, []step{
			{0, setPlan(func(p *apikey.Plan) { p.EndsAt = time.Now().Add(3 * time.Second) }), world.Admitted},
			{3*time.Second - time.Nanosecond, nil, world.Admitted},
			{time.Nanosecond, nil, world.PlanExpired}, // at the instant, whatever the cache
		}},
		"the key ends while it is cached": {world.Live, world.Paid, []step{
			{0, setKey(func(k *apikey.Key) { k.ExpiresAt = time.Now().Add(3 * time.Second) }), world.Admitted},
			{3*time.Second - time.Nanosecond, nil, world.Admitted},
			{time.Nanosecond, nil, world.Invalid},
		}},
		"renewed before the end": {world.Live, world.Paid, []step{
			{0, setPlan(func(p *apikey.Plan) { p.EndsAt = time.Now().Add(3 * time.Second) }), world.Admitted},
			{2 * time.Second, setPlan(func(p *apikey.Plan) { p.EndsAt = time.Time{} }), world.Admitted},
			{time.Second, nil, world.Admitted}, // would be refused on what is cached, and is read again first
		}},
	} {
		for _, layer := range []string{"memory and Redis", "Redis"} {
			t.Run(name+", "+layer, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := world.NewMemory()
					apiKey, org := w.Enrol(t, c.key, c.plan)
					opts := new(apikey.CacheOptions)
					if layer == "Redis" {
						opts.MemoryEntries = -1
					}
					rdb := new(fakeRedis).client()
					defer rdb.Close()
					r := world.NewReplica(w, rdb, world.NewSecret(), opts)
					for i, step := range c.steps {
						time.Sleep(step.after)
						if step.change != nil {
							w.Set(func() { step.change(w, apikey.HashKey(apiKey), org.ID) })
						}
						want := step.want
						if absent := c.key == world.Unknown || c.plan == world.NoSubscription; absent && layer == "Redis" && i > 0 {
							want = world.Admitted // absence is not in Redis, so it is never stale
						}
						if got := r.Ask(apiKey); got != want {
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
		w, fake := world.NewMemory(), new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		apiKey, _ := w.Enrol(t, world.Unknown, world.Paid)
		for range 100 {
			r.WantCode(t, apiKey, world.Invalid)
		}
		synctest.Wait()
		if gets, sets := fake.counts(); gets != 1 || sets != 0 || w.ReadCount() != 1 {
			t.Errorf("%d GETs, %d SETs, %d lookups; want 1, 0, 1", gets, sets, w.ReadCount())
		}
	})
}

// TestDeletedStaysOut: once a key is found to be gone, its old record does not
// bring on a lookup for every request.
func TestDeletedStaysOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := world.NewMemory()
		rdb := new(fakeRedis).client()
		defer rdb.Close()
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)
		r.WantCode(t, apiKey, world.Admitted)
		w.Set(func() { delete(w.KeyRows, apikey.HashKey(apiKey)) })
		time.Sleep(10 * time.Second)
		before := w.ReadCount()
		for range 100 {
			r.WantCode(t, apiKey, world.Invalid)
		}
		if n := w.ReadCount() - before; n != 1 {
			t.Errorf("%d lookups, want 1", n)
		}
	})
}

// TestSecretRotation: replicas with the new secret and with the old one use each
// other's records, if they accept them.
func TestSecretRotation(t *testing.T) {
	w, rdb, old, secret := world.NewPostgres(t), testservers.Redis(t), world.NewSecret(), world.NewSecret()
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
			apiKey, org := w.Enrol(t, world.Live, world.Paid)
			world.FillRedis(t, w, rdb, c.writes, apiKey, org.ID)
			world.WaitFor(t, func() bool { // a GET may fail, when the machine is busy for longer than its budget
				r := world.NewReplica(w, rdb, c.reads, &apikey.CacheOptions{AcceptedSecrets: c.accepts})
				before := r.MeetStore(t, w)
				r.WantCode(t, apiKey, world.Admitted)
				got := r.Cache.Stats()
				return got.RedisHits-before.RedisHits == c.hits && got.RedisRejected-before.RedisRejected == 2-c.hits
			})
		})
	}
}

// TestForgery: whatever somebody with access to Redis does to a record, it is a
// miss, is counted, and the store decides.
func TestForgery(t *testing.T) {
	t.Parallel()
	w, rdb, secret := world.NewPostgres(t), testservers.Redis(t), world.NewSecret()
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	revokedKey, revokedOrg := w.Enrol(t, world.Deactivated, world.PastDue)
	names := func(apiKey string, org apikey.Org) (string, string) {
		return world.RedisNames(apikey.HashKey(apiKey), org.ID)
	}
	keyName, planName := names(apiKey, org)
	revokedName, revokedPlan := names(revokedKey, revokedOrg)

	world.FillRedis(t, w, rdb, secret, apiKey, org.ID)
	goodKey, _ := rdb.Get(t.Context(), keyName).Bytes()
	goodPlan, _ := rdb.Get(t.Context(), planName).Bytes()
	put := func(name string, value []byte) {
		if err := rdb.Set(t.Context(), name, value, time.Minute).Err(); err != nil {
			t.Fatal(err)
		}
	}
	// rejected asks a replica without memory and wants n values rejected.
	reader := testservers.Redis(t)
	reader.AddHook(world.NoSet{})
	opts := &apikey.CacheOptions{MemoryEntries: -1, RedisTimeout: 5 * time.Second} // on a busy machine
	rejected := func(what, apiKey, want string, n uint64) {
		t.Helper()
		r := world.NewReplica(w, reader, secret, opts)
		if got := r.Ask(apiKey); got != want {
			t.Errorf("%s: answered %q, want %q", what, got, want)
		}
		if got := r.Cache.Stats(); got.RedisRejected != n || got.RedisMisses < n {
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
			rejected(fmt.Sprintf("byte %d of %s flipped", i, record.name), apiKey, world.Admitted, 1)
			put(record.name, record.value[:i])
			rejected(fmt.Sprintf("%s cut off after %d", record.name, i), apiKey, world.Admitted, uint64(min(i, 1))) // nothing is no record
		}
		put(record.name, []byte(`{"active":true}`))
		rejected("made up", apiKey, world.Admitted, 1)
		put(record.name, append(bytes.Clone(record.value), make([]byte, shared.MaxRecord)...))
		rejected("far too long", apiKey, world.Admitted, 1)
		world.MustNot(t, rdb.Del(t.Context(), record.name).Err())
		world.MustNot(t, rdb.LPush(t.Context(), record.name, record.value).Err())
		rejected("a list", apiKey, world.Admitted, 1)
		put(record.name, record.value)
	}
	rejected("as it was", apiKey, world.Admitted, 0)

	put(revokedName, goodKey)
	rejected("a live key's record for a revoked key", revokedKey, world.Invalid, 1)
	testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = true WHERE id = $1`, revokedOrg.KeyID)
	if err := rdb.Del(t.Context(), revokedName).Err(); err != nil {
		t.Fatal(err)
	}
	put(revokedPlan, goodPlan)
	rejected("a paid plan's record for another organisation", revokedKey, world.PlanExpired, 1)
	put(keyName, goodPlan)
	rejected("a plan's record for a key", apiKey, world.Admitted, 1)

	put(keyName, goodKey)
	other := world.NewReplica(w, reader, world.NewSecret(), nil)
	other.WantCode(t, apiKey, world.Admitted)
	if got := other.Cache.Stats(); got.RedisRejected == 0 || got.StoreReads != 2 {
		t.Errorf("under another secret: %+v", got)
	}
	if err := rdb.Del(t.Context(), keyName).Err(); err != nil {
		t.Fatal(err)
	}
	if err := rdb.LPush(t.Context(), keyName, "x").Err(); err != nil {
		t.Fatal(err)
	}
	if got := world.NewReplica(w, reader, secret, nil).Ask(apiKey); got != world.Admitted {
		t.Errorf("a value of another type: answered %q", got)
	}
}

// TestReplay: a record that was good once does not come back when it is put back.
func TestReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, fake, secret := world.NewMemory(), new(fakeRedis), world.NewSecret()
		rdb := fake.client()
		defer rdb.Close()
		apiKey, org := w.Enrol(t, world.Live, world.Paid)
		world.NewReplica(w, rdb, secret, nil).WantCode(t, apiKey, world.Admitted)
		synctest.Wait()
		keyName, _ := world.RedisNames(apikey.HashKey(apiKey), org.ID)
		var old fakeValue
		fake.set(func() { old = fake.values[keyName] })
		old.expires = time.Now().Add(time.Hour)

		w.Set(func() { delete(w.KeyRows, apikey.HashKey(apiKey)) })
		time.Sleep(10 * time.Second)
		fake.set(func() { fake.values[keyName] = old })
		r := world.NewReplica(w, rdb, secret, nil)
		r.WantCode(t, apiKey, world.Invalid)
		if got := r.Cache.Stats(); got.RedisMisses != 1 || got.RedisRejected != 0 {
			t.Errorf("%+v, want a miss that is not rejected", got)
		}
	})
}

// TestRecordFromTheFuture: a replica whose clock is ahead cannot make its records
// live longer on others.
func TestRecordFromTheFuture(t *testing.T) {
	w, secret := world.NewMemory(), world.NewSecret()
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	var ahead fakeValue
	var keyName string
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Minute)
		fake := new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		r := world.NewReplica(w, rdb, secret, nil)
		r.WantCode(t, apiKey, world.Admitted)
		synctest.Wait()
		keyName, _ = world.RedisNames(apikey.HashKey(apiKey), org.ID)
		fake.set(func() { ahead = fake.values[keyName] })
	})
	synctest.Test(t, func(t *testing.T) { // the clock starts anew
		fake := new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		fake.values[keyName] = ahead
		r := world.NewReplica(w, rdb, secret, nil)
		r.WantCode(t, apiKey, world.Admitted)
		if got := r.Cache.Stats(); got.RedisHits != 0 || got.RedisRejected != 0 {
			t.Errorf("%+v, want the record ignored", got)
		}
	})
}

// A slowWorld holds lookups back until release is closed.
type slowWorld struct {
	*world.Memory
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
	return w.Memory.Key(ctx, h)
}

// TestStampede: a thousand requests for one cold key cause one GET and one lookup
// of each kind, and those who give up do not disturb the others.
func TestStampede(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := new(fakeRedis)
		rdb := fake.client()
		defer rdb.Close()
		w := slowWorld{world.NewMemory(), make(chan struct{}, 1000), make(chan struct{})}
		r := world.NewReplica(w, rdb, world.NewSecret(), nil)
		apiKey, _ := w.Enrol(t, world.Live, world.Paid)

		impatient, giveUp := context.WithCancel(t.Context())
		first, other := make(chan string), make(chan string)
		go func() { first <- r.AskContext(impatient, apiKey) }() // makes the lookup
		<-w.started
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { r.WantCode(t, apiKey, world.Admitted) })
		}
		go func() { other <- r.AskContext(impatient, apiKey) }()
		synctest.Wait()
		giveUp()
		if got := <-other; got != world.Unavailable {
			t.Errorf("who gave up was answered %q, want %q", got, world.Unavailable)
		}
		close(w.release)
		wg.Wait()
		if got := <-first; got != world.Unavailable && got != world.Admitted { // it may leave before the plan is looked up
			t.Errorf("who made the lookup, and gave up, was answered %q", got)
		}
		if gets, _ := fake.counts(); gets != 2 || w.ReadCount() != 2 {
			t.Errorf("%d GETs and %d lookups, want 2 and 2: one for the key, one for the plan", gets, w.ReadCount())
		}
	})
}

// TestOneCacheManyMiddlewares: a service may mount several.
func TestOneCacheManyMiddlewares(t *testing.T) {
	w, server := world.NewMemory(), miniredis.RunT(t)
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	defer rdb.Close()
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	cache := apikey.NewCache(rdb, world.NewSecret(), nil)
	for range 3 {
		r := world.ReplicaOn(w, w, cache)
		r.WantCode(t, apiKey, world.Admitted)
	}
	if n := w.ReadCount(); n != 2 {
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
		"no client":    {func() { apikey.NewCache(nil, world.NewSecret(), nil) }, "pass a Redis client"},
		"nil client":   {func() { apikey.NewCache((*redis.Client)(nil), world.NewSecret(), nil) }, "pass a Redis client"},
		"deaf client":  {func() { apikey.NewCache(deaf, world.NewSecret(), nil) }, "set ContextTimeoutEnabled: true"},
		"deaf cluster": {func() { apikey.NewCache(deafCluster, world.NewSecret(), nil) }, "set ContextTimeoutEnabled: true"},
		"deaf ring":    {func() { apikey.NewCache(deafRing, world.NewSecret(), nil) }, "set ContextTimeoutEnabled: true"},
		"no secret":    {func() { apikey.NewCache(good, nil, nil) }, "0 bytes: use at least 32"},
		"short secret": {func() { apikey.NewCache(good, make([]byte, 31), nil) }, "31 bytes: use at least 32"},
		"negative staleness": {func() {
			apikey.NewCache(good, world.NewSecret(), &apikey.CacheOptions{MaxStaleness: -1})
		}, "use at least 100ms"},
		"refresh before stale": {func() {
			apikey.NewCache(good, world.NewSecret(), &apikey.CacheOptions{RefreshAfter: time.Second})
		}, "use at least MaxStaleness, 10s"},
		"no grace at all": {func() {
			apikey.NewCache(good, world.NewSecret(), &apikey.CacheOptions{StaleIfError: time.Second})
		}, "StaleIfError is 1s: use at least MaxStaleness, 10s"},
	} {
		t.Run(name, func(t *testing.T) { wantPanic(t, c.construct, c.want) })
	}
}
