package feed

// When a record may be used for longer than its age allows: a session receives every
// announcement, and a lease tells up to when that is known.
//
// The argument:
//
//  1. A transaction that changes something leaves a row in the outbox. A call of
//     apikey_announce after its commit announces the change. It looks only at rows of
//     transactions that an earlier snapshot has not seen, one up to which a call that has
//     committed has announced everything. PostgreSQL delivers
//     announcements in the order in which the announcing transactions commit: each of them
//     holds a lock from before its notices are queued until it is visible.
//  2. A session listens, and then takes its first snapshot. A record that includes this
//     snapshot has missed only changes that became visible later. These are announced after
//     the LISTEN, so the session hears of them.
//  3. Several times per lease the session calls apikey_announce: a read. The calls follow
//     each other. When a read that was sent at time T has returned, everything that was
//     committed at T has been announced.
//  4. Then comes a second read. When the session hears of a transaction that the snapshot of
//     the second read has not seen, that announcement was committed after the first read
//     was done. So everything that was committed at T has been delivered before it.
//  5. So all changes up to T are known, and the lease runs to T plus MaxStaleness. It does
//     not matter who made the announcement. Only where nothing is announced, a session
//     sends a beat.
//
// The stamp of a record tells whether it comes from the server that the session listens to.
//
// model_test.go tries all short sequences of events. If any of these conditions is left out,
// it finds an outdated record that is used.

import (
	"errors"
	"slices"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A History identifies tables through the runs of their server. Facts of another history say
// nothing about this one.
type History string

// A session is a period in which every announcement is received.
type session struct {
	server snapshot.Server
	first  snapshot.Snapshot // taken when the connection listened
	known  clock.Instant     // up to this time all changes are known
	live   bool              // it has been renewed
}

// vouching is which sessions vouch for records. It is immutable, and replaced as a whole.
type vouching struct {
	session  *session          // nil: none at present
	ended    *session          // the session before; its lease runs out
	servers  []snapshot.Server // the runs of the present history; nil: there was no session yet
	mismatch bool              // the stores read from other tables than the session
}

// Begin begins a session on a server of a history. first is a snapshot that was asked for at
// a time when the connection was listening. The session vouches for records after the first
// Renew.
func (l *Log) Begin(history History, first snapshot.Snapshot, asked clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := *l.vouching.Load()
	server, present := first.Server(), l.current() // of a period
	if l.history != history || present.server != server {
		began := []*run{newRun(server)}
		if real := l.serverOf(server); real != server && !slices.Contains(v.servers, real) { // for records from before the first session there
			began = []*run{newRun(real), began[0]}
			began[0].ended = asked
		}
		if l.history == history && !slices.Contains(v.servers, server) {
			present.ended = asked
			l.runs = slices.DeleteFunc(l.runs, func(r *run) bool { return r != present && r.ended.Age(asked) > l.life })
			l.runs = append(l.runs, began...)
		} else { // what was announced in another history refutes nothing any more
			l.history, l.runs, v.session, v.ended = history, began, nil, nil
		}
		v.servers = nil
		for _, r := range l.runs {
			v.servers = append(v.servers, r.server)
		}
		l.latest, l.unverified = snapshot.Snapshot{}, nil
		l.newEpochs()
	}
	l.reached(first, asked)
	l.crowded = false
	if v.session != nil {
		v.ended = v.session
	}
	v.session, v.mismatch = &session{server: l.serverOf(server), first: first, known: asked.Add(-l.lease)}, false
	l.vouching.Store(&v)
	l.begun.Store(int64(time.Since(began)))
}

// BegunAfter reports whether a session has begun after t: the server was there then.
func (l *Log) BegunAfter(t time.Time) bool {
	begun := l.begun.Load()
	return begun != 0 && began.Add(time.Duration(begun)).After(t)
}

// Renew notes that everything that was committed at a time is known.
func (l *Log) Renew(known clock.Instant) {
	if l.renew(known) {
		l.goesLive.Do(func() { close(l.live) })
		l.logger.Info("apikey: announcements are heard")
	}
}

// renew reports whether the session has just become live.
func (l *Log) renew(known clock.Instant) (live bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := *l.vouching.Load()
	if v.session == nil || known.Before(v.session.known) {
		return false
	}
	live = !v.session.live
	v.session = &session{v.session.server, v.session.first, known, true}
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

// End ends the session because of err: from now on announcements may be missed. The lease
// runs on. End reports whether the session was live.
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

// ErrOtherServer ends a session if the stores read from other tables.
var ErrOtherServer = errors.New("the stores read from another server, database or schema than the one that announces: " +
	"does Watch have the same URL, with the same search_path? Is a proxy or a switch-over in between?")

// Read notes that a store has read from a server. If the session listens to another one, or for
// other tables, it no longer vouches for records.
func (l *Log) Read(server snapshot.Server) {
	if server != 0 {
		l.readFrom.Store(int64(server))
	}
	v := l.vouching.Load()
	if v.session == nil || v.mismatch || server == 0 {
		return
	}
	if v.session.server == server {
		l.lastRead.Store(int64(time.Since(began)))
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	changed := *l.vouching.Load()
	if changed.session != nil && changed.session.server != server {
		changed.mismatch, changed.ended = true, nil
		l.vouching.Store(&changed)
	}
}

var began = time.Now()

// readSince reports whether a store has read from the session's server in the last d.
func (l *Log) readSince(d time.Duration) bool {
	last := l.lastRead.Load()
	return last != 0 && time.Since(began)-time.Duration(last) < d
}

// Mismatched reports whether a store has read from other tables than the session's.
func (l *Log) Mismatched() bool { return l.vouching.Load().mismatch }

// Fault returns why the last session ended or could not begin, or nil.
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

// WentLive returns a channel that is closed when the first session becomes live.
func (l *Log) WentLive() <-chan struct{} { return l.live }

// Covers reports whether the present session receives every change that snap has not seen.
func (l *Log) Covers(snap snapshot.Snapshot) bool {
	v := l.vouching.Load()
	return v.session != nil && !v.mismatch && snap.Includes(v.session.first)
}

// Covered is like Covers, and counts the session that has ended if there is no present one.
func (l *Log) Covered(snap snapshot.Snapshot) bool {
	v := l.vouching.Load()
	return l.Covers(snap) || v.session == nil && v.ended != nil && snap.Includes(v.ended.first)
}

// Vouched reports whether a session vouches at now for a record in cell that was read in snap:
// all changes that snap has not seen are known, up to less than a lease ago, or half a lease
// if strict.
//
// After a session has ended, records lose this cell by cell, so that they are not all read
// again at the same time.
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

// Foreign reports whether snap is not of the present history. What the stores have read last, while
// there is no session, is not foreign.
func (l *Log) Foreign(snap snapshot.Snapshot) bool {
	v := l.vouching.Load()
	if v.servers == nil || snap.IsZero() || slices.Contains(v.servers, snap.Server()) {
		return false
	}
	return v.session != nil || snap.Server() != snapshot.Server(l.readFrom.Load())
}
