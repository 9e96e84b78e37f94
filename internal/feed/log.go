// Package feed knows what has changed in Postgres since a record was read.
//
// Log is the knowledge: the announced transactions of each subject, and whether
// the announcements are known to be complete. Follow fills it, from LISTEN and
// NOTIFY; another source could.
package feed

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/snapshot"
)

// capacity is the number of subjects whose announcements a Log tells apart.
const capacity = 65_536

// A Log is what has been announced. It is safe for concurrent use.
type Log struct {
	lease time.Duration
	state atomic.Pointer[State]

	mu       sync.RWMutex
	marks    map[string]mark // by subject
	all      mark            // for every subject
	suspects []suspect

	announcements, unannounced atomic.Uint64
	fault                      atomic.Pointer[error]
}

// A mark stands for the announced transactions of one subject. Postgres commits
// transactions that notify one after the other, so whoever sees the last one
// announced sees all before it; the largest is kept in case it ever stops to.
type mark struct{ last, largest uint64 }

func (m mark) with(xid uint64) mark { return mark{xid, max(m.largest, xid)} }

func (m mark) seenBy(s snapshot.Snapshot) bool {
	return m.last == 0 || s.Sees(m.last) && s.Sees(m.largest)
}

// A State is one state of a Log. It is replaced by every announcement, so what
// was found out under a State holds for as long as the Log has the same one.
type State struct{ session *session }

// A session is a time through which every announcement is received.
type session struct {
	start     time.Time
	firstBeat uint64                    // a transaction that was announced when announcements were already received
	renewed   atomic.Pointer[time.Time] // when the last beat that came back was sent
}

// A suspect is a record that was found to be out of date and was not refuted.
type suspect struct {
	subject string
	snap    snapshot.Snapshot
	found   time.Time
}

// maxSuspects bounds the suspects between two beats; more are not counted.
const maxSuspects = 1024

// NewLog returns an empty Log without a session. A session is live for lease
// after the sending of the last beat that came back.
func NewLog(lease time.Duration) *Log {
	l := &Log{lease: lease, marks: map[string]mark{}}
	l.state.Store(new(State))
	return l
}

// Announce notes that transaction xid has changed subject.
func (l *Log) Announce(subject string, xid uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.marks) >= capacity {
		// Too many to tell apart: what has not seen the last of them has to go.
		for _, m := range l.marks {
			l.all.largest = max(l.all.largest, m.largest)
		}
		clear(l.marks)
		l.all = l.all.with(xid)
	} else {
		l.marks[subject] = l.marks[subject].with(xid)
	}
	l.changed()
}

// AnnounceAll notes that transaction xid may have changed any subject.
func (l *Log) AnnounceAll(xid uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = l.all.with(xid)
	l.changed()
}

// changed ends the present State. The caller holds the lock.
func (l *Log) changed() {
	l.announcements.Add(1)
	l.state.Store(&State{l.state.Load().session})
}

// Beat notes that a beat, sent at a time by transaction xid, has come back. The
// first one begins a session that started with the sending.
func (l *Log) Beat(sent time.Time, xid uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.state.Load().session
	if s == nil {
		s = &session{start: sent, firstBeat: xid}
		l.state.Store(&State{s})
	}
	s.renewed.Store(&sent)

	// All that was committed before the beat has been announced by now.
	kept := l.suspects[:0]
	for _, suspect := range l.suspects {
		switch {
		case !suspect.found.Before(sent):
			kept = append(kept, suspect)
		case !l.refuted(suspect.subject, suspect.snap):
			l.unannounced.Add(1)
		}
	}
	l.suspects = kept
}

// End ends the session because of err: from now on announcements may be missed.
func (l *Log) End(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.suspects = nil
	l.fault.Store(&err)
	l.state.Store(new(State))
}

// Fault returns why the last session ended, or none began; nil if none was tried.
func (l *Log) Fault() error {
	if err := l.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// State returns the present state.
func (l *Log) State() *State { return l.state.Load() }

// Refuted reports whether a change of subject has been announced that a record
// read in snap has not seen. A record without a snapshot is never refuted.
func (l *Log) Refuted(subject string, snap snapshot.Snapshot) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.refuted(subject, snap)
}

func (l *Log) refuted(subject string, snap snapshot.Snapshot) bool {
	return !snap.IsZero() && (!l.marks[subject].seenBy(snap) || !l.all.seenBy(snap))
}

// Live reports whether st has a session and its lease has not run out at now.
func (l *Log) Live(st *State, now time.Time) bool {
	return st.session != nil && Age(*st.session.renewed.Load(), now) < l.lease
}

// Covers reports whether every change that a record, read at a time in snap, has
// not seen was or will be announced in the session of st: the record was read
// after the session began, by this clock and by Postgres.
func (st *State) Covers(snap snapshot.Snapshot, readAt time.Time) bool {
	return st.session != nil && !readAt.Before(st.session.start) && snap.Sees(st.session.firstBeat)
}

// Suspect notes at a time that the store has other facts than a record read in
// snap, which was covered and not refuted. If the change is not announced before
// the next beat it never will be, and is counted.
func (l *Log) Suspect(subject string, snap snapshot.Snapshot, found time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.suspects) < maxSuspects {
		l.suspects = append(l.suspects, suspect{subject, snap, found})
	}
}

// Announcements returns the number of announcements.
func (l *Log) Announcements() uint64 { return l.announcements.Load() }

// Unannounced returns the number of changes that were found and not announced.
func (l *Log) Unannounced() uint64 { return l.unannounced.Load() }

// Age is the time from then to now by the monotonic clock or by the wall clock,
// whichever is more: the one stands still while a machine is suspended, the
// other can be set back. A time without monotonic reading, such as another
// machine's, has only the latter.
func Age(then, now time.Time) time.Duration {
	return max(now.Sub(then), time.Duration(now.UnixNano()-then.UnixNano()))
}
