// Package lastused gathers when things were used, and hands that on in batches: a
// use costs an atomic load, and never waits for what is written.
package lastused

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	kept       = 65_536          // things that wait to be written; more are dropped
	perBatch   = 500             // so that a batch is done soon, whatever waits for it
	lastBudget = 5 * time.Second // for what is written in the end
)

// Uses are the uses of some things. They are safe for concurrent use.
type Uses struct {
	interval time.Duration
	dropped  atomic.Uint64

	mu      sync.Mutex
	pending map[string]time.Time // by the id of the thing
}

// A Mark is when a thing was last noted. The zero value is "never".
type Mark struct{ unix atomic.Int64 }

// New returns Uses that are handed on once in every interval.
func New(interval time.Duration) *Uses {
	return &Uses{interval: interval, pending: map[string]time.Time{}}
}

// Dropped returns how many uses were dropped.
func (u *Uses) Dropped() uint64 { return u.dropped.Load() }

// Note notes that the thing of an id and a mark was used at a time, unless that
// was noted less than an interval ago.
func (u *Uses) Note(mark *Mark, id string, at time.Time) {
	last, now := mark.unix.Load(), at.UnixNano()
	if now-last >= int64(u.interval) && mark.unix.CompareAndSwap(last, now) {
		u.add(id, at)
	}
}

func (u *Uses) add(id string, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	last, known := u.pending[id]
	switch {
	case !known && len(u.pending) >= kept:
		u.dropped.Add(1)
	case at.After(last):
		u.pending[id] = at
	}
}

// Run hands on what was noted, to write, until ctx ends, and then once more. It does so
// in batches, each in the order of the ids. What cannot be written is handed on again
// the next time.
func (u *Uses) Run(ctx context.Context, write func(context.Context, []string, []time.Time) error) error {
	tick := time.NewTicker(u.interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			budget, cancel := context.WithTimeout(ctx, u.interval)
			_ = u.flush(budget, write) // tried again, and the last time tells
			cancel()
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastBudget)
			defer cancel()
			return u.flush(last, write)
		}
	}
}

func (u *Uses) flush(ctx context.Context, write func(context.Context, []string, []time.Time) error) error {
	u.mu.Lock()
	uses := u.pending
	u.pending = map[string]time.Time{}
	u.mu.Unlock()
	ids := slices.Sorted(maps.Keys(uses))
	for batch := range slices.Chunk(ids, perBatch) {
		times := make([]time.Time, len(batch))
		for i, id := range batch {
			times[i] = uses[id]
		}
		if err := write(ctx, batch, times); err != nil {
			for id, at := range uses { // those that were written are gone
				u.add(id, at)
			}
			return err
		}
		for _, id := range batch {
			delete(uses, id)
		}
	}
	return nil
}
