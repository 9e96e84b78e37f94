// Package lastused gathers when things were used, and hands that on in batches: a
// use costs an atomic load, and never waits.
package lastused

import (
	"context"
	"sync/atomic"
	"time"
)

const (
	queued     = 4096            // uses on their way; more are dropped
	kept       = 65_536          // things in one batch; more are dropped
	lastBudget = 5 * time.Second // for the last write
)

// Uses are the uses of some things. They are safe for concurrent use.
type Uses struct {
	interval time.Duration
	queue    chan use
	dropped  atomic.Uint64
}

type use struct {
	id string
	at time.Time
}

// A Mark is when a thing was last handed on. The zero value is "never".
type Mark struct{ unix atomic.Int64 }

// New returns Uses that are handed on once in every interval.
func New(interval time.Duration) *Uses {
	return &Uses{interval: interval, queue: make(chan use, queued)}
}

// Dropped returns how many uses were dropped.
func (u *Uses) Dropped() uint64 { return u.dropped.Load() }

// Note notes that the thing of an id and a mark was used at a time, unless that
// was noted less than an interval ago.
func (u *Uses) Note(mark *Mark, id string, at time.Time) {
	last, now := mark.unix.Load(), at.UnixNano()
	if now-last < int64(u.interval) || !mark.unix.CompareAndSwap(last, now) {
		return
	}
	select {
	case u.queue <- use{id, at}:
	default:
		u.dropped.Add(1)
	}
}

// Run hands on what was noted, to write, until ctx ends, and then once more. A
// batch that cannot be written is handed on again with the next one.
func (u *Uses) Run(ctx context.Context, write func(context.Context, []string, []time.Time) error) error {
	tick := time.NewTicker(u.interval)
	defer tick.Stop()
	batch := map[string]time.Time{}
	add := func(use use) {
		if _, ok := batch[use.id]; !ok && len(batch) >= kept {
			u.dropped.Add(1)
		} else if use.at.After(batch[use.id]) {
			batch[use.id] = use.at
		}
	}
	flush := func(ctx context.Context) error {
		if len(batch) == 0 {
			return nil
		}
		ids, times := make([]string, 0, len(batch)), make([]time.Time, 0, len(batch))
		for id, at := range batch {
			ids, times = append(ids, id), append(times, at)
		}
		err := write(ctx, ids, times)
		if err == nil {
			clear(batch)
		}
		return err
	}
	for {
		select {
		case use := <-u.queue:
			add(use)
		case <-tick.C:
			budget, cancel := context.WithTimeout(ctx, u.interval)
			_ = flush(budget) // tried again, and the last time tells
			cancel()
		case <-ctx.Done():
			for len(u.queue) > 0 {
				add(<-u.queue)
			}
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastBudget)
			defer cancel()
			return flush(last)
		}
	}
}
