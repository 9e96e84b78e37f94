package readthrough

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/trackpilots/apikey/internal/breaker"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/outage"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A cause is why a lookup does not succeed, or is late. Each takes nearly the whole budget.
type cause struct {
	name string
	run  func(context.Context) error
}

// An answer of the layer, with the facts past MaxStaleness.
const (
	fresh   = "fresh"
	stale   = "stale"
	refused = "refused"
)

var (
	away = cause{"away", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }}
	well = cause{"slow and well", func(context.Context) error { time.Sleep(900 * time.Millisecond); return nil }}
	busy = cause{"busy pool", func(ctx context.Context) error { <-ctx.Done(); return outage.As(outage.Busy, ctx.Err()) }}

	causes = []cause{away, well, busy, state("ours", "42P01"), state("not allowed", "42501"), state("no room on the server", "53300"),
		{"panic", func(ctx context.Context) error { <-ctx.Done(); panic("no") }},
		{"Goexit", func(ctx context.Context) error { <-ctx.Done(); runtime.Goexit(); return nil }},
	}
)

func state(name, code string) cause {
	return cause{name, func(ctx context.Context) error { <-ctx.Done(); return &pgconn.PgError{Code: code} }}
}

// feeds are what has become of the session that hears of announcements.
var feeds = map[string]func(*feed.Log){
	"no feed":     func(*feed.Log) {},
	"feed failed": func(l *feed.Log) { l.End(errors.New("refused")) }, // it never was
	"feed silent": func(l *feed.Log) {
		l.Begin("history", snapshot.Snapshot{}, clock.At(time.Now().Add(-time.Hour)))
	},
}

// askFor asks for n subjects from first on, all at once, and counts the answers.
func askFor(t *testing.T, layer *Layer[uint64, string], store *Store[uint64, string], first, n int) map[string]int {
	answers := make(chan string, n)
	for i := range n {
		go func() {
			_, source, err := layer.Fetch(t.Context(), uint64(first+i), nil, store)
			switch {
			case err != nil:
				answers <- refused
			case source == Stale:
				answers <- stale
			default:
				answers <- fresh
			}
		}()
		synctest.Wait() // so that the first ones are those that are sent
	}
	counts := map[string]int{}
	for range n {
		counts[<-answers]++
	}
	return counts
}

// TestCausesOfFailure: each cause alone, and each pair of them, for few lookups and for many.
// 16 are sent, the rest waits behind these. Facts past their time admit only those whose own
// lookup found an outage, and those who waited if all whom they waited for did.
func TestCausesOfFailure(t *testing.T) {
	for feedName, setFeed := range feeds {
		for i, a := range causes {
			for _, b := range causes[i:] {
				for _, n := range []int{1, 5, 20, 300} {
					t.Run(fmt.Sprintf("%s, %s and %s, %d at once", feedName, a.name, b.name, n), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) { testCauses(t, setFeed, a, b, n) })
					})
				}
			}
		}
	}
}

// testCauses lets the first two lookups fail by a, too few for the breaker, and the others by b.
func testCauses(t *testing.T, setFeed func(*feed.Log), a, b cause, n int) {
	var broken atomic.Bool
	var batches atomic.Int64
	layer, store := newLayer(t, func(ctx context.Context, _ uint64) (string, bool, error) {
		if !broken.Load() {
			return "good", true, nil
		}
		if batches.Add(1) <= 2 {
			return "good", true, a.run(ctx)
		}
		return "good", true, b.run(ctx)
	})
	setFeed(layer.shared.Log)
	sent := min(n, 16) // four for each batch, since the store reads one by one
	for i := range n {
		if _, _, err := layer.Fetch(t.Context(), uint64(i), nil, store); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(11 * time.Second)
	broken.Store(true)
	got := askFor(t, layer, store, 0, n)

	want := map[string]int{}
	for i := range sent {
		switch []cause{a, b}[min(i/2, 1)].name {
		case away.name:
			want[stale]++
		case well.name:
			want[fresh]++
		default:
			want[refused]++
		}
	}
	if a.name == away.name && b.name == away.name {
		want[stale] += n - sent
	} else {
		want[refused] += n - sent
	}
	for _, answer := range []string{fresh, stale, refused} {
		if got[answer] != want[answer] {
			t.Errorf("answered %v, want %v", got, want)
			break
		}
	}
	time.Sleep(2 * time.Second) // for what is under way
}

// TestFullQueue: who finds the queue full is admitted on nothing that is out of date, not even
// in an outage.
func TestFullQueue(t *testing.T) {
	for _, c := range []struct {
		cause
		want map[string]int
	}{
		{away, map[string]int{stale: 26, refused: 74}},
		{busy, map[string]int{refused: 100}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				broken := false
				layer, _ := newLayer(t, nil)
				layer.shared.Batches.Queue = 10
				store := NewStore(layer, Reader[uint64, string, string]{
					One: func(ctx context.Context, _ uint64) (string, bool, error) {
						if broken {
							return "", false, c.run(ctx)
						}
						return "good", true, nil
					},
					Trusted: true, Fill: func(rec *Record[string], word string) { rec.Value = word },
				})
				for i := range 100 {
					if _, _, err := layer.Fetch(t.Context(), uint64(i), nil, store); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(11 * time.Second)
				broken = true
				if got := askFor(t, layer, store, 0, 100); got[stale] != c.want[stale] || got[refused] != c.want[refused] {
					t.Errorf("answered %v, want %v", got, c.want)
				}
				time.Sleep(2 * time.Second)
			})
		})
	}
}

// TestBusyAfterOutage: the breaker is open, and the store is back, and then the pool is busy.
// While the breaker tries, what it skips is no outage once somebody has found the pool busy.
func TestBusyAfterOutage(t *testing.T) {
	for name, c := range map[string]struct {
		then cause
		want string
	}{
		"still away":  {away, stale},
		"busy":        {busy, refused},
		"ours":        {causes[3], refused},
		"not allowed": {causes[4], refused},
		"panic":       {causes[6], refused},
		"Goexit":      {causes[7], refused},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				now := func(context.Context) error { return nil }
				layer, store := newLayer(t, func(ctx context.Context, _ uint64) (string, bool, error) { return "good", true, now(ctx) })
				for i := range 20 {
					if _, _, err := layer.Fetch(t.Context(), uint64(i), nil, store); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(11 * time.Second)
				now = away.run
				for i := range breakAfter {
					if got := askFor(t, layer, store, i, 1); got[stale] != 1 {
						t.Errorf("in the outage: %v", got)
					}
				}
				if got := askFor(t, layer, store, 0, 20); got[stale] != 20 || layer.shared.Stats.Skipped.Load() != 20 {
					t.Errorf("while the breaker is open: %v, %d skipped", got, layer.shared.Stats.Skipped.Load())
				}
				time.Sleep(breaker.For + time.Millisecond)
				now = c.then.run
				for round := range 3 {
					got := askFor(t, layer, store, 0, 20)
					if round == 0 && got[refused] != 1 && c.want == refused {
						t.Errorf("at first: %v, want who tries refused, and the others skipped", got)
					}
					if round > 0 && got[c.want] != 20 {
						t.Errorf("then: %v, want %s", got, c.want)
					}
				}
				now = func(context.Context) error { return nil }
				time.Sleep(breaker.For + time.Millisecond)
				if got := askFor(t, layer, store, 0, 1); got[fresh] != 1 {
					t.Errorf("when all is well: %v", got)
				}
			})
		})
	}
}

// TestOnlyAwayBreaks: however often a store is busy, or rejects what we ask, it is asked.
func TestOnlyAwayBreaks(t *testing.T) {
	for _, c := range causes {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				layer, store := newLayer(t, func(ctx context.Context, _ uint64) (string, bool, error) { return "good", true, c.run(ctx) })
				for i := range 2 * breakAfter {
					askFor(t, layer, store, i, 1)
				}
				if skipped := layer.shared.Stats.Skipped.Load(); (skipped > 0) != (c.name == away.name) {
					t.Errorf("%d are skipped", skipped)
				}
			})
		})
	}
}

// TestBackWithTheFeed: while the breaker is open, a new session for announcements shows that the server
// is there. Nobody waits for the breaker then, since what is known may be foreign to the new server.
func TestBackWithTheFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := true
		layer, store := newLayer(t, func(context.Context, uint64) (string, bool, error) {
			if down {
				return "", false, errors.New("connection refused")
			}
			return "good", true, nil
		})
		fetch := func() error { _, _, err := layer.Fetch(t.Context(), 1, nil, store); return err }
		for range breakAfter + 3 {
			if fetch() == nil {
				t.Error("answered although the store is away")
			}
		}
		reads := layer.shared.Stats.Reads.Load()
		if reads != breakAfter {
			t.Errorf("%d reads, want %d and then none", reads, breakAfter)
		}
		time.Sleep(time.Millisecond)
		begin := func() { layer.shared.Log.Begin("history", snapshot.Snapshot{}, clock.At(time.Now())) }
		begin()
		for range 3 {
			if fetch() == nil {
				t.Error("answered although the store is away")
			}
		}
		if n := layer.shared.Stats.Reads.Load(); n != reads+1 {
			t.Errorf("%d reads after a session has begun, want one", n-reads)
		}
		down = false
		time.Sleep(time.Millisecond)
		begin()
		if err := fetch(); err != nil {
			t.Errorf("the store is back, and so is the feed: %v", err)
		}
	})
}
