package lastused

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// A table is what was written.
type table struct {
	mu     sync.Mutex
	rows   map[string]time.Time
	writes int
	err    error
}

func (w *table) write(_ context.Context, ids []string, times []time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writes++
	if w.err != nil {
		return w.err
	}
	for i, id := range ids {
		w.rows[id] = times[i]
	}
	return nil
}

// set sets the error of later writes, and returns what was written by then.
func (w *table) set(err error) (rows, writes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	return len(w.rows), w.writes
}

// run runs u until stop is called, which returns what Run does.
func run(t *testing.T, u *Uses, w *table) (stop func() error) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- u.Run(ctx, w.write) }()
	return func() error { cancel(); return <-done }
}

func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, w := New(time.Minute), &table{rows: map[string]time.Time{}}
		stop := run(t, u, w)
		var a, b Mark
		time.Sleep(time.Second / 2) // between the ticks
		start := time.Now()
		for range 90 { // a minute and a half
			u.Note(&a, "a", time.Now())
			u.Note(&b, "b", time.Now())
			synctest.Wait()
			time.Sleep(time.Second)
		}
		w.set(nil)
		if want := map[string]time.Time{"a": start, "b": start}; w.writes != 1 || !maps.Equal(w.rows, want) {
			t.Errorf("%d writes of %v, want one of %v", w.writes, w.rows, want)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
		minute := start.Add(time.Minute)
		if want := map[string]time.Time{"a": minute, "b": minute}; w.writes != 2 || !maps.Equal(w.rows, want) {
			t.Errorf("in the end %d writes of %v, want two of %v", w.writes, w.rows, want)
		}
	})
}

// TestOutage: a batch that cannot be written is written later, with what came in
// between, and the last error is told.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, w := New(time.Minute), &table{rows: map[string]time.Time{}, err: errors.New("away")}
		stop := run(t, u, w)
		var a, b Mark
		u.Note(&a, "a", time.Now())
		time.Sleep(90 * time.Second)
		synctest.Wait()
		u.Note(&b, "b", time.Now())
		synctest.Wait()
		if rows, writes := w.set(nil); writes != 1 || rows != 0 {
			t.Errorf("%d writes of %d rows", writes, rows)
		}
		time.Sleep(time.Minute)
		if rows, _ := w.set(nil); rows != 2 {
			t.Errorf("%d rows, want a and b", rows)
		}
		time.Sleep(time.Hour) // with nothing to write
		away := errors.New("away again")
		if _, writes := w.set(away); writes != 2 {
			t.Errorf("%d writes, want 2", writes)
		}
		u.Note(&a, "a", time.Now())
		if err := stop(); !errors.Is(err, away) {
			t.Errorf("Run = %v, want %v", err, away)
		}
	})
}

// TestPressure: what is too much is dropped and counted, and nothing else is, whether
// anything is written or not; nobody waits.
func TestPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u, w := New(time.Minute), &table{rows: map[string]time.Time{}}
		frozen := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- u.Run(ctx, func(ctx context.Context, ids []string, times []time.Time) error {
				<-frozen
				return w.write(ctx, ids, times)
			})
		}()
		u.Note(new(Mark), "the first", time.Now())
		time.Sleep(time.Minute)
		synctest.Wait() // its write is frozen
		for i := range kept + 10 {
			for range 3 { // each has a mark of its own, as without a cache
				u.Note(new(Mark), fmt.Sprint(i), time.Now())
			}
		}
		close(frozen)
		cancel()
		if err := <-done; err != nil || len(w.rows) != kept+1 || u.Dropped() != 30 {
			t.Errorf("%v, %d written, %d dropped, want %d and 30", err, len(w.rows), u.Dropped(), kept+1)
		}
		if most := (kept+perBatch-1)/perBatch + 1; w.writes != most {
			t.Errorf("%d writes, want %d", w.writes, most)
		}
	})
}

func TestNoteIsCheap(t *testing.T) {
	u, mark, now := New(time.Minute), new(Mark), time.Now()
	u.Note(mark, "a", now)
	if n := testing.AllocsPerRun(100, func() { u.Note(mark, "a", now) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
