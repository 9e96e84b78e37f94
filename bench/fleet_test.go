package bench

// A fleet: many replicas that follow the changes of one database.

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sys/unix"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
)

var (
	fleetSizes = flag.String("fleet.sizes", "20", "replicas in TestFleet, several with commas between")
	fleetFor   = flag.Duration("fleet.for", 2*time.Second, "how long a fleet is at rest, and how long it changes")
)

// A fleet is some caches that watch, in one process.
type fleet struct {
	pool   *pgxpool.Pool
	caches []*apikey.Cache
}

// fleetResult is what was measured of a fleet.
type fleetResult struct {
	size        int
	atRest      float64 // cores of PostgreSQL
	p50, p99    time.Duration
	backAfter   time.Duration // all sessions were ended
	liveInStorm float64       // of the fleet, at least, while much changes
	changes     float64       // a second in the storm, 1,000 if the server can
}

func newFleet(t *testing.T, pool *pgxpool.Pool, size int) *fleet {
	t.Helper()
	f := &fleet{pool: pool}
	rdb := testservers.Redis(t)
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		watching.Wait()
	})
	for range size {
		cache := apikey.NewCache(rdb, secret, nil)
		f.caches = append(f.caches, cache)
		watching.Go(func() {
			if err := cache.Watch(ctx, pool); err != nil {
				t.Error(err)
			}
		})
	}
	f.wait(t, func(s apikey.CacheStats) bool { return s.FeedLive })
	return f
}

// wait waits until all caches say so, and returns how long that took.
func (f *fleet) wait(t *testing.T, done func(apikey.CacheStats) bool) time.Duration {
	t.Helper()
	start := time.Now()
	for _, cache := range f.caches {
		for !done(cache.Stats()) {
			if time.Since(start) > time.Minute {
				t.Fatalf("waited in vain: %+v", cache.Stats())
			}
			time.Sleep(time.Millisecond)
		}
	}
	return time.Since(start)
}

func (f *fleet) live() (n int) {
	for _, cache := range f.caches {
		if cache.Stats().FeedLive {
			n++
		}
	}
	return n
}

// cpu returns how long the processes of PostgreSQL have been running on a core.
func (f *fleet) cpu(t *testing.T) (sum time.Duration) {
	t.Helper()
	var backend int
	if err := f.pool.QueryRow(t.Context(), `SELECT pg_backend_pid()`).Scan(&backend); err != nil {
		t.Fatal(err)
	}
	postmaster := parent(strconv.Itoa(backend))
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		if pid := filepath.Base(p); pid == postmaster || parent(pid) == postmaster {
			sum += running(t, pid)
		}
	}
	return sum
}

// parent returns the parent of a process; "" if it has ended.
func parent(pid string) string {
	text, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return ""
	}
	return strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))[1]
}

// running returns how long a process has been running, by its CPU clock: the times in
// /proc miss who runs for less than a tick.
func running(t *testing.T, pid string) time.Duration {
	t.Helper()
	n, err := strconv.ParseInt(pid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	var ts unix.Timespec
	const cpuClock = 2 // clock_getcpuclockid: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
	if err := unix.ClockGettime(int32(^n<<3|cpuClock), &ts); err != nil {
		return 0 // it has ended
	}
	return time.Duration(ts.Nano())
}

// TestFleet measures fleets of some sizes: what they cost at rest, how soon a change
// has reached all of them, how soon they are back when all sessions are ended, and what
// becomes of them when up to a thousand things change each second.
func TestFleet(t *testing.T) {
	var results []fleetResult
	for text := range strings.SplitSeq(*fleetSizes, ",") {
		size, err := strconv.Atoi(text)
		if err != nil || size < 1 {
			t.Fatalf("-fleet.sizes: %q is not a number of replicas", text)
		}
		t.Run(text, func(t *testing.T) { results = append(results, measureFleet(t, size)) })
	}
	for _, r := range results {
		t.Logf("%d replicas: %.4f cores at rest, %.6f each; commit to effect p50 %s, p99 %s; back after %s; %.0f %% live in a storm of %.0f changes a second",
			r.size, r.atRest, r.atRest/float64(r.size), short(r.p50), short(r.p99), short(r.backAfter), 100*r.liveInStorm, r.changes)
	}
	if *write && !t.Failed() {
		var table strings.Builder
		var bars []bar
		fmt.Fprintf(&table, "| replicas | PostgreSQL at rest | commit to effect on all, p50 / p99 | all live again after all sessions are ended | live in a storm of changes |\n|---|---|---|---|---|\n")
		for _, r := range results {
			fmt.Fprintf(&table, "| %d | %.3f cores | %s / %s | %s | %.0f %%, %.0f a second |\n", r.size, r.atRest, short(r.p50), short(r.p99), short(r.backAfter), 100*r.liveInStorm, r.changes)
			bars = append(bars, bar{fmt.Sprint(r.size, " replicas"), time.Duration(r.atRest * float64(time.Second)), fmt.Sprintf("%.3f cores", r.atRest), true})
		}
		fmt.Fprintf(&table, "\nAll replicas in one process, default options; %s.\n", machine())
		publishTable(t, "fleet", table.String())
		draw(t, "fleet.svg", "PostgreSQL while a fleet is at rest (logarithmic)", bars)
	}
}

func measureFleet(t *testing.T, size int) (r fleetResult) {
	server := testservers.StartPostgres(t, "-c", fmt.Sprint("max_connections=", size+50))
	pool := testservers.Pool(t, testservers.PostgresURLOn(t, server)+"&pool_max_conns=10")
	if _, err := pool.Exec(t.Context(), `INSERT INTO plan_catalogue VALUES ('starter', true);
		INSERT INTO org_plans (org_id, plan, status) SELECT 'org ' || i, 'starter', 'active' FROM generate_series(0, 999) i`); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), `SELECT apikey_announce()`); err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, pool, size)
	r.size = size
	change := func(i int) {
		if _, err := pool.Exec(t.Context(), `UPDATE org_plans SET ends_at = now() + '1 year' WHERE org_id = $1`, fmt.Sprint("org ", i%1000)); err != nil {
			t.Error(err)
		}
	}

	time.Sleep(2 * time.Second) // what began is over
	before := f.cpu(t)
	time.Sleep(*fleetFor)
	r.atRest = (f.cpu(t) - before).Seconds() / fleetFor.Seconds()
	if n := f.live(); n != size {
		t.Errorf("%d of %d are live at rest", n, size)
	}

	var took []time.Duration
	heard := f.caches[0].Stats().Announcements
	for start := time.Now(); time.Since(start) < *fleetFor; time.Sleep(time.Second) {
		heard++
		change(int(heard))
		committed := time.Now()
		for _, cache := range f.caches {
			for cache.Stats().Announcements < heard && time.Since(committed) < time.Minute {
				time.Sleep(20 * time.Microsecond)
			}
			took = append(took, time.Since(committed))
		}
	}
	slices.Sort(took)
	r.p50, r.p99 = percentile(took, 0.5), percentile(took, 0.99)

	var ended int
	if err := pool.QueryRow(t.Context(), `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%apikey_announce%'`).Scan(&ended); err != nil || ended < size {
		t.Errorf("%d sessions of %d were ended: %v", ended, size, err)
	}
	time.Sleep(100 * time.Millisecond) // until it is noticed
	r.backAfter = 100*time.Millisecond + f.wait(t, func(s apikey.CacheStats) bool { return s.FeedLive })

	r.liveInStorm = 1
	heard = f.caches[0].Stats().Announcements
	start, sent := time.Now(), 0
	for time.Since(start) < *fleetFor {
		for due := int(time.Since(start).Seconds() * 1000); sent < due; sent++ {
			change(sent)
		}
		r.liveInStorm = min(r.liveInStorm, float64(f.live())/float64(size))
		time.Sleep(time.Millisecond)
	}
	r.changes = float64(sent) / time.Since(start).Seconds()
	f.wait(t, func(s apikey.CacheStats) bool { return s.Announcements >= heard+uint64(sent) })
	if r.liveInStorm < 1 {
		t.Errorf("%.1f %% are live while %d things change in %v", 100*r.liveInStorm, sent, *fleetFor)
	}
	if r.backAfter > 10*time.Second {
		t.Errorf("live again after %v", r.backAfter)
	}
	return r
}
