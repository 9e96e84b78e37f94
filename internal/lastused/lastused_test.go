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

// TestPressure: what is too much is dropped and counted; nobody waits.
func TestPressure(t *testing.T) {
	u := New(time.Minute)
	for i := range queued + 10 { // nobody runs it
		u.Note(new(Mark), fmt.Sprint(i), time.Now())
	}
	if n := u.Dropped(); n != 10 {
		t.Errorf("%d dropped, want 10", n)
	}
	synctest.Test(t, func(t *testing.T) {
		u, w := New(time.Hour), &table{rows: map[string]time.Time{}}
		stop := run(t, u, w)
		for i := range kept + 10 {
			u.Note(new(Mark), fmt.Sprint(i), time.Now())
			if i%queued == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		if err := stop(); err != nil || len(w.rows) != kept || u.Dropped() != 10 {
			t.Errorf("%v, %d written, %d dropped, want %d and 10", err, len(w.rows), u.Dropped(), kept)
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
