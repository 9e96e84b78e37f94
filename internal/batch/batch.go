// Package batch collects concurrent lookups into batches. A lookup is sent at once while few
// batches are running. While many are running, lookups wait, and the next batch takes all that
// wait. There is no timer, and no batch waits to be full: batches become larger under load.
package batch

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/outage"
)

// Errors of Do that are caused by other callers, and not by what is asked.
var (
	ErrFull   = outage.New(outage.Busy, "the queue is full")
	ErrWaited = outage.New(outage.Busy, "the time was spent waiting in the queue")
)

// ErrSilent is the error of Do if the budget was spent waiting in the queue, and all batches
// that ended meanwhile found an outage.
var ErrSilent = outage.New(outage.Away, "the time was spent waiting for a store that is away")

// Limits are the limits of a Batcher. All are at least 1.
type Limits struct {
	AtOnce int           // batches running at the same time
	Size   int           // keys in one batch
	Queue  int           // keys that may wait, for each of the two classes
	Budget time.Duration // of a caller, and of a batch
}

// A Batcher looks up keys in batches. It is safe for concurrent use. It does not merge
// lookups of the same key: see [Group].
type Batcher[K, V any] struct {
	limits Limits
	run    func(ctx context.Context, keys []K) ([]V, error)
	stats  *Stats

	mu      sync.Mutex
	running int
	queues  [2][]*waiter[K, V] // the preferred ones first; empty while running is below AtOnce
	ended   words
	heard   chan struct{} // closed, and replaced, when a batch has ended
}

// words count what ended batches have found.
type words struct{ away, other uint64 }

func (w words) since(before words) words { return words{w.away - before.away, w.other - before.other} }

// Stats counts keys that were not looked up. Several Batchers may share one.
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

// New returns a Batcher that calls run for each batch. run returns one value for each key,
// in the same order, or an error for all of them. It must return when its context ends. If
// it panics, or ends its goroutine, that is an error.
func New[K, V any](limits Limits, stats *Stats, run func(ctx context.Context, keys []K) ([]V, error)) *Batcher[K, V] {
	return &Batcher[K, V]{limits: limits, stats: stats, run: run, heard: make(chan struct{})}
}

// Do looks up key, within the budget. The lookup starts after Do was called. Preferred keys
// are looked up before others that wait.
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
	before := b.ended
	b.mu.Unlock()

	budget := time.NewTimer(b.limits.Budget)
	defer budget.Stop()
	select {
	case <-w.done:
		return w.value, w.err
	case <-budget.C:
	}
	return b.late(w, class, before)
}

// late returns the answer to a waiter whose budget is over: the word of the batches that he
// has waited for. Those that were running when he came are at the end of their budgets, too,
// so he waits a little for what they say.
func (b *Batcher[K, V]) late(w *waiter[K, V], class int, before words) (none V, err error) {
	b.mu.Lock()
	if w.queued {
		i := slices.Index(b.queues[class], w)
		b.queues[class] = slices.Delete(b.queues[class], i, i+1)
	}
	patience := time.NewTimer(b.limits.Budget / 2)
	defer patience.Stop()
	for {
		said, heard := b.ended.since(before), b.heard
		b.mu.Unlock()
		all := said.away+said.other >= uint64(b.limits.AtOnce)
		if !all && said.other == 0 {
			select {
			case <-w.done:
				return w.value, w.err
			case <-heard:
				b.mu.Lock()
				continue
			case <-patience.C:
			}
		}
		if said.other == 0 && said.away > 0 {
			return none, ErrSilent
		}
		b.stats.Waited.Add(1)
		return none, ErrWaited
	}
}

// next is called when a batch has ended. If keys wait, it starts the next batch, on a new
// goroutine, so that no caller works for others.
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

// ask runs a batch.
func (b *Batcher[K, V]) ask(batch []*waiter[K, V]) {
	keys := make([]K, len(batch))
	for i, w := range batch {
		keys[i] = w.key
	}
	ctx, cancel := context.WithTimeout(context.Background(), b.limits.Budget)
	values, err := Run(func() ([]V, error) { return b.run(ctx, keys) })
	cancel()
	if err == nil && len(values) != len(keys) {
		err = outage.As(outage.Ours, fmt.Errorf("%d values for %d keys", len(values), len(keys)))
	}
	for i, w := range batch {
		if w.err = err; err == nil {
			w.value = values[i]
		}
		if w.done != nil {
			close(w.done)
		}
	}
	b.mu.Lock()
	if outage.IsAway(err) {
		b.ended.away++
	} else {
		b.ended.other++
	}
	close(b.heard)
	b.heard = make(chan struct{})
	b.mu.Unlock()
}
