package readthrough

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/breaker"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/outage"
	"github.com/trackpilots/apikey/internal/snapshot"
)

const (
	// breakAfter is the number of batches that fail in a row before the breaker opens.
	breakAfter = 3

	// lookupsPerBatch is how many single subjects are looked up at the same time, in place
	// of a batch, if the store cannot look up batches.
	lookupsPerBatch = 4

	// maxAbandoned limits the lookups that a store does not return from.
	maxAbandoned = 64
)

// A Store reads facts from a store: in batches, few at a time, and not for a while after it
// has failed.
type Store[S comparable, V any] struct {
	batches *batch.Batcher[S, reading[V]]
	adopt   func(*Record[V])
	tables  *Tables
	stamps  bool // it reports origins
}

// Tables are those that a store reads, or several stores on one database. They are known after
// the first read.
type Tables struct{ origin atomic.Int64 } // the snapshot.Origin of what was last read

// A reading is a record and the tables that it was read from.
type reading[V any] struct {
	rec    *Record[V]
	server snapshot.Server // not of a period of this replica, as the record's is
	origin snapshot.Origin
}

// owns reports whether origin is known to be that of the store's tables.
func (s *Store[S, V]) owns(origin snapshot.Origin) bool {
	return origin == snapshot.Origin(s.tables.origin.Load()) && (origin != 0 || !s.stamps)
}

// A Reader reads facts of type F. One and Many report stamps: see [snapshot.Report].
type Reader[S comparable, V, F any] struct {
	Name    string                                                   // for the log
	One     func(context.Context, S) (fact F, found bool, err error) // not used if there is Many
	Many    func(context.Context, []S) (map[S]F, error)              // without entries for absent subjects; nil: One is used
	Trusted bool                                                     // a store of this module: it returns when its context ends, and reports stamps
	Fill    func(*Record[V], F)                                      // sets the value of a record
	Adopt   func(*Record[V])                                         // changes a record that comes from Redis; nil: nothing to change
	Tables  *Tables                                                  // shared with another store; nil: it is not
}

// NewStore returns a Store that reads records for a layer.
func NewStore[S comparable, V, F any](l *Layer[S, V], r Reader[S, V, F]) *Store[S, V] {
	stats, limits, many := &l.shared.Stats, l.shared.Batches, r.Many
	if many == nil {
		limits.AtOnce, limits.Size = lookupsPerBatch*limits.AtOnce, 1
		many = func(ctx context.Context, subjects []S) (map[S]F, error) {
			fact, found, err := r.One(ctx, subjects[0])
			if err != nil || !found {
				return nil, err
			}
			return map[S]F{subjects[0]: fact}, nil
		}
	}
	if !r.Trusted {
		many = abandonable(stats, many)
	}
	var fault atomic.Value // string: why the last lookup failed
	fault.Store("")
	var word atomic.Int64              // the outage.Class of the last batch that was sent and failed
	var away atomic.Pointer[time.Time] // when a batch was last sent in vain
	noOutage := func(err error) bool { // called for each batch that was sent
		if err != nil {
			word.Store(int64(outage.Of(err)))
		}
		if outage.IsAway(err) {
			now := time.Now()
			away.Store(&now)
		}
		return err != nil && !outage.IsAway(err)
	}
	guard := breaker.New(breakAfter, noOutage,
		func() {
			l.shared.Logger.Warn("apikey: a store is not asked, since it failed several times in a row", "store", r.Name, "error", fault.Load())
		},
		func() { l.shared.Logger.Info("apikey: a store is asked again", "store", r.Name) })
	tables := cmp.Or(r.Tables, new(Tables))
	read := func(ctx context.Context, subjects []S) ([]reading[V], error) {
		stats.Batches.Add(1)
		stats.Reads.Add(uint64(len(subjects)))
		ctx, collector := snapshot.Collect(ctx)
		stamp := Stamp{ReadAt: clock.At(time.Now())}
		facts, err := many(ctx, subjects)
		if err != nil {
			fault.Store(err.Error())
			return nil, err
		}
		stamp.Snapshot = collector.Snapshot()
		server := stamp.Snapshot.Server()
		l.shared.Log.Read(server)
		stamp.Snapshot = stamp.Snapshot.On(l.shared.Log.Period(server, stamp.ReadAt))
		if collector.Standby() {
			stats.Standby.Add(uint64(len(subjects)))
		}
		tables.origin.Store(int64(collector.Origin()))
		readings := make([]reading[V], len(subjects))
		for i, subject := range subjects {
			rec := l.NewRecord(subject, stamp)
			if fact, ok := facts[subject]; ok {
				rec.Found = true
				r.Fill(rec, fact)
			}
			readings[i] = reading[V]{rec, server, collector.Origin()}
		}
		return readings, nil
	}
	return &Store[S, V]{
		adopt:  r.Adopt,
		tables: tables,
		stamps: r.Trusted,
		batches: batch.New(limits, &stats.Queue, func(ctx context.Context, subjects []S) ([]reading[V], error) {
			send := func() ([]reading[V], error) { return read(ctx, subjects) }
			readings, err := breaker.Do(guard, send)
			if since := away.Load(); breaker.Skipped(err) && since != nil && l.shared.Log.BegunAfter(*since) {
				// The session for announcements has found the server again. There is no need to wait
				// until the breaker tries: facts from before may be of another history, and so be no
				// last resort any more.
				readings, err = batch.Run(send)
				noOutage(err)
			}
			if breaker.Skipped(err) {
				class := outage.Away
				if breaker.Trying(err) {
					class = outage.Class(word.Load())
				}
				err = outage.As(class, fmt.Errorf("apikey: the store failed %d times in a row and is not asked for %v: %w", breakAfter, breaker.For, err))
			}
			return readings, err
		}),
	}
}

// abandonable wraps many so that it returns when its context ends, even if the store does
// not. Such a lookup is counted until the store returns. While too many have not returned,
// which have all had their time, the store is away.
func abandonable[S comparable, F any](stats *Stats, many func(context.Context, []S) (map[S]F, error)) func(context.Context, []S) (map[S]F, error) {
	return func(ctx context.Context, subjects []S) (map[S]F, error) {
		if n := stats.Abandoned.Load(); n >= maxAbandoned {
			return nil, fmt.Errorf("apikey: the store has not returned from %d lookups: it must honour its context", n)
		}
		answers := batch.Start(func() (map[S]F, error) { return many(ctx, subjects) })
		select {
		case a := <-answers:
			return a.Value, a.Err
		case <-ctx.Done():
		}
		select { // a store that honours its context is about to return
		case a := <-answers:
			return a.Value, a.Err
		case <-time.After(time.Millisecond):
		}
		stats.Abandoned.Add(1)
		go func() {
			<-answers
			stats.Abandoned.Add(-1)
		}()
		return nil, fmt.Errorf("apikey: the store did not answer in time: %w", context.Cause(ctx))
	}
}
