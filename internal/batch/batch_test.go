package batch_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

const budget = time.Second

// A server answers every key with itself when it is released, and notes batches.
type server struct {
	mu      sync.Mutex
	batches [][]int
	release chan struct{} // a batch is answered for each value; closed: at once
}

func (s *server) run(ctx context.Context, keys []int) ([]int, error) {
	s.mu.Lock()
	s.batches = append(s.batches, slices.Clone(keys))
	s.mu.Unlock()
	select {
	case <-s.release:
		return keys, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// sizes are those of the batches so far.
func (s *server) sizes() (sizes []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.batches {
		sizes = append(sizes, len(b))
	}
	return sizes
}

type answer struct {
	key, value int
	err        error
	took       time.Duration
}

// A bench is a Batcher under test, and those who wait for it.
type bench struct {
	*server
	batcher *batch.Batcher[int, int]
	stats   batch.Stats
	answers chan answer
}

func newBench(limits batch.Limits) *bench {
	b := &bench{server: &server{release: make(chan struct{})}, answers: make(chan answer, 1000)}
	b.batcher = batch.New(limits, &b.stats, b.run)
	return b
}

// ask asks for some keys, each on a goroutine of its own, in this order.
func (b *bench) ask(preferred bool, keys ...int) {
	for _, key := range keys {
		go func() {
			start := time.Now()
			value, err := b.batcher.Do(key, preferred)
			b.answers <- answer{key, value, err, time.Since(start)}
		}()
		synctest.Wait()
	}
}

func upTo(n int) (keys []int) {
	for i := range n {
		keys = append(keys, i)
	}
	return keys
}

// TestNaturalBatching: who comes first goes alone and at once; who waits goes with
// the others, in batches of a limited size.
func TestNaturalBatching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(batch.Limits{AtOnce: 2, Size: 10, Queue: 100, Budget: budget})
		b.ask(false, upTo(30)...)
		if got := b.sizes(); !slices.Equal(got, []int{1, 1}) {
			t.Errorf("batches of %v while two are under way", got)
		}
		for range 5 {
			b.release <- struct{}{}
			synctest.Wait()
		}
		if got, want := b.sizes(), []int{1, 1, 10, 10, 8}; !slices.Equal(got, want) {
			t.Errorf("batches of %v, want %v", got, want)
		}
		for range 30 {
			if a := <-b.answers; a.err != nil || a.value != a.key || a.took != 0 {
				t.Errorf("%+v", a)
			}
		}
		close(b.release)
		b.ask(false, 77)
		if got := b.sizes(); got[len(got)-1] != 1 {
			t.Errorf("afterwards a batch of %d", got[len(got)-1])
		}
	})
}

// TestPreferred: those whose key is known go before all others.
func TestPreferred(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(batch.Limits{AtOnce: 1, Size: 4, Queue: 100, Budget: budget})
		b.ask(false, 0, 1, 2, 3, 4, 5)
		b.ask(true, 10, 11)
		close(b.release)
		synctest.Wait()
		if want := []int{10, 11, 1, 2}; !slices.Equal(b.batches[1], want) {
			t.Errorf("the second batch is %v, want %v", b.batches[1], want)
		}
	})
}

// TestQueueFull: each class has a queue of its own, so that one cannot fill that of
// the other.
func TestQueueFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(batch.Limits{AtOnce: 1, Size: 100, Queue: 5, Budget: budget})
		b.ask(false, upTo(8)...)
		for range 2 {
			if a := <-b.answers; !errors.Is(a.err, batch.ErrFull) || a.took != 0 {
				t.Errorf("%+v, want ErrFull at once", a)
			}
		}
		b.ask(true, 10)
		close(b.release)
		for range 7 {
			if a := <-b.answers; a.err != nil {
				t.Errorf("%+v", a)
			}
		}
		if b.stats.Full.Load() != 2 {
			t.Errorf("%d were counted as too many, want 2", b.stats.Full.Load())
		}
	})
}

// TestBudget: nobody waits longer than the budget, and whoever does is told whether
// others were answered meanwhile.
func TestBudget(t *testing.T) {
	for name, c := range map[string]struct {
		answered bool
		want     error
	}{
		"silent":      {false, batch.ErrSilent},
		"overcrowded": {true, batch.ErrWaited},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(batch.Limits{AtOnce: 2, Size: 1, Queue: 100, Budget: budget})
				b.ask(false, 0, 1)
				time.Sleep(budget / 2)
				b.ask(false, 2, 3, 4)
				if c.answered {
					b.release <- struct{}{}
				}
				for range 5 {
					a := <-b.answers
					switch {
					case c.answered && a.err == nil:
					case a.key < 2 && !errors.Is(a.err, context.DeadlineExceeded):
						t.Errorf("%+v, want the error of the batch", a)
					case a.key == 4 && !errors.Is(a.err, c.want):
						t.Errorf("%+v, want %v", a, c.want)
					}
					if a.took > budget {
						t.Errorf("%+v took longer than the budget", a)
					}
				}
				close(b.release)
				synctest.Wait()
				b.ask(false, 5)
				if a := <-b.answers; a.err != nil {
					t.Errorf("afterwards: %+v", a)
				}
			})
		})
	}
}

// TestFaults: errors, panics and a wrong number of answers reach all of a batch, and
// no other.
func TestFaults(t *testing.T) {
	broken := errors.New("broken")
	var fault func(keys []int) ([]int, error)
	var stats batch.Stats
	b := batch.New(batch.Limits{AtOnce: 1, Size: 10, Queue: 10, Budget: budget}, &stats,
		func(_ context.Context, keys []int) ([]int, error) { return fault(keys) })
	for name, f := range map[string]func([]int) ([]int, error){
		"broken":              func([]int) ([]int, error) { return nil, broken },
		"panic: no":           func([]int) ([]int, error) { panic("no") },
		"0 values for 1 keys": func([]int) ([]int, error) { return nil, nil },
	} {
		fault = f
		for range 3 { // and its place is given back
			if _, err := b.Do(1, false); err == nil || err.Error() != name {
				t.Errorf("%v, want %s", err, name)
			}
		}
	}
	fault = func(keys []int) ([]int, error) { return keys, nil }
	if v, err := b.Do(7, false); v != 7 || err != nil {
		t.Errorf("%v, %v", v, err)
	}
}

func TestGroup(t *testing.T) {
	var g batch.Group[string, int]
	first, is := g.Join("a")
	if !is {
		t.Fatal("the first caller is told to wait")
	}
	second, is := g.Join("a")
	if is || second != first {
		t.Error("the second caller does not share")
	}
	if _, is := g.Join("b"); !is {
		t.Error("another key is shared")
	}
	broken := errors.New("broken")
	g.Answer("a", first, 7, broken)
	<-second.Done
	if second.Value != 7 || !errors.Is(second.Err, broken) {
		t.Errorf("%+v", second)
	}
	if _, is := g.Join("a"); !is {
		t.Error("a call that has ended is joined")
	}
}
