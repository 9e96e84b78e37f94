package systemtest

// The fault soak: replicas under load, random faults and random changes together,
// and an oracle that knows when each change was committed. 'make soak' runs it for
// as long as it is told to.

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

var soakFor = flag.Duration("soak.for", time.Duration(testservers.Sized(2, 10))*time.Second, "how long TestSoak lasts")

const (
	soakStaleness = 2 * time.Second // MaxStaleness
	soakSlack     = time.Second     // for a busy machine
	soakRecovery  = 5 * time.Second // after a fault, until nothing may be left of it
)

// A timeline is the history of one thing that is good or bad.
type timeline struct {
	mu      sync.Mutex
	changes []soakChange
}

// A soakChange was committed at some time from begin to end; zero: is being
// committed.
type soakChange struct {
	good       bool
	begin, end time.Time
}

// last returns the last time up to a given one at which the thing may have been
// good, or bad; zero: it never was.
func (tl *timeline) last(good bool, until time.Time) (last time.Time) {
	tl.mu.Lock()
	defer tl.mu.Unlock()
	for i, c := range tl.changes {
		if c.good != good || c.begin.After(until) {
			continue
		}
		last = until
		if i+1 == len(tl.changes) {
			continue
		}
		if end := tl.changes[i+1].end; !end.IsZero() && end.Before(until) {
			last = end
		}
	}
	return last
}

// A soakSubject is an organisation, its key, and what became of both.
type soakSubject struct {
	apiKey    string
	hash      apikey.KeyHash
	orgID     string
	changing  sync.Mutex
	key, plan timeline
}

// A soakReplica is a replica behind faults of its own.
type soakReplica struct {
	world.Replica
	postgres, redis *testservers.Proxy

	mu     sync.Mutex
	faults []*soakFault
}

type soakFault struct {
	postgres   bool // it keeps the replica from PostgreSQL
	begin, end time.Time
}

// disturbed returns when the earliest fault of PostgreSQL, or of anything, began
// of those that were at work since a given time; zero: there was none.
func (r *soakReplica) disturbed(postgres bool, since time.Time) (begin time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.faults {
		if (f.postgres || !postgres) && (f.end.IsZero() || f.end.After(since)) && (begin.IsZero() || f.begin.Before(begin)) {
			begin = f.begin
		}
	}
	return begin
}

// A soak is all of it, and what came out.
type soak struct {
	*world.Postgres
	redis    *testservers.Server
	redisCli *redis.Client
	replicas []*soakReplica
	subjects []*soakSubject

	requests, unanswered, changes, faults, wrong atomic.Int64

	mu          sync.Mutex
	worst       time.Duration // staleness with PostgreSQL in reach
	worstOutage time.Duration // and without
	complaints  []string
}

// judge judges one answer.
func (s *soak) judge(r *soakReplica, subject *soakSubject, answer string, asked, answered time.Time) {
	s.requests.Add(1)
	strict := soakStaleness + soakSlack
	outage := r.disturbed(true, asked.Add(-strict))
	var worst time.Duration
	need := func(tl *timeline, good bool) { // the answer needs a fact: when was it last one?
		age := asked.Sub(tl.last(good, answered)) // of what never was, centuries
		bound := strict
		if good && !outage.IsZero() {
			bound += asked.Sub(outage) // stale facts are those of when it began, and never refuse
		}
		if age > bound {
			s.complain(fmt.Sprintf("answered %q %v after it was last right, bound %v", answer, age, bound))
		}
		worst = max(worst, age)
	}
	switch answer {
	case world.Admitted:
		need(&subject.key, true)
		need(&subject.plan, true)
	case world.Invalid:
		need(&subject.key, false)
	case world.PlanExpired:
		need(&subject.key, true)
		need(&subject.plan, false)
	case world.Unavailable:
		s.unanswered.Add(1)
		if r.disturbed(false, asked.Add(-soakRecovery)).IsZero() {
			s.complain("503 although nothing is broken")
		}
	default:
		s.complain(fmt.Sprintf("answered %q", answer))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if outage.IsZero() {
		s.worst = max(s.worst, worst)
	} else {
		s.worstOutage = max(s.worstOutage, worst)
	}
}

func (s *soak) complain(what string) {
	s.wrong.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.complaints) < 10 {
		s.complaints = append(s.complaints, what)
	}
}

// change changes a subject, by plain SQL.
func (s *soak) change(ctx context.Context, subject *soakSubject) error {
	subject.changing.Lock()
	defer subject.changing.Unlock()
	tl, sql, args := &subject.key, "", []any{subject.orgID}
	if rand.IntN(2) == 0 {
		tl = &subject.plan
	}
	good := !tl.changes[len(tl.changes)-1].good
	switch {
	case tl == &subject.plan && good:
		sql = `UPDATE org_plans SET status = 'active', ends_at = now() + '1 month' WHERE org_id = $1`
	case tl == &subject.plan:
		sql = `UPDATE org_plans SET status = 'past_due' WHERE org_id = $1`
	case good:
		sql = `INSERT INTO api_keys (org_id, key_hash) VALUES ($1, $2) ON CONFLICT (key_hash) DO UPDATE SET active = true`
		args = append(args, subject.hash[:])
	case rand.IntN(2) == 0:
		sql = `DELETE FROM api_keys WHERE org_id = $1`
	default:
		sql = `UPDATE api_keys SET active = false WHERE org_id = $1`
	}
	tl.mu.Lock() // before it is made: replicas may hear of it before Exec returns
	tl.changes = append(tl.changes, soakChange{good: good, begin: time.Now()})
	tl.mu.Unlock()
	_, err := s.Pool.Exec(ctx, sql, args...)
	tl.mu.Lock()
	tl.changes[len(tl.changes)-1].end = time.Now()
	tl.mu.Unlock()
	s.changes.Add(1)
	return err
}

// breakSomething breaks something for a while, and mends it.
func (s *soak) breakSomething(t *testing.T) {
	s.faults.Add(1)
	hit := s.replicas
	if i := rand.IntN(2 * len(s.replicas)); i < len(s.replicas) {
		hit = s.replicas[i : i+1]
	}
	kinds := []testservers.Fault{testservers.Down, testservers.Frozen, testservers.Slow, testservers.Reset}
	fault := kinds[rand.IntN(len(kinds))]
	what := rand.IntN(8)
	if what == 3 || what == 7 {
		hit = s.replicas
	}
	touchesPostgres := what < 4
	for _, r := range hit {
		r.mu.Lock()
		r.faults = append(r.faults, &soakFault{postgres: touchesPostgres, begin: time.Now()})
		r.mu.Unlock()
	}
	lasts := func() { time.Sleep(200*time.Millisecond + rand.N(3*time.Second)) }
	set := func(postgres, redis testservers.Fault) {
		for _, r := range hit {
			r.postgres.Set(t, postgres)
			r.redis.Set(t, redis)
		}
	}
	switch what {
	case 0, 1:
		set(fault, testservers.Healthy)
		lasts()
	case 2:
		set(fault, fault)
		lasts()
	case 3: // the sessions of all replicas
		testservers.Exec(t, s.Pool, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = 'replica'`)
	case 4, 5:
		set(testservers.Healthy, fault)
		lasts()
	case 6:
		_ = s.redisCli.FlushAll(t.Context()).Err()
	case 7:
		s.redis.Crash(t)
		lasts()
		s.redis.Start(t)
	}
	set(testservers.Healthy, testservers.Healthy)
	for _, r := range hit {
		r.mu.Lock()
		for _, f := range r.faults {
			if f.end.IsZero() {
				f.end = time.Now()
			}
		}
		r.mu.Unlock()
	}
}

func TestSoak(t *testing.T) {
	const replicas, subjects, workers = 4, 30, 3
	s := &soak{Postgres: world.NewPostgres(t), redis: testservers.StartRedis(t)}
	s.redisCli = testservers.RedisAt(t, s.redis.URL)
	secret := world.NewSecret()
	for range replicas {
		r := new(soakReplica)
		var pgURL, redisURL string
		pgURL, r.postgres = testservers.ProxyPostgres(t, s.Pool.Config().ConnString())
		redisURL, r.redis = testservers.ProxyRedis(t, s.redis.URL)
		r.Replica = world.NewWatchedReplica(t, testservers.Pool(t, pgURL+"&application_name=replica"), testservers.RedisAt(t, redisURL), secret,
			&apikey.CacheOptions{MaxStaleness: soakStaleness})
		s.replicas = append(s.replicas, r)
	}
	for range subjects {
		before := time.Now()
		apiKey, org := s.Enrol(t, world.Live, world.Paid)
		born := []soakChange{{false, time.Time{}, before}, {true, before, time.Now()}}
		s.subjects = append(s.subjects, &soakSubject{
			apiKey: apiKey, hash: apikey.HashKey(apiKey), orgID: org.ID,
			key: timeline{changes: born}, plan: timeline{changes: append([]soakChange(nil), born...)},
		})
	}

	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, r := range s.replicas {
		for range workers {
			running.Go(func() {
				for ctx.Err() == nil {
					subject := s.subjects[rand.IntN(subjects)]
					asked := time.Now()
					answer := r.Ask(subject.apiKey)
					s.judge(r, subject, answer, asked, time.Now())
					time.Sleep(time.Millisecond)
				}
			})
		}
	}
	running.Go(func() {
		for ctx.Err() == nil {
			if err := s.change(context.WithoutCancel(ctx), s.subjects[rand.IntN(subjects)]); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(rand.N(30 * time.Millisecond))
		}
	})
	for start := time.Now(); time.Since(start) < *soakFor; time.Sleep(rand.N(2 * time.Second)) {
		s.breakSomething(t)
	}
	stop()
	running.Wait()

	var stale uint64
	for _, r := range s.replicas {
		stale += r.Cache.Stats().StaleUses
	}
	t.Logf("%v: %d requests to %d replicas, %d changes, %d faults; %d answered 503 in a fault, %d stale uses; "+
		"worst staleness %v with PostgreSQL in reach, %v without; %d wrong answers",
		*soakFor, s.requests.Load(), replicas, s.changes.Load(), s.faults.Load(), s.unanswered.Load(), stale,
		s.worst.Round(time.Millisecond), s.worstOutage.Round(time.Millisecond), s.wrong.Load())
	for _, complaint := range s.complaints {
		t.Error(complaint)
	}

	for i, r := range s.replicas { // all is well again
		world.WaitFor(t, func() bool { return r.Cache.Stats().FeedLive })
		for _, subject := range s.subjects {
			want := world.Admitted
			if !subject.key.changes[len(subject.key.changes)-1].good {
				want = world.Invalid
			} else if !subject.plan.changes[len(subject.plan.changes)-1].good {
				want = world.PlanExpired
			}
			world.WaitFor(t, func() bool { return r.Ask(subject.apiKey) == want })
		}
		if n := r.Cache.Stats().Unannounced; n != 0 {
			t.Errorf("replica %d found %d unannounced changes", i, n)
		}
	}
}
