// Package lastused collects when things were used, and writes that in batches. A use costs
// an atomic load and never waits for a write.
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
	kept       = 65_536          // things that may wait to be written; more are dropped
	perBatch   = 500             // small, so that others do not wait long for its locks
	lastBudget = 5 * time.Second // of the last write
)

// Uses are uses that were not written yet. They are safe for concurrent use.
type Uses struct {
	interval time.Duration
	dropped  atomic.Uint64

	mu      sync.Mutex
	pending map[string]time.Time // by the id of the thing
}

// A Mark is when a use of a thing was last noted. The zero value means never.
type Mark struct{ unix atomic.Int64 }

// New returns Uses that are written once per interval.
func New(interval time.Duration) *Uses {
	return &Uses{interval: interval, pending: map[string]time.Time{}}
}

// Dropped returns how many uses were dropped.
func (u *Uses) Dropped() uint64 { return u.dropped.Load() }

// Note notes that a thing, with its mark and id, was used at a time, unless a use was noted
// less than an interval ago.
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

// Run calls write with what was noted, once per interval until ctx ends, and once more then.
// Each batch is in the order of the ids. What cannot be written is kept for the next time.
func (u *Uses) Run(ctx context.Context, write func(context.Context, []string, []time.Time) error) error {
	tick := time.NewTicker(u.interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			budget, cancel := context.WithTimeout(ctx, u.interval)
			_ = u.flush(budget, write) // it is tried again; the last error counts
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
			for id, at := range uses { // what was written has been deleted
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
