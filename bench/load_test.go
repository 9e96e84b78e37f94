package bench

// A customer base: 100,000 keys that are all in use, some of them much more than
// others.

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"runtime"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

var loadKeys = flag.Int("load.keys", 2000, "keys in TestLoad")

// A choice chooses among n things: the one of rank k in proportion to 1/(k+1)^skew.
type choice struct{ below []float64 }

func newChoice(skew float64, n int) choice {
	c := choice{make([]float64, n)}
	sum := 0.0
	for k := range n {
		sum += math.Pow(float64(k+1), -skew)
		c.below[k] = sum
	}
	for k := range n {
		c.below[k] /= sum
	}
	return c
}

func (c choice) next(r *rand.Rand) int {
	return min(sort.SearchFloat64s(c.below, r.Float64()), len(c.below)-1)
}

// addKeys makes n organisations that pay, with a key each, and returns the keys.
func (e *environment) addKeys(t testing.TB, name string, n int) (keys []string) {
	t.Helper()
	for _, sql := range []string{
		`INSERT INTO org_plans (org_id, plan, status) SELECT $1 || ' ' || i, 'starter', 'active' FROM generate_series(0, $2::int - 1) i`,
		`INSERT INTO api_keys (org_id, key_hash) SELECT $1 || ' ' || i, sha256(('key-of-' || $1 || '-' || i)::bytea) FROM generate_series(0, $2::int - 1) i`,
	} {
		if _, err := e.owner.Exec(t.Context(), sql, name, n); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := e.owner.Exec(t.Context(), `ANALYZE`); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		keys = append(keys, fmt.Sprintf("key-of-%s-%d", name, i))
	}
	return keys
}

// A crowd is an instance under the load of many keys.
type crowd struct {
	name     string
	warm     instance
	requests []*http.Request
	ns       []float64 // of a request, on all cores; each round's
	bytes    float64   // of memory a key
}

// TestLoad measures requests with all of the keys, all known, by Zipf's law: the
// peers that have a memory of their own, in turn, several times.
func TestLoad(t *testing.T) {
	e := newEnvironment(t)
	keys := e.addKeys(t, "load", *loadKeys)
	order := make([]int32, 1<<20)
	r, choose := rand.New(rand.NewPCG(1, 2)), newChoice(1.05, len(keys))
	ranks := r.Perm(len(keys))
	for i := range order {
		order[i] = int32(ranks[choose.next(r)])
	}
	var crowds []*crowd
	for _, p := range peers {
		if !p.memory {
			continue
		}
		c := &crowd{name: p.name, warm: p.prepare(t, e, next)}
		for _, key := range keys {
			c.requests = append(c.requests, c.warm.request(key))
		}
		before := heap()
		c.fill(t)
		c.bytes = float64(heap()-before) / float64(len(keys))
		crowds = append(crowds, c)
	}
	rounds := 1
	if *write {
		rounds = 5
		if err := flag.Set("test.benchtime", "500ms"); err != nil {
			t.Fatal(err)
		}
	} else if err := flag.Set("test.benchtime", "20ms"); err != nil {
		t.Fatal(err)
	}
	sql := map[*crowd]int64{}
	for _, c := range crowds {
		sql[c] = c.warm.sql()
	}
	for range rounds {
		for _, c := range crowds {
			c.measure(order)
		}
	}
	var table strings.Builder
	fmt.Fprintf(&table, "| | a request, all cores | requests/s | memory a key |\n|---|---|---|---|\n")
	for _, c := range crowds {
		ns := median(c.ns)
		fmt.Fprintf(&table, "| %s | %.0f ns | %s | %.0f B |\n", c.name, ns, count(1e9/ns), c.bytes)
		t.Logf("%-30s %5.0f ns a request, %s/s, %.0f B a key, rounds %.0f", c.name, ns, count(1e9/ns), c.bytes, c.ns)
		if n := c.warm.sql() - sql[c]; c.name == "apikey" && n > 0 {
			t.Errorf("%d statements although all keys are known", n)
		}
	}
	if *write && !t.Failed() {
		fmt.Fprintf(&table, "\n%d active keys, Zipf 1.05, all warm; %s. Memory is the heap that the process takes for a key.\n", len(keys), machine())
		publishTable(t, "load", table.String())
	}
}

// fill asks for every key, until all are known.
func (c *crowd) fill(t *testing.T) {
	var wg sync.WaitGroup
	var at atomic.Int64
	for range 16 {
		wg.Go(func() {
			for i := at.Add(1) - 1; i < int64(len(c.requests)); i = at.Add(1) - 1 {
				if !c.warm.admits(c.requests[i]) {
					t.Errorf("%s refuses a good key", c.name)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (c *crowd) measure(order []int32) {
	var workers atomic.Int64
	result := testing.Benchmark(func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			w := &discard{header: http.Header{}}
			for i := int(workers.Add(1)) * 7919; pb.Next(); i++ {
				c.warm.ServeHTTP(w, c.requests[order[i%len(order)]])
			}
		})
	})
	c.ns = append(c.ns, float64(result.T.Nanoseconds())/float64(result.N))
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func percentile[T any](sorted []T, p float64) T { return sorted[int(p*float64(len(sorted)-1))] }
