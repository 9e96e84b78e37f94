// Package readthrough looks up facts: in memory, then in Redis, then in the store.
//
// A Record has what was read, with the time and the PostgreSQL snapshot of the read.
// rule.go decides, whenever a record is used, whether it may be. layer.go makes the lookups
// for one kind of facts. store.go reads from the store.
package readthrough

import (
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A Stamp says when a record was read.
type Stamp struct {
	Snapshot snapshot.Snapshot // of the reading statement; zero if the store has none
	ReadAt   clock.Instant     // before the statement was sent
}

// A Record is the result of one read of a subject.
type Record[V any] struct {
	Value V
	Stamp
	cleared atomic.Uint32 // the last epoch of the cell in which it was found not refuted
	cell    feed.Cell
	Found   bool // false: the store was read, and there is no such subject
}

// Limits are the ages up to which records may be used.
type Limits struct {
	MaxRefusalStaleness time.Duration // to refuse a request
	MaxStaleness        time.Duration // to admit one
	RefreshAfter        time.Duration // to do either, while every change is known to be announced
	StaleIfError        time.Duration // to admit one, while the store cannot be read
}

// Usable reports whether rec may decide a request at now. It may not if a change was
// announced that it has not seen. Otherwise it may while it is young, and for longer while
// every change is known to be announced.
func (l *Layer[S, V]) Usable(subject S, rec *Record[V], now clock.Instant) bool {
	if l.refuted(subject, rec) {
		return false
	}
	age, limits := rec.ReadAt.Age(now), &l.shared.Limits
	if age < limits.MaxRefusalStaleness {
		return true
	}
	admits := l.admits(rec, now)
	return age < limits.RefreshAfter && l.shared.Log.Vouched(rec.Snapshot, rec.cell, now, !admits) ||
		age < limits.MaxStaleness && admits
}

// usableIfError reports whether rec may admit a request at now while the store cannot be
// read, although it is not usable.
func (l *Layer[S, V]) usableIfError(subject S, rec *Record[V], now clock.Instant) bool {
	return rec.ReadAt.Age(now) < l.shared.Limits.StaleIfError && l.admits(rec, now) &&
		!l.refuted(subject, rec) && !l.shared.Log.Foreign(rec.Snapshot)
}

func (l *Layer[S, V]) admits(rec *Record[V], now clock.Instant) bool {
	return rec.Found && l.kind.Admits(&rec.Value, now.Time())
}

// refuted reports whether a change was announced that rec has not seen.
func (l *Layer[S, V]) refuted(subject S, rec *Record[V]) bool {
	epoch := l.shared.Log.Epoch(rec.cell)
	if rec.cleared.Load() == epoch {
		return false
	}
	topics := l.kind.Topics(subject, &rec.Value)
	if l.shared.Log.Refuted(rec.Snapshot, topics[:]...) {
		return true
	}
	rec.cleared.Store(epoch)
	return false
}
