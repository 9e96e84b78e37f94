package readthrough

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/breaker"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/shared"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/table"
)

// A Source is where a record was found.
type Source string

// The places where records are found, from near to far.
const (
	Memory   Source = "memory"
	Redis    Source = "redis"
	Database Source = "store"
	Stale    Source = "stale" // memory or Redis, past its time, since the store could not be read
)

// Shared is what all layers of a cache have in common.
type Shared struct {
	Log     *feed.Log
	Redis   *shared.Records
	Limits  Limits
	Batches batch.Limits // of lookups in a store
	Stats   Stats
	Logger  *slog.Logger
}

// Stats counts what layers do.
type Stats struct {
	Hits, Misses                    atomic.Uint64 // of records in Redis
	Batches, Reads, Errors, Skipped atomic.Uint64 // of lookups in stores
	Queue                           batch.Stats
	Busy, StaleUses, Standby        atomic.Uint64
	Abandoned                       atomic.Int64 // under way although their time is over
}

// A Kind is a kind of facts: S is what they are looked up by, V what is known.
type Kind[S comparable, V any] struct {
	Name   func(S) string                       // in Redis
	Hash   func(S) uint64                       // spreads its low bits
	Topics func(S, *V) (feed.Topic, feed.Topic) // whose changes concern the facts; both alike if there is but one
	Admits func(*V, time.Time) bool             // whether found facts admit a request
	Same   func(a, b *V) bool                   // whether a store has told the same
	Append func([]byte, *V) []byte              // the form in Redis
	Decode func(*sealed.Decoder, *Record[V])    // its inverse
}

// A Layer is the cache of one kind of facts. It is safe for concurrent use.
type Layer[S comparable, V any] struct {
	shared *Shared
	kind   Kind[S, V]
	found  *table.Table[S, Record[V]]
	absent *table.Table[S, Record[V]] // apart, so that it cannot push out what was found
	calls  batch.Group[S, answer[V]]
}

type answer[V any] struct {
	rec    *Record[V]
	source Source
}

// NewLayer returns a layer that holds at most so many found subjects, and absent
// ones, in memory; with none or fewer it holds nothing.
func NewLayer[S comparable, V any](s *Shared, kind Kind[S, V], found, absent int) *Layer[S, V] {
	return &Layer[S, V]{
		shared: s, kind: kind, found: table.New[S, Record[V]](found, kind.Hash), absent: table.New[S, Record[V]](min(found, absent), kind.Hash),
	}
}

// NewRecord returns the record of a read in which subject was not found. To make it
// one in which it was, set Value and Found.
func (l *Layer[S, V]) NewRecord(subject S, stamp Stamp) *Record[V] {
	rec := &Record[V]{Stamp: stamp}
	a, _ := l.kind.Topics(subject, &rec.Value)
	rec.cell = a.Cell()
	return rec
}

// Recall returns the record in memory that may decide a request at now, or nil.
func (l *Layer[S, V]) Recall(subject S, now clock.Instant) *Record[V] {
	rec := l.held(subject)
	if rec == nil || !l.Usable(subject, rec, now) {
		return nil
	}
	return rec
}

// held returns the record in memory, usable or not, or nil.
func (l *Layer[S, V]) held(subject S) *Record[V] {
	if rec := l.found.Get(subject); rec != nil {
		return rec
	}
	return l.absent.Get(subject)
}

func (l *Layer[S, V]) remember(subject S, rec *Record[V]) {
	if rec.Found {
		l.found.Put(subject, rec)
		return
	}
	l.absent.Put(subject, rec)
	l.found.Delete(subject) // held looks there first
}

// later returns the record that was read later. Either may be nil.
func later[V any](a, b *Record[V]) *Record[V] {
	if a == nil || b != nil && a.ReadAt.Before(b.ReadAt) {
		return b
	}
	return a
}

// Fetch gets the facts of subject from Redis or the store, and tells where they are
// from. All who ask for one subject at the same time share one lookup. The first of
// them makes it, on its own goroutine and whether its client stays or not; its time
// is limited by the timeouts. The others leave when ctx ends. known is what the
// caller knows already, usable or not; it may be nil.
func (l *Layer[S, V]) Fetch(ctx context.Context, subject S, known *Record[V], store *Store[S, V]) (*Record[V], Source, error) {
	for asked := time.Now(); ; {
		if ctx.Err() != nil {
			return nil, "", context.Cause(ctx)
		}
		call, first := l.calls.Join(subject)
		if first {
			rec, source, err := l.load(subject, known, store)
			l.calls.Answer(subject, call, answer[V]{rec, source}, err)
			return rec, source, err
		}
		select {
		case <-call.Done:
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
		if call.Err != nil {
			return nil, "", call.Err
		}
		// A call that had started before this request may have missed a change that was
		// announced before it. The next one cannot have.
		rec, source, now := call.Value.rec, call.Value.source, clock.At(time.Now())
		if !call.Started.Before(asked) || l.Usable(subject, rec, now) || source == Stale && l.usableIfError(subject, rec, now) {
			return rec, source, nil
		}
	}
}

// load makes one lookup. It may not panic, since others wait for its answer.
func (l *Layer[S, V]) load(subject S, known *Record[V], store *Store[S, V]) (rec *Record[V], source Source, err error) {
	defer func() {
		if p := recover(); p != nil {
			rec, source, err = nil, "", fmt.Errorf("apikey: panic in a lookup: %v", p)
		}
	}()
	held := l.held(subject)
	if held != nil && l.Usable(subject, held, clock.At(time.Now())) { // the call before this one has just ended
		return held, Memory, nil
	}
	name := l.kind.Name(subject)
	inRedis, usable := l.get(subject, name, store)
	if usable {
		l.remember(subject, inRedis)
		return inRedis, Redis, nil
	}
	known = later(held, known)
	latest := later(known, inRedis)
	read, err := store.batches.Do(subject, latest != nil && latest.Found)
	if err != nil {
		if !l.unreadable(err, store) || latest == nil || !l.usableIfError(subject, latest, clock.At(time.Now())) {
			return nil, "", err
		}
		l.shared.Stats.StaleUses.Add(1)
		l.remember(subject, latest)
		return latest, Stale, nil
	}
	l.compare(subject, known, read.rec)
	l.remember(subject, read.rec)
	if read.rec.Found {
		l.shared.Redis.Set(name, l.encode(read))
	}
	return read.rec, Database, nil
}

// unreadable counts the error of a lookup, and reports whether the store cannot be
// read: that is the word of the server or of the network, or their silence. Too many
// lookups of our own, or no connection free, are not an outage: who can cause load
// would keep a revoked key alive. But they may come of one.
func (l *Layer[S, V]) unreadable(err error, store *Store[S, V]) bool {
	stats, budget := &l.shared.Stats, l.shared.Batches.Budget
	outage := func() bool {
		return store.failing(clock.At(time.Now()), 2*budget+breaker.For) || l.shared.Log.Silent(budget)
	}
	switch {
	case errors.Is(err, batch.ErrWaited): // counted there
		return false
	case errors.Is(err, batch.ErrFull):
		return outage()
	case errors.Is(err, ErrBusy):
		stats.Busy.Add(1)
		return outage()
	case breaker.Skipped(err):
		stats.Skipped.Add(1)
	default:
		stats.Errors.Add(1)
	}
	return true
}

// compare looks for a change that nothing announced: other facts than those of a
// record that no announcement has refuted while all should have been received.
func (l *Layer[S, V]) compare(subject S, old, read *Record[V]) {
	if old == nil || old.Found == read.Found && l.kind.Same(&old.Value, &read.Value) {
		return
	}
	log := l.shared.Log
	now := clock.At(time.Now())
	if a, b := l.kind.Topics(subject, &old.Value); log.Covers(old.Snapshot) && !log.Refuted(old.Snapshot, a, b) {
		log.Suspect(now, old.Snapshot, a, b)
	}
}

// get returns the record in Redis, nil if there is none that we sealed, or it is of
// other tables than store reads, and whether it is usable. It is not as long as the
// store has told nothing: two databases may be behind one Redis.
func (l *Layer[S, V]) get(subject S, name string, store *Store[S, V]) (rec *Record[V], usable bool) {
	body, err := l.shared.Redis.Get(name)
	if err != nil && !errors.Is(err, shared.ErrRejected) {
		return nil, false
	}
	now := clock.At(time.Now())
	var owns, known bool
	if body != nil {
		var origin snapshot.Origin
		rec, origin = l.decode(subject, body, now)
		if owns, known = store.owns(origin); known && !owns {
			rec = nil
		}
	}
	if rec != nil && store.adopt != nil {
		store.adopt(rec)
	}
	if rec == nil || !known || !l.Usable(subject, rec, now) {
		l.shared.Stats.Misses.Add(1)
		return rec, false
	}
	l.shared.Stats.Hits.Add(1)
	return rec, true
}

func (l *Layer[S, V]) encode(r reading[V]) []byte {
	rec := r.rec
	body := sealed.AppendInt(nil, rec.ReadAt.UnixNano())
	body = sealed.AppendInt(body, int64(r.origin))
	body = sealed.AppendInt(body, int64(rec.Snapshot.Server()))
	return l.kind.Append(sealed.AppendString(body, rec.Snapshot.String()), &rec.Value)
}

// decode is the inverse of encode; nil for what encode did not make, and for a record
// from the future: it comes from a replica whose clock is ahead, and would live too
// long.
func (l *Layer[S, V]) decode(subject S, body []byte, now clock.Instant) (*Record[V], snapshot.Origin) {
	d := sealed.NewDecoder(body)
	readAt, past := clock.Elsewhere(d.Int(), now)
	origin := snapshot.Origin(d.Int())
	server := snapshot.Server(d.Int())
	snap, err := snapshot.ParseOptional(d.String())
	if err != nil || !past {
		return nil, 0
	}
	rec := l.NewRecord(subject, Stamp{snap.On(server), readAt})
	rec.Found = true
	l.kind.Decode(d, rec)
	if !d.Done() {
		return nil, 0
	}
	return rec, origin
}

// Name returns the name of subject's record in Redis.
func (l *Layer[S, V]) Name(subject S) string { return l.kind.Name(subject) }

// Inspect returns the record of subject in Redis, usable or not, with its name. It
// is nil if there is none; the error is [shared.ErrRejected], or that Redis did not
// answer.
func (l *Layer[S, V]) Inspect(subject S) (name string, rec *Record[V], err error) {
	name = l.kind.Name(subject)
	body, err := l.shared.Redis.Get(name)
	if err != nil || body == nil {
		return name, nil, err
	}
	if rec, _ = l.decode(subject, body, clock.At(time.Now())); rec == nil {
		err = shared.ErrRejected
	}
	return name, rec, err
}
