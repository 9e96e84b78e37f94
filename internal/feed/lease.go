package feed

// What makes records worth more than their age: a session through which every
// announcement is received, and a lease that says until when that is known.
//
// The argument. A change is not announced by the transaction that makes it. That one
// leaves a row in the outbox, and whoever calls apikey_announce after its commit
// announces it. Postgres delivers announcements in the order in which the announcing
// transactions commit: each holds a lock from before it puts its notices in the queue
// until it is visible.
//
// A session's connection listens, and then takes its first snapshot. A record that
// includes that snapshot has missed only changes that became visible later. These are
// announced later still, and so after the LISTEN: Postgres delivers the announcements.
//
// Several times a lease the session calls apikey_announce, one call after the other: a
// read. When it has made a read at time T, all that had been committed at T has been
// announced, by that read or by transactions that had committed before it returned. Then
// it makes another read. When it later hears of a transaction that the snapshot of this
// second read has not seen, that announcement was committed after the first read was
// done, and so all that was committed at T has been delivered before. The lease runs to
// T plus the longest staleness that is allowed. Whoever sent the announcement does not
// matter, and nothing has to be sent where something is announced anyway.
//
// That the facts of a record come from the server that the session listens to is said
// by the record's stamp.
//
// model_test.go goes through all short histories, and finds a stale record that is
// vouched for if any of these conditions is left out.

import (
	"errors"
	"slices"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A History is what a database and its copies have in common: transaction ids of one
// mean nothing in another. Two servers of one history are runs of the same one.
type History string

// A session is a time through which every announcement is received.
type session struct {
	first snapshot.Snapshot // taken when the connection listened
	known clock.Instant     // up to this time all changes are known
	live  bool              // it has been renewed
}

// vouching is who vouches for records. It is immutable, and replaced as a whole.
type vouching struct {
	session  *session          // nil: none yet, or only one that has ended
	ended    *session          // the one before, whose lease runs out
	servers  []snapshot.Server // that are known to be of the present history; nil: no session yet
	mismatch bool              // the stores read from another server than session listens to
}

// Begin begins a session on a server of a history, with a snapshot that was asked for
// at a time when the connection listened. It vouches for records from the first Renew
// on.
func (l *Log) Begin(history History, first snapshot.Snapshot, asked clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := *l.vouching.Load()
	if l.history != history {
		// Transactions of the old history refute nothing, and its records are foreign.
		l.history, v.servers, v.ended, l.unverified = history, nil, nil, nil
		for kind := range l.marks {
			l.marks[kind] = newMarks()
		}
		l.newEpochs()
	}
	l.reached(first, asked)
	if !slices.Contains(v.servers, first.Server()) {
		v.servers = append(v.servers[:len(v.servers):len(v.servers)], first.Server())
	}
	if v.session != nil {
		v.ended = v.session
	}
	v.session, v.mismatch = &session{first: first, known: asked.Add(-l.lease)}, false
	l.vouching.Store(&v)
}

// Renew notes that all that was committed at a time has been announced.
func (l *Log) Renew(known clock.Instant) {
	if l.renew(known) {
		l.goesLive.Do(func() { close(l.live) })
		l.logger.Info("apikey: changes are heard")
	}
}

// renew reports whether the session is live from now on.
func (l *Log) renew(known clock.Instant) (live bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := *l.vouching.Load()
	if v.session == nil || known.Before(v.session.known) {
		return false
	}
	live = !v.session.live
	v.session = &session{v.session.first, known, true}
	l.vouching.Store(&v)

	kept := l.suspects[:0]
	for _, suspect := range l.suspects {
		switch {
		case !suspect.found.Before(known):
			kept = append(kept, suspect)
		case !l.refuted(suspect.snap, suspect.topics):
			l.unannounced.Add(1)
		}
	}
	l.suspects = kept
	return live
}

// End ends the session because of err: from now on announcements may be missed. What
// was known stays known until the lease runs out. It reports whether the session had
// been renewed.
func (l *Log) End(err error) (renewed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.suspects = nil
	l.fault.Store(&err)
	v := *l.vouching.Load()
	if v.session != nil {
		renewed = v.session.live
		v.session, v.ended = nil, v.session
	}
	if v.mismatch {
		v.ended = nil
	}
	l.vouching.Store(&v)
	return renewed
}

// ErrOtherServer is why a session ends whose server is not the one that stores read.
var ErrOtherServer = errors.New("the stores read from another server or database than the one that announces: " +
	"is a proxy or a switch-over in between?")

// Read notes that a store has read from a server. If the session listens to another
// one, nothing vouches for anything any more.
func (l *Log) Read(server snapshot.Server) {
	v := l.vouching.Load()
	if v.session == nil || v.mismatch || server == 0 {
		return
	}
	if v.session.first.Server() == server {
		l.lastRead.Store(int64(time.Since(began)))
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	changed := *l.vouching.Load()
	if changed.session != nil && changed.session.first.Server() != server {
		changed.mismatch, changed.ended = true, nil
		l.vouching.Store(&changed)
	}
}

var began = time.Now()

// readSince reports whether a store has read from the session's server within d.
func (l *Log) readSince(d time.Duration) bool {
	last := l.lastRead.Load()
	return last != 0 && time.Since(began)-time.Duration(last) < d
}

// Mismatched reports whether a store has read from another server than that of the
// session.
func (l *Log) Mismatched() bool { return l.vouching.Load().mismatch }

// Fault returns why the last session ended, or none began; nil if none was tried.
func (l *Log) Fault() error {
	if err := l.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// Live reports whether there is a session whose lease has not run out at now.
func (l *Log) Live(now clock.Instant) bool {
	v := l.vouching.Load()
	return v.session != nil && !v.mismatch && v.session.known.Age(now) < l.lease
}

// WentLive is closed when a session has been live.
func (l *Log) WentLive() <-chan struct{} { return l.live }

// Covers reports whether every change that a record, read in snap, has not seen was or
// will be announced in the present session.
func (l *Log) Covers(snap snapshot.Snapshot) bool {
	v := l.vouching.Load()
	return v.session != nil && !v.mismatch && snap.Includes(v.session.first)
}

// Silent reports whether the server has not answered the session for d, or cannot be
// connected to. Without a session that was tried for, nothing is known.
func (l *Log) Silent(d time.Duration) bool {
	asked := l.asked.Load()
	return asked != 0 && time.Since(began)-time.Duration(asked) >= d
}

// Vouched reports whether every change that a record with a topic in cell, read in
// snap, has not seen was announced up to less than a lease before now, or a half of
// one if strict.
//
// After the end of a session the records that it vouches for are given up one cell
// after the other, so that not all of them are read again at once.
func (l *Log) Vouched(snap snapshot.Snapshot, cell Cell, now clock.Instant, strict bool) bool {
	v := l.vouching.Load()
	lease := l.lease
	if strict {
		lease /= 2
	}
	if s := v.session; s != nil && !v.mismatch && s.known.Age(now) < lease && snap.Includes(s.first) {
		return true
	}
	if s := v.ended; s != nil && s.known.Age(now) < lease/4+time.Duration(cell)*(lease-lease/4)/cells && snap.Includes(s.first) {
		return true
	}
	return false
}

// Foreign reports whether snap is of another history than the present one.
func (l *Log) Foreign(snap snapshot.Snapshot) bool {
	servers := l.vouching.Load().servers
	if servers == nil || snap.IsZero() {
		return false
	}
	return !slices.Contains(servers, snap.Server())
}
