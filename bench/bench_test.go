package bench

// What is measured, and how it is written down.

import (
	"flag"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/testservers"
)

var (
	write     = flag.Bool("write", false, "measure in earnest, and write the table and the plots")
	coldKeys  = flag.Int("cold", 20, "keys that are warm in Redis and cold in memory")
	stampede  = flag.Int("stampede", 50, "requests at once for one cold key")
	revokings = flag.Int("revokings", 2, "keys that are revoked, for each peer")
	limit     = flag.Duration("limit", 5*time.Second, "how long to wait for a revoked key to be refused")
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// discard is a ResponseWriter that keeps the status only.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
func (d *discard) WriteHeader(status int)      { d.status = status }

var next = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})

// request is a request with a key, as a client of the instance sends it.
func (i instance) request(key string) *http.Request {
	if i.token != nil {
		key = i.token(key)
	}
	r := httptest.NewRequest("GET", "/v1/things", nil)
	r.Header.Set("Authorization", "Bearer "+key)
	return r
}

// admits sends a request.
func (i instance) admits(r *http.Request) bool {
	w := &discard{header: http.Header{}, status: http.StatusOK}
	i.ServeHTTP(w, r)
	return w.status == http.StatusOK
}

// A result is what was measured of one peer.
type result struct {
	peer
	warm           instance
	request        *http.Request
	ns, parallelNs []float64 // of a known key, on one core and on all; each round's
	allocs, bytes  int64
	p50, p99       time.Duration // of a key that is in Redis and not in memory
	sql            int64
	revoked        []time.Duration // how long each key went on working, ascending
}

// TestCompare measures all peers in one run. Without -write it does so in little,
// to see that all of them authenticate.
func TestCompare(t *testing.T) {
	e := newEnvironment(t)
	results := make([]result, len(peers))
	for n, p := range peers {
		results[n].peer = p
		results[n].measure(t, e)
		if t.Failed() {
			t.Fatalf("with %s", p.name)
		}
	}
	if *write {
		measureWarm(t, results)
	}
	// All peers at the same time, since most of them let the time go by.
	var wg sync.WaitGroup
	for n := range results {
		if results[n].store {
			wg.Go(func() { results[n].revoke(t, e) })
		}
	}
	wg.Wait()
	if ours := results[slices.IndexFunc(peers, func(p peer) bool { return p.name == "apikey" })]; len(ours.revoked) == 0 || ours.revoked[len(ours.revoked)-1] >= *limit {
		t.Errorf("keys of apikey go on working for %v", ours.revoked)
	}
	if *write && !t.Failed() {
		publish(t, results)
	}
}

func (r *result) measure(t *testing.T, e *environment) {
	r.warm = r.prepare(t, e, next)
	key, _ := e.newKey(t)
	r.request = r.warm.request(key)
	if !r.warm.admits(r.request) {
		t.Fatal("a good key is refused")
	}
	if r.store && r.warm.admits(r.warm.request("a-key-that-nobody-has")) {
		t.Fatal("a bad key is admitted")
	}
	if r.redis {
		r.measureRedis(t, e)
	}
	if r.store {
		r.measureStampede(t, e)
	}
}

// measureWarm measures requests with a known key: all peers in turn, several
// times, so that what else the machine does hits all alike.
func measureWarm(t *testing.T, results []result) {
	if err := flag.Set("test.benchtime", "400ms"); err != nil {
		t.Fatal(err)
	}
	const rounds = 7
	for range rounds {
		for n := range results {
			res := &results[n]
			serial := testing.Benchmark(func(b *testing.B) {
				w := &discard{header: http.Header{}}
				b.ReportAllocs()
				for b.Loop() {
					res.warm.ServeHTTP(w, res.request)
				}
			})
			parallel := testing.Benchmark(func(b *testing.B) {
				b.RunParallel(func(pb *testing.PB) {
					w := &discard{header: http.Header{}}
					for pb.Next() {
						res.warm.ServeHTTP(w, res.request)
					}
				})
			})
			res.ns = append(res.ns, float64(serial.T.Nanoseconds())/float64(serial.N))
			res.parallelNs = append(res.parallelNs, float64(parallel.T.Nanoseconds())/float64(parallel.N))
			res.allocs, res.bytes = serial.AllocsPerOp(), serial.AllocedBytesPerOp()
		}
	}
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

// measureRedis has one instance fill Redis, and another find it there.
func (r *result) measureRedis(t *testing.T, e *environment) {
	cold := r.prepare(t, e, next)
	var requests []*http.Request
	for range *coldKeys {
		key, _ := e.newKey(t)
		req := cold.request(key)
		if !r.warm.admits(req) {
			t.Fatal("a good key is refused")
		}
		requests = append(requests, req)
	}
	time.Sleep(200 * time.Millisecond) // for what is written in the background
	before := cold.sql()
	var took []time.Duration
	for _, req := range requests {
		start := time.Now()
		if !cold.admits(req) {
			t.Fatal("a good key is refused")
		}
		took = append(took, time.Since(start))
	}
	if n := cold.sql() - before; *write && n > int64(len(requests)/100) { // one or the other may not have come to Redis in time
		t.Errorf("%d statements although Redis has it all", n)
	}
	slices.Sort(took)
	r.p50, r.p99 = took[len(took)/2], took[len(took)*99/100]
}

// measureStampede has many ask at once for a key that nobody has asked for.
func (r *result) measureStampede(t *testing.T, e *environment) {
	i := r.prepare(t, e, next)
	key, _ := e.newKey(t)
	req := i.request(key)
	before := i.sql()
	start := make(chan struct{})
	var wg sync.WaitGroup
	for range *stampede {
		wg.Go(func() {
			<-start
			if !i.admits(req) {
				t.Error("a good key is refused")
			}
		})
	}
	close(start)
	wg.Wait()
	r.sql = i.sql() - before
}

// revoke finds out how long keys go on working after they were revoked.
func (r *result) revoke(t *testing.T, e *environment) {
	i := r.prepare(t, e, next)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range *revokings {
		key, info := e.newKey(t)
		wg.Go(func() {
			req := i.request(key)
			if !i.admits(req) {
				t.Errorf("%s: a good key is refused", r.name)
				return
			}
			time.Sleep(time.Second)
			if err := e.keys.Deactivate(t.Context(), info.OrgID, info.ID); err != nil {
				t.Error(err)
				return
			}
			start := time.Now()
			for i.admits(req) && time.Since(start) < *limit {
				time.Sleep(500 * time.Microsecond)
			}
			mu.Lock()
			defer mu.Unlock()
			r.revoked = append(r.revoked, min(time.Since(start), *limit))
		})
	}
	wg.Wait()
	slices.Sort(r.revoked)
}

// publish writes the plots, and the table into the README.
func publish(t *testing.T, results []result) {
	var table strings.Builder
	fmt.Fprintf(&table, "| | warm key | allocations | all cores | in Redis only, p50 / p99 | SQL for %d at once | a revoked key works for |\n|---|---|---|---|---|---|---|\n", *stampede)
	for _, r := range results {
		fmt.Fprintf(&table, "| %s | %s | %d, %d B | %s/s | %s | %s | %s |\n", r.title(), short(time.Duration(median(r.ns))), r.allocs, r.bytes,
			count(1e9/median(r.parallelNs)), r.inRedis(), r.statements(), r.works())
	}
	fmt.Fprintf(&table, "\n%s. Caches of peers keep a key for %s. %d keys were revoked with each, and watched for %s.\n",
		machine(), short(ttl), *revokings, short(*limit))
	publishTable(t, "compare", table.String())

	var warm, revoked []bar
	for _, r := range results {
		ns := time.Duration(median(r.ns))
		warm = append(warm, bar{r.name, ns, short(ns), r.name == "apikey"})
		if r.store {
			median := r.revoked[len(r.revoked)/2]
			revoked = append(revoked, bar{r.name, median, r.forHowLong(median), r.name == "apikey"})
		}
	}
	draw(t, "warm.svg", "A request with a warm key (logarithmic)", warm)
	draw(t, "revoked.svg", "How long a revoked key still works, median (logarithmic)", revoked)
}

// machine is what a table was measured on.
func machine() string {
	return fmt.Sprintf("%s, %s/%s, %d cores (%s), servers and load on the same machine; `make bench`",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), cpu())
}

// publishTable writes a table into its place in README.md here.
func publishTable(t *testing.T, name, table string) {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	marked := regexp.MustCompile(`(?s)(<!-- made by make bench: ` + name + ` -->\n).*?(<!-- end -->)`)
	if !marked.Match(readme) {
		t.Fatalf("the README has no place for the table %q", name)
	}
	readme = marked.ReplaceAll(readme, []byte("${1}"+table+"${2}"))
	if err := os.WriteFile("README.md", readme, 0o644); err != nil {
		t.Fatal(err)
	}
}

// A bar is a line of a plot.
type bar struct {
	name  string
	value time.Duration
	label string
	ours  bool
}

// draw writes a plot of horizontal bars, the lengths of which are the logarithms
// of the values.
func draw(t *testing.T, file, title string, bars []bar) {
	const width, left, line = 760, 220, 26
	least, most := math.Inf(1), 0.0
	for _, b := range bars {
		least, most = min(least, math.Log(float64(b.value))), max(most, math.Log(float64(b.value)))
	}
	var svg strings.Builder
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">
<rect width="100%%" height="100%%" fill="white"/>
<text x="10" y="22" font-size="15" font-weight="bold">%s</text>
`, width, len(bars)*line+44, title)
	for i, b := range bars {
		y := 40 + i*line
		length := 4 + int((math.Log(float64(b.value))-least)/(most-least)*(width-left-110))
		fill := "#9aa5b1"
		if b.ours {
			fill = "#2b6cb0"
		}
		fmt.Fprintf(&svg, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%d" height="%d" fill="%s"/><text x="%d" y="%d">%s</text>
`, left-10, y+14, b.name, left, y, length, line-8, fill, left+length+6, y+14, b.label)
	}
	svg.WriteString("</svg>\n")
	if err := os.WriteFile(file, []byte(svg.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// title is the name, with the version of what it is from.
func (r *result) title() string {
	if r.name == "apikey" {
		return "**apikey**"
	}
	info, _ := debug.ReadBuildInfo()
	for _, module := range info.Deps {
		if module.Path == r.module {
			return r.name + " (" + module.Version + ")"
		}
	}
	return r.name
}

func (r *result) inRedis() string {
	if !r.redis {
		return "-"
	}
	return short(r.p50) + " / " + short(r.p99)
}

func (r *result) statements() string {
	if !r.store {
		return "-"
	}
	return fmt.Sprint(r.sql)
}

func (r *result) works() string {
	switch {
	case r.name == "no authentication":
		return "-"
	case !r.store:
		return "until it expires"
	}
	return r.forHowLong(r.revoked[len(r.revoked)/2]) + ", at most " + r.forHowLong(r.revoked[len(r.revoked)-1])
}

// forHowLong is a time that may have been cut off by the limit.
func (r *result) forHowLong(d time.Duration) string {
	if d >= *limit {
		return "over " + short(*limit)
	}
	return short(d)
}

// short is a duration with two or three digits.
func short(d time.Duration) string {
	switch {
	case d < time.Microsecond:
		return fmt.Sprintf("%d ns", d.Nanoseconds())
	case d < time.Millisecond:
		return fmt.Sprintf("%.3g µs", float64(d.Nanoseconds())/1e3)
	case d < time.Second:
		return fmt.Sprintf("%.3g ms", float64(d.Microseconds())/1e3)
	}
	return fmt.Sprintf("%.3g s", math.Floor(d.Seconds()*10)/10)
}

// count is a number with two or three digits.
func count(n float64) string {
	switch {
	case n >= 1e6:
		return fmt.Sprintf("%.3g M", n/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.3g k", n/1e3)
	}
	return fmt.Sprintf("%.0f", n)
}

// cpu is what the machine says of its processor.
func cpu() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	if name := regexp.MustCompile(`(?m)^model name\s*: (.*?)\s*$`).FindSubmatch(text); name != nil {
		return string(name[1])
	}
	return "unknown"
}
