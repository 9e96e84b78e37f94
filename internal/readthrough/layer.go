package readthrough

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/breaker"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/outage"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/shared"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/table"
)

// A Source is the place where a record was found.
type Source string

// The sources, from near to far.
const (
	Memory   Source = "memory"
	Redis    Source = "redis"
	Database Source = "store"
	Stale    Source = "stale" // memory or Redis: out of date, but the store could not be read
)

// Shared is what the layers of a cache share.
type Shared struct {
	Log     *feed.Log
	Redis   *shared.Records
	Limits  Limits
	Batches batch.Limits // of lookups in a store
	Stats   Stats
	Logger  *slog.Logger
}

// Stats are the counters of the layers.
type Stats struct {
	Hits, Misses                    atomic.Uint64 // of records in Redis
	Batches, Reads, Errors, Skipped atomic.Uint64 // of lookups in stores
	Queue                           batch.Stats
	Busy, StaleUses, Standby        atomic.Uint64
	Abandoned                       atomic.Int64 // lookups that have not returned although their time is over
}

// A Kind describes a kind of facts: V is what is known about a subject S.
type Kind[S comparable, V any] struct {
	Name   func(S) string                    // in Redis
	Hash   func(S) uint64                    // with evenly distributed low bits
	Topics func(S, *V) [3]feed.Topic         // what their changes are announced as, first their own; some may be the same
	Admits func(*V, time.Time) bool          // whether they admit a request
	Same   func(a, b *V) bool                // whether they are equal
	Append func([]byte, *V) []byte           // encodes them for Redis
	Decode func(*sealed.Decoder, *Record[V]) // the inverse of Append
}

// A Layer is the cache of one kind of facts. It is safe for concurrent use.
type Layer[S comparable, V any] struct {
	shared *Shared
	kind   Kind[S, V]
	found  *table.Table[S, Record[V]]
	absent *table.Table[S, Record[V]] // a table of its own, so that made-up keys do not evict others
	calls  batch.Group[S, answer[V]]
}

type answer[V any] struct {
	rec    *Record[V]
	source Source
}

// NewLayer returns a layer that keeps up to found subjects in memory, and up to absent
// subjects that do not exist. If found is not positive, it keeps nothing.
func NewLayer[S comparable, V any](s *Shared, kind Kind[S, V], found, absent int) *Layer[S, V] {
	return &Layer[S, V]{
		shared: s, kind: kind, found: table.New[S, Record[V]](found, kind.Hash), absent: table.New[S, Record[V]](min(found, absent), kind.Hash),
	}
}

// NewRecord returns the record of a read that did not find subject. If it did, set Value and
// Found.
func (l *Layer[S, V]) NewRecord(subject S, stamp Stamp) *Record[V] {
	rec := &Record[V]{Stamp: stamp}
	rec.cell = l.kind.Topics(subject, &rec.Value)[0].Cell()
	return rec
}

// Recall returns the record in memory if it may decide a request at now, else nil.
func (l *Layer[S, V]) Recall(subject S, now clock.Instant) *Record[V] {
	rec := l.peek(subject)
	if rec == nil || !l.Usable(subject, rec, now) {
		return nil
	}
	return rec
}

// peek returns the record in memory, usable or not, or nil.
func (l *Layer[S, V]) peek(subject S) *Record[V] {
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
	l.found.Delete(subject) // peek looks there first
}

// later returns the record that was read later. Both may be nil.
func later[V any](a, b *Record[V]) *Record[V] {
	if a == nil || b != nil && a.ReadAt.Before(b.ReadAt) {
		return b
	}
	return a
}

// Fetch gets the record of subject from Redis or the store. Concurrent callers with the same
// subject share one lookup. The first of them makes it, within the timeouts and even if its
// ctx ends. The others return when their ctx ends. known is a record that the caller has,
// usable or not, or nil.
func (l *Layer[S, V]) Fetch(ctx context.Context, subject S, known *Record[V], store *Store[S, V]) (*Record[V], Source, error) {
	for asked := time.Now(); ; {
		if ctx.Err() != nil {
			return nil, "", context.Cause(ctx)
		}
		call, first := l.calls.Join(subject)
		if first {
			got, err := batch.Run(func() (answer[V], error) { return l.load(subject, known, store) })
			l.calls.Answer(subject, call, got, err)
			return got.rec, got.source, err
		}
		select {
		case <-call.Done:
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
		if call.Err != nil {
			return nil, "", call.Err
		}
		// A call that started before this request may have missed a change that was
		// announced before the request. The next call cannot.
		rec, source, now := call.Value.rec, call.Value.source, clock.At(time.Now())
		if !call.Started.Before(asked) || l.Usable(subject, rec, now) || source == Stale && l.usableIfError(subject, rec, now) {
			return rec, source, nil
		}
	}
}

// load makes one lookup.
func (l *Layer[S, V]) load(subject S, known *Record[V], store *Store[S, V]) (answer[V], error) {
	inMemory := l.peek(subject)
	if inMemory != nil && l.Usable(subject, inMemory, clock.At(time.Now())) { // another call has just ended
		return answer[V]{inMemory, Memory}, nil
	}
	name := l.kind.Name(subject)
	inRedis, usable, owned := l.get(subject, name, store)
	if usable {
		l.remember(subject, inRedis)
		return answer[V]{inRedis, Redis}, nil
	}
	known = later(inMemory, known)
	latest := later(known, inRedis)
	sent := time.Now()
	read, err := store.batches.Do(subject, latest != nil && latest.Found)
	if outage.IsAway(err) && l.shared.Log.BegunAfter(sent) { // the feed has found a server meanwhile, to which latest may be foreign
		read, err = store.batches.Do(subject, latest != nil && latest.Found)
	}
	if err != nil {
		l.count(err)
		latest = l.lastResort(known, inRedis, owned, store)
		if !outage.IsAway(err) || latest == nil || !l.usableIfError(subject, latest, clock.At(time.Now())) {
			return answer[V]{}, err
		}
		l.shared.Stats.StaleUses.Add(1)
		l.remember(subject, latest)
		return answer[V]{latest, Stale}, nil
	}
	l.compare(subject, known, read.rec)
	l.remember(subject, read.rec)
	if read.rec.Found {
		l.shared.Redis.Set(name, l.encode(read))
	}
	return answer[V]{read.rec, Database}, nil
}

// lastResort returns the record that may admit while the store is away, or nil. One from Redis may
// only if this replica hears of changes that it has not seen: in Redis nothing overwrites a record of
// a key that was deleted, or was not asked for since. But it may tell that a known one is overtaken.
func (l *Layer[S, V]) lastResort(known, inRedis *Record[V], owned bool, store *Store[S, V]) *Record[V] {
	switch {
	case !owned || later(known, inRedis) == known:
		return known
	case l.shared.Log.Covered(inRedis.Snapshot), inRedis.Snapshot.IsZero() && !store.stamps, !l.admits(inRedis, clock.At(time.Now())):
		return inRedis
	}
	return known
}

// count counts the error of a lookup.
func (l *Layer[S, V]) count(err error) {
	stats := &l.shared.Stats
	switch {
	case errors.Is(err, batch.ErrWaited), errors.Is(err, batch.ErrFull): // counted there
	case breaker.Skipped(err):
		stats.Skipped.Add(1)
	case outage.Of(err) == outage.Busy:
		stats.Busy.Add(1)
	default:
		stats.Errors.Add(1)
	}
}

// compare looks for a change that was not announced: read differs from old, which no
// announcement has refuted although all should have arrived.
func (l *Layer[S, V]) compare(subject S, old, read *Record[V]) {
	if old == nil || old.Found == read.Found && l.kind.Same(&old.Value, &read.Value) {
		return
	}
	log := l.shared.Log
	now := clock.At(time.Now())
	if !read.Found && !l.admits(old, now) {
		return // it was dead before, and so need not be announced
	}
	if topics := l.kind.Topics(subject, &old.Value); log.Covers(old.Snapshot) && !log.Refuted(old.Snapshot, topics[:]...) {
		log.Suspect(now, old.Snapshot, topics[:]...)
	}
}

// get returns the record in Redis, whether it is usable, and whether it is known to be of the store's
// tables. It returns nil if there is no record, or it was not sealed under the secret.
//
// No record is usable until the store was read once, which tells its tables: two databases may
// share one Redis.
func (l *Layer[S, V]) get(subject S, name string, store *Store[S, V]) (rec *Record[V], usable, owned bool) {
	body, err := l.shared.Redis.Get(name)
	if err != nil && !errors.Is(err, shared.ErrRejected) {
		return nil, false, false
	}
	now := clock.At(time.Now())
	if body != nil {
		var origin snapshot.Origin
		rec, origin = l.decode(subject, body, now)
		owned = rec != nil && store.owns(origin)
	}
	if rec != nil && store.adopt != nil {
		store.adopt(rec)
	}
	if !owned || !l.Usable(subject, rec, now) {
		l.shared.Stats.Misses.Add(1)
		return rec, false, owned
	}
	l.shared.Stats.Hits.Add(1)
	return rec, true, true
}

func (l *Layer[S, V]) encode(r reading[V]) []byte {
	rec := r.rec
	body := sealed.AppendInt(nil, rec.ReadAt.UnixNano())
	body = sealed.AppendInt(body, int64(r.origin))
	body = sealed.AppendInt(body, int64(r.server))
	return l.kind.Append(sealed.AppendString(body, rec.Snapshot.String()), &rec.Value)
}

// decode is the inverse of encode. It returns nil for anything else, and for a record from
// the future: the clock of the replica that wrote it is ahead, and the record would be used
// for too long.
func (l *Layer[S, V]) decode(subject S, body []byte, now clock.Instant) (*Record[V], snapshot.Origin) {
	d := sealed.NewDecoder(body)
	readAt, past := clock.Elsewhere(d.Int(), now)
	origin := snapshot.Origin(d.Int())
	server := snapshot.Server(d.Int())
	snap, err := snapshot.ParseOptional(d.String())
	if err != nil || !past {
		return nil, 0
	}
	rec := l.NewRecord(subject, Stamp{snap.On(l.shared.Log.Period(server, readAt)), readAt})
	rec.Found = true
	l.kind.Decode(d, rec)
	if !d.Done() {
		return nil, 0
	}
	return rec, origin
}

// Name returns the name of subject's record in Redis.
func (l *Layer[S, V]) Name(subject S) string { return l.kind.Name(subject) }

// Inspect returns the record of subject in Redis, usable or not, and its name. The record is
// nil if there is none. The error is [shared.ErrRejected], or means that Redis could not be
// read.
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
