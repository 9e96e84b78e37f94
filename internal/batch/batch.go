// Package batch is natural batching: who asks while little is going on is served
// at once, on its own goroutine; who asks while enough batches are under way waits,
// and goes out together with all others who wait. There is no timer, and no waiting
// for a batch to fill: load makes batches larger.
package batch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// What Do returns when it has no answer because of others who ask, and not because
// of who is asked.
var (
	ErrFull   = errors.New("the queue is full")
	ErrWaited = errors.New("the time was spent waiting in the queue")
)

// ErrSilent is what Do returns when no batch at all was answered in its time.
var ErrSilent = errors.New("no answer came in time")

// Limits are the limits of a Batcher. All are at least 1.
type Limits struct {
	AtOnce int           // batches under way
	Size   int           // keys in one batch
	Queue  int           // keys of one class that wait
	Budget time.Duration // for waiting, and for a batch
}

// A Batcher asks for keys in batches. It is safe for concurrent use. Callers that
// ask for the same key at a time are to share: see [Group].
type Batcher[K, V any] struct {
	limits Limits
	run    func(ctx context.Context, keys []K) ([]V, error)
	stats  *Stats

	mu       sync.Mutex
	running  int
	queues   [2][]*waiter[K, V] // the preferred ones first; empty while running is below AtOnce
	answered uint64             // batches that were
}

// Stats counts the keys that were not asked for. Several Batchers may share one.
type Stats struct {
	Full   atomic.Uint64 // ErrFull
	Waited atomic.Uint64 // ErrWaited
}

// A waiter waits for its answer.
type waiter[K, V any] struct {
	key    K
	queued bool          // guarded by the Batcher's lock
	done   chan struct{} // closed when the answer is there
	value  V
	err    error
}

// New returns a Batcher that calls run for each batch. run returns a value for each
// of the keys, in their order, or an error that all of them get; it must honour its
// context. A panic in it is such an error.
func New[K, V any](limits Limits, stats *Stats, run func(ctx context.Context, keys []K) ([]V, error)) *Batcher[K, V] {
	return &Batcher[K, V]{limits: limits, stats: stats, run: run}
}

// Do returns the value of key, which is asked for after Do was called. It returns
// within the budget, and waits for nothing else. Of those who wait, the preferred
// ones go first.
func (b *Batcher[K, V]) Do(key K, preferred bool) (V, error) {
	w := &waiter[K, V]{key: key}
	class := 1
	if preferred {
		class = 0
	}

	b.mu.Lock()
	if b.running < b.limits.AtOnce {
		b.running++
		b.mu.Unlock()
		b.ask([]*waiter[K, V]{w})
		b.next()
		return w.value, w.err
	}
	if len(b.queues[class]) >= b.limits.Queue {
		b.mu.Unlock()
		b.stats.Full.Add(1)
		return w.value, ErrFull
	}
	w.queued, w.done = true, make(chan struct{})
	b.queues[class] = append(b.queues[class], w)
	answered := b.answered
	b.mu.Unlock()

	budget := time.NewTimer(b.limits.Budget)
	defer budget.Stop()
	select {
	case <-w.done:
		return w.value, w.err
	case <-budget.C:
	}
	var none V
	b.mu.Lock()
	defer b.mu.Unlock()
	if w.queued {
		i := slices.Index(b.queues[class], w)
		b.queues[class] = slices.Delete(b.queues[class], i, i+1)
	}
	if b.answered == answered {
		return none, ErrSilent
	}
	b.stats.Waited.Add(1)
	return none, ErrWaited
}

// next ends a batch, and begins another if somebody waits. That one has a goroutine
// of its own, so that nobody's time is spent on others.
func (b *Batcher[K, V]) next() {
	b.mu.Lock()
	defer b.mu.Unlock()
	var batch []*waiter[K, V]
	for class, queue := range b.queues {
		n := min(b.limits.Size-len(batch), len(queue))
		batch = append(batch, queue[:n]...)
		b.queues[class] = slices.Delete(queue, 0, n)
	}
	if len(batch) == 0 {
		b.running--
		return
	}
	for _, w := range batch {
		w.queued = false
	}
	go func() {
		b.ask(batch)
		b.next()
	}()
}

// ask gets the answers of a batch.
func (b *Batcher[K, V]) ask(batch []*waiter[K, V]) {
	keys := make([]K, len(batch))
	for i, w := range batch {
		keys[i] = w.key
	}
	values, err := b.guarded(keys)
	if err == nil && len(values) != len(keys) {
		err = fmt.Errorf("%d values for %d keys", len(values), len(keys))
	}
	if err == nil {
		b.mu.Lock()
		b.answered++
		b.mu.Unlock()
	}
	for i, w := range batch {
		if w.err = err; err == nil {
			w.value = values[i]
		}
		if w.done != nil {
			close(w.done)
		}
	}
}

func (b *Batcher[K, V]) guarded(keys []K) (values []V, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), b.limits.Budget)
	defer cancel()
	return b.run(ctx, keys)
}
