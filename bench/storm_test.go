package bench

// Storms: requests that come whether others have been answered or not, with a network
// between the service and its servers, at times when nothing is known.

import (
	crand "crypto/rand"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/testservers"
)

var (
	stormFor  = flag.Duration("storm.for", time.Second, "how long each storm lasts")
	stormRate = flag.Int("storm.rate", 1000, "requests a second in a storm")
	stormKeys = flag.Int("storm.keys", 2000, "keys in a storm")
)

const (
	postgresAway = 2 * time.Millisecond
	redisAway    = time.Millisecond
)

// A storm is what came of it.
type storm struct {
	requests, refused int
	p50, p99, most    time.Duration
	sql               int64
}

// rage sends requests with good keys for a while.
func rage(t *testing.T, i instance, keys []string) (s storm) {
	t.Helper()
	requests := make([]*http.Request, len(keys))
	for n, key := range keys {
		requests[n] = i.request(key)
	}
	var mu sync.Mutex
	var took []time.Duration
	var refused atomic.Int64
	var wg sync.WaitGroup
	r := rand.New(rand.NewPCG(1, 2))
	before, start := i.sql(), time.Now()
	for sent := 0; ; {
		for due := int(time.Since(start).Seconds() * float64(*stormRate)); sent < due; sent++ {
			req := requests[r.IntN(len(requests))]
			wg.Go(func() {
				start := time.Now()
				if !i.admits(req) {
					refused.Add(1)
				}
				d := time.Since(start)
				mu.Lock()
				took = append(took, d)
				mu.Unlock()
			})
		}
		if time.Since(start) > *stormFor {
			break
		}
		time.Sleep(200 * time.Microsecond)
	}
	wg.Wait()
	slices.Sort(took)
	return storm{
		requests: len(took), refused: int(refused.Load()),
		p50: percentile(took, 0.5), p99: percentile(took, 0.99), most: took[len(took)-1], sql: i.sql() - before,
	}
}

// flood sends made-up keys for a while, five for each request of a storm.
func flood(i instance, lasts time.Duration) {
	var wg sync.WaitGroup
	defer wg.Wait()
	sent, start := 0, time.Now()
	for ; time.Since(start) < lasts; time.Sleep(time.Millisecond) {
		for due := int(time.Since(start).Seconds() * 5 * float64(*stormRate)); sent < due; sent++ {
			wg.Go(func() { i.admits(i.request(crand.Text() + crand.Text())) })
		}
	}
}

// TestStorm: in none of the storms is a good key refused.
func TestStorm(t *testing.T) {
	e := newEnvironment(t)
	keys := e.addKeys(t, "storm", *stormKeys)
	e.addKeys(t, "others", 90_000)
	var postgres, rdb *testservers.Proxy
	e.databaseURL, postgres = testservers.ProxyPostgres(t, e.databaseURL)
	e.redisURL, rdb = testservers.ProxyRedis(t, e.redisURL)
	postgres.Delay(postgresAway)
	rdb.Delay(redisAway)
	exec := func(sql string) {
		if _, err := e.owner.Exec(t.Context(), sql); err != nil {
			t.Error(err)
		}
	}

	var table strings.Builder
	fmt.Fprintf(&table, "| storm | | good keys refused | p50 | p99 | longest | statements |\n|---|---|---|---|---|---|---|\n")
	report := func(what string, p peer, s storm) {
		t.Logf("%-40s %-28s %d requests, %d refused, p50 %s, p99 %s, max %s, %d statements",
			what, p.name, s.requests, s.refused, short(s.p50), short(s.p99), short(s.most), s.sql)
		fmt.Fprintf(&table, "| %s | %s | %.1f %% | %s | %s | %s | %d |\n", what, p.name,
			100*float64(s.refused)/float64(s.requests), short(s.p50), short(s.p99), short(s.most), s.sql)
		if p.name == "apikey" && s.refused > 0 {
			t.Errorf("%s: %d of %d good keys were refused", what, s.refused, s.requests)
		}
	}
	var ours peer
	for _, p := range peers {
		if !p.store || !*write && p.name != "apikey" {
			continue
		}
		if p.name == "apikey" {
			ours = p
		}
		report("cold start", p, rage(t, p.prepare(t, e, next), keys))
	}
	warm := ours.prepare(t, e, next)
	rage(t, warm, keys)
	during := func(what string, i instance, change func()) {
		var changing sync.WaitGroup
		changing.Go(func() {
			time.Sleep(*stormFor / 4)
			change()
		})
		report(what, ours, rage(t, i, keys))
		changing.Wait()
	}
	during("a tier changes", warm, func() {
		exec(`BEGIN; UPDATE plan_catalogue SET api_access = false; UPDATE plan_catalogue SET api_access = true; COMMIT`)
	})
	during("one UPDATE of all plans", warm, func() { exec(`UPDATE org_plans SET ends_at = now() + '1 year'`) })
	during("everything changes", warm, func() {
		exec(`UPDATE org_plans SET ends_at = now() + '2 years'; UPDATE api_keys SET expires_at = now() + '2 years'`)
	})
	during("a replica starts beside a warm one", ours.prepare(t, e, next), func() {})
	flooded := ours.prepare(t, e, next)
	during("a replica starts in a flood of made-up keys", flooded, func() { flood(flooded, *stormFor/2) })
	for _, i := range []instance{warm, flooded} {
		if s := i.stats(); s.RedisSkipped+s.StoreErrors+s.StoreSkipped+s.QueueFull+s.StaleUses > 0 {
			t.Errorf("nothing was broken, and yet: %+v", s)
		}
	}

	if *write && !t.Failed() {
		fmt.Fprintf(&table, "\n%d active keys, %d requests a second that do not wait for each other, PostgreSQL %s and Redis %s away; %s.\n",
			len(keys), *stormRate, short(postgresAway), short(redisAway), machine())
		publishTable(t, "storm", table.String())
	}
}
