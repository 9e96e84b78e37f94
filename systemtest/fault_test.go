package systemtest

// Outages of real servers: every fault of Redis, of PostgreSQL and of both, for
// every kind of key. Never a 401 for a good key, never a 200 for one whose
// revocation was announced, never a long wait, and all is well soon after.

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// A rig is a replica whose servers can be broken.
type rig struct {
	*world.Postgres // past all faults
	world.Replica   // behind them
	told            *announcements
	secret          []byte
	postgres        *testservers.Proxy
	redis           *testservers.Proxy
	postgresServer  *testservers.Server // nil: shared, and not to be killed
	redisServer     *testservers.Server
	redisDirect     *redis.Client // past the proxy
}

func newRig(t testing.TB, opts apikey.CacheOptions, ownPostgres bool) *rig {
	t.Helper()
	rg := &rig{redisServer: testservers.StartRedis(t), told: new(announcements)}
	opts.Logger = slog.New(rg.told)
	if ownPostgres {
		rg.postgresServer = testservers.StartPostgres(t)
		rg.Postgres = world.NewPostgresOn(t, testservers.Pool(t, testservers.PostgresURLOn(t, rg.postgresServer)))
	} else {
		rg.Postgres = world.NewPostgres(t)
	}
	redisURL := rg.redisServer.URL
	rg.redisDirect = testservers.RedisAt(t, redisURL)
	rg.secret = world.NewSecret()

	var pgURL string
	pgURL, rg.postgres = testservers.ProxyPostgres(t, rg.Pool.Config().ConnString())
	redisURL, rg.redis = testservers.ProxyRedis(t, redisURL)
	rg.Replica = world.NewWatchedReplica(t, testservers.Pool(t, pgURL), testservers.RedisAt(t, redisURL), rg.secret, &opts)
	return rg
}

// An outage breaks a server of a rig, and mends it again.
type outage struct {
	name        string
	begin, end  func(t testing.TB, rg *rig)
	reads       bool // the server answers reads all the same
	rejects     bool // it is there, and rejects what it is asked: no outage
	feedSurvive bool // what is known stays vouched for
	kills       bool // it needs a server of the test's own
}

// networkOutages are what can become of the way to a server.
func networkOutages(way func(*rig) *testservers.Proxy) (list []outage) {
	for _, f := range []testservers.Fault{testservers.Down, testservers.Frozen, testservers.Slow, testservers.Reset} {
		list = append(list, outage{
			name:  string(f),
			begin: func(t testing.TB, rg *rig) { way(rg).Set(t, f) },
			end:   func(t testing.TB, rg *rig) { way(rg).Set(t, testservers.Healthy) },
		})
	}
	return list
}

func redisOutages() []outage {
	command := func(begin, end []any) (b, e func(testing.TB, *rig)) {
		do := func(args []any) func(testing.TB, *rig) {
			return func(t testing.TB, rg *rig) {
				if err := rg.redisDirect.Do(t.Context(), args...).Err(); err != nil {
					t.Error(err)
				}
			}
		}
		return do(begin), do(end)
	}
	erroring := outage{name: "erroring"}
	erroring.begin, erroring.end = command([]any{"ACL", "SETUSER", "default", "-getrange", "-set"}, []any{"ACL", "SETUSER", "default", "+getrange", "+set"})
	full := outage{name: "out of memory", reads: true}
	full.begin, full.end = command([]any{"CONFIG", "SET", "maxmemory", "1"}, []any{"CONFIG", "SET", "maxmemory", "0"})
	readOnly := outage{name: "read-only", reads: true}
	readOnly.begin, readOnly.end = command([]any{"REPLICAOF", "127.0.0.1", "1"}, []any{"REPLICAOF", "NO", "ONE"})
	return append(networkOutages(func(rg *rig) *testservers.Proxy { return rg.redis }), erroring, full, readOnly,
		outage{
			name:  "stopped",
			begin: func(t testing.TB, rg *rig) { rg.redisServer.Freeze(t) },
			end:   func(t testing.TB, rg *rig) { rg.redisServer.Thaw(t) },
		},
		outage{
			name:  "killed",
			begin: func(t testing.TB, rg *rig) { rg.redisServer.Crash(t) },
			end:   func(t testing.TB, rg *rig) { rg.redisServer.Start(t) },
		})
}

func postgresOutages() []outage {
	sql := func(statement string) func(testing.TB, *rig) {
		return func(t testing.TB, rg *rig) { testservers.Exec(t, rg.Pool, statement) }
	}
	endSessions := func(t testing.TB, rg *rig) {
		testservers.Exec(t, rg.Pool, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`)
	}
	both := func(a, b func(testing.TB, *rig)) func(testing.TB, *rig) {
		return func(t testing.TB, rg *rig) { a(t, rg); b(t, rg) }
	}
	return append(networkOutages(func(rg *rig) *testservers.Proxy { return rg.postgres }),
		outage{
			name: "erroring", feedSurvive: true, rejects: true,
			begin: sql(`ALTER TABLE api_keys RENAME COLUMN key_hash TO k; ALTER TABLE org_plans RENAME COLUMN org_id TO o`),
			end:   sql(`ALTER TABLE api_keys RENAME COLUMN k TO key_hash; ALTER TABLE org_plans RENAME COLUMN o TO org_id`),
		},
		outage{
			name: "read-only", reads: true, feedSurvive: true,
			begin: both(sql(`DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$`), endSessions),
			end: both(sql(`SET default_transaction_read_only = off;
				DO $$ BEGIN EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database()); END $$`), endSessions),
		},
		outage{
			name: "killed", kills: true,
			begin: func(t testing.TB, rg *rig) { rg.postgresServer.Crash(t) },
			end: func(t testing.TB, rg *rig) {
				rg.postgresServer.Start(t)
				world.WaitFor(t, func() bool { return rg.Pool.Ping(t.Context()) == nil }) // the test's own connections
			},
		})
}

// A kind of key, and how it comes to be that.
type keyKind string

const (
	inMemory  keyKind = "in memory"
	inRedis   keyKind = "in Redis only"
	neverSeen keyKind = "never seen"
	dead      keyKind = "deactivated"
	unpaid    keyKind = "plan expired"
	revoked   keyKind = "revoked just before"
)

var keyKinds = []keyKind{inMemory, inRedis, neverSeen, dead, unpaid, revoked}

// whenWell is the answer while nothing is broken.
func (k keyKind) whenWell() string {
	switch k {
	case dead, revoked:
		return world.Invalid
	case unpaid:
		return world.PlanExpired
	}
	return world.Admitted
}

// wanted is the answer in an outage once all that was fresh has grown old.
func (k keyKind) wanted(redisReads, postgresReads, rejects, feedLive bool) string {
	switch {
	case postgresReads:
		return k.whenWell()
	case k == inMemory, k == inRedis && redisReads && (!rejects || feedLive), (k == dead || k == unpaid) && feedLive:
		return k.whenWell()
	}
	return world.Unavailable
}

// TestFaultMatrix: each outage, for each kind of key; at the desk, those in which the
// way to a server is down.
func TestFaultMatrix(t *testing.T) {
	well := outage{reads: true, feedSurvive: true, begin: func(testing.TB, *rig) {}, end: func(testing.TB, *rig) {}}
	run := func(name string, r, p outage) {
		t.Run(name, func(t *testing.T) {
			if !strings.HasSuffix(name, string(testservers.Down)) {
				testservers.Long(t)
			}
			t.Parallel()
			runOutage(t, r, p)
		})
	}
	for _, r := range redisOutages() {
		run("Redis "+r.name, r, well)
	}
	for _, p := range postgresOutages() {
		run("PostgreSQL "+p.name, well, p)
		for _, r := range redisOutages() {
			if r.name == p.name {
				run("both "+p.name, r, p)
			}
		}
	}
}

func runOutage(t *testing.T, r, p outage) {
	const (
		maxStaleness = time.Second
		lasts        = 3 * time.Second
		patience     = 4 * time.Second // a GET and a lookup each for key and plan take 1.3 s at most; and a busy machine
	)
	rg := newRig(t, apikey.CacheOptions{MaxStaleness: maxStaleness}, p.kills)
	keys := map[keyKind]string{}
	for _, k := range keyKinds {
		switch k {
		case dead:
			keys[k], _ = rg.Enrol(t, world.Deactivated, world.Paid)
		case unpaid:
			keys[k], _ = rg.Enrol(t, world.Live, world.StatusExpired)
		default:
			var org apikey.Org
			keys[k], org = rg.Enrol(t, world.Live, world.Paid)
			if k == inRedis {
				world.FillRedis(t, rg, rg.redisDirect, rg.secret, keys[k], org.ID)
			}
			if k == revoked {
				rg.WantCode(t, keys[k], world.Admitted)
				var xid uint64
				if err := rg.Pool.QueryRow(t.Context(), `UPDATE api_keys SET active = false WHERE id = $1
					RETURNING pg_current_xact_id()::text::bigint`, org.KeyID).Scan(&xid); err != nil {
					t.Fatal(err)
				}
				world.WaitFor(t, func() bool { return rg.told.has(apikey.HashKey(keys[k]), xid) })
			}
		}
		if k == inMemory || k == dead || k == unpaid {
			rg.WantCode(t, keys[k], k.whenWell())
		}
	}

	r.begin(t, rg)
	p.begin(t, rg)
	last, slowest := map[keyKind]string{}, map[keyKind]time.Duration{}
	for start := time.Now(); time.Since(start) < lasts; time.Sleep(5 * time.Millisecond) {
		for _, k := range keyKinds {
			if k == inRedis && time.Since(start) < maxStaleness {
				continue // so that it stays in Redis only for a while
			}
			asked := time.Now()
			last[k] = rg.Ask(keys[k])
			slowest[k] = max(slowest[k], time.Since(asked))
			if last[k] != k.whenWell() && last[k] != world.Unavailable {
				t.Fatalf("%s: answered %q", k, last[k])
			}
		}
	}
	for _, k := range keyKinds {
		if want := k.wanted(r.reads, p.reads, p.rejects, p.feedSurvive); last[k] != want {
			t.Errorf("%s: answered %q in the end, want %q", k, last[k], want)
		}
		if slowest[k] > patience {
			t.Errorf("%s: an answer took %v, want %v at most", k, slowest[k], patience)
		}
	}
	stats := rg.Cache.Stats()
	r.end(t, rg)
	p.end(t, rg)

	mended := time.Now()
	for k, key := range keys {
		world.WaitFor(t, func() bool { return rg.Ask(key) == k.whenWell() })
	}
	world.WaitFor(t, func() bool { return rg.Cache.Stats().FeedLive })
	line := fmt.Sprintf("well again after %4d ms; slowest answers in ms:", time.Since(mended).Milliseconds())
	for _, k := range keyKinds {
		line += fmt.Sprintf(" %s %d %q,", k, slowest[k].Milliseconds(), last[k])
	}
	t.Log(line)
	t.Logf("%+v", stats)
}
