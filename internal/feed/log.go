// Package feed knows what has changed in Postgres since a record was read.
//
// Log is the knowledge: the announced transactions of each topic (marks.go), and
// until when the announcements are known to be complete (lease.go). Follow fills it,
// from LISTEN and NOTIFY (follow.go, session.go).
package feed

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A Log is what has been announced. It is safe for concurrent use.
type Log struct {
	lease    time.Duration
	life     time.Duration
	logger   *slog.Logger
	epochs   [cells]atomic.Uint32
	vouching atomic.Pointer[vouching]
	asked    atomic.Int64  // when the session asked what is not answered yet, since began; 0: all is answered
	lastRead atomic.Int64  // when a store last read from the session's server, since began
	live     chan struct{} // closed when a session has been live
	goesLive sync.Once

	mu         sync.RWMutex
	history    History
	marks      [kinds]marks
	latest     snapshot.Snapshot // taken by the session
	unverified []announced       // whose transactions latest had not reached
	suspects   []suspect

	announcements, unannounced, forged atomic.Uint64
	fault                              atomic.Pointer[error]
}

// An announced transaction is one of a topic, or of all topics of its kind.
type announced struct {
	topic Topic
	all   bool
	xid   uint64
	heard clock.Instant
}

// A suspect is a record that was found to be out of date and was not refuted.
type suspect struct {
	snap   snapshot.Snapshot
	topics []Topic
	found  clock.Instant
}

const (
	maxSuspects   = 1024    // until the lease is renewed; more are not counted
	maxUnverified = 100_000 // announcements between two snapshots of the session
)

// NewLog returns an empty Log without a session. What was known to be complete at a
// time is known for lease after it. No record is used for longer than life.
// logger is told of sessions that begin and end, and at level Debug of each announcement
// that Follow has entered.
func NewLog(lease, life time.Duration, logger *slog.Logger) *Log {
	l := &Log{lease: lease, life: life, logger: logger, live: make(chan struct{})}
	l.vouching.Store(new(vouching))
	for kind := range l.marks {
		l.marks[kind] = newMarks()
	}
	for cell := range l.epochs {
		l.epochs[cell].Store(1)
	}
	return l
}

// Announce notes at now that transaction xid has changed what is under topic.
func (l *Log) Announce(topic Topic, xid uint64, now clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announcements.Add(1)
	l.verify(announced{topic: topic, xid: xid, heard: now})
	m := &l.marks[topic.kind]
	m.forget(now, int64(l.life))
	if m.add(topic.id, xid, l.latest) || topic.kind == Tier { // no record has that for its cell
		l.newEpochs()
		return
	}
	l.epochs[topic.Cell()].Add(1)
}

// AnnounceAll notes that transaction xid may have changed everything of a kind.
func (l *Log) AnnounceAll(kind Kind, xid uint64, now clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announcements.Add(1)
	l.verify(announced{topic: Topic{kind: kind}, all: true, xid: xid, heard: now})
	l.marks[kind].all.add(xid, l.latest)
	l.newEpochs()
}

func (l *Log) newEpochs() {
	for cell := range l.epochs {
		l.epochs[cell].Add(1)
	}
}

// verify keeps a in mind until a snapshot tells whether there is such a transaction.
func (l *Log) verify(a announced) {
	if a.xid >= l.latest.XMax() && !l.latest.IsZero() && len(l.unverified) < maxUnverified {
		l.unverified = append(l.unverified, a)
	}
}

// Reached notes that the session took a snapshot of the server, for which it asked at a
// time. What was announced before, of transactions that the server has not reached yet,
// is false: anybody who may connect to the database may announce anything.
func (l *Log) Reached(snap snapshot.Snapshot, asked clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reached(snap, asked)
}

func (l *Log) reached(snap snapshot.Snapshot, asked clock.Instant) {
	l.latest = snap
	for kind := range l.marks {
		l.marks[kind].all.fold(snap)
	}
	kept := l.unverified[:0]
	for _, a := range l.unverified {
		switch {
		case a.xid < snap.XMax():
		case !a.heard.Before(asked):
			kept = append(kept, a)
		case a.all:
			l.forged.Add(1)
			l.marks[a.topic.kind].all.retract(a.xid)
		default:
			l.forged.Add(1)
			l.marks[a.topic.kind].retract(a.topic.id, a.xid)
		}
	}
	clear(l.unverified[len(kept):])
	l.unverified = kept
}

// FarAhead reports whether transaction xid is more than n ahead of those that the
// server had reached when the session last asked.
func (l *Log) FarAhead(xid, n uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return xid >= l.latest.XMax()+n
}

// Crowded reports whether more was announced between two snapshots than can be
// verified.
func (l *Log) Crowded() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return len(l.unverified) >= maxUnverified
}

// Epoch returns a number, never 0, that changes whenever something is announced that
// concerns a topic in the cell. What Refuted reported holds as long as the number
// that was read before stays the same.
func (l *Log) Epoch(cell Cell) uint32 { return l.epochs[cell].Load() }

// Refuted reports whether a change of one of the topics has been announced that a
// record read in snap has not seen. A record without a snapshot, or of another
// history, is never refuted.
func (l *Log) Refuted(snap snapshot.Snapshot, topics ...Topic) bool {
	if snap.IsZero() || l.Foreign(snap) {
		return false
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.refuted(snap, topics)
}

func (l *Log) refuted(snap snapshot.Snapshot, topics []Topic) bool {
	for _, t := range topics {
		if !l.marks[t.kind].seenBy(snap, t.id) {
			return true
		}
	}
	return false
}

// Suspect notes that at a time the store had other facts than a record read in snap,
// which was vouched for. If the change is not announced before the lease is renewed to
// a later time it never will be, and is counted.
func (l *Log) Suspect(found clock.Instant, snap snapshot.Snapshot, topics ...Topic) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.suspects) < maxSuspects {
		l.suspects = append(l.suspects, suspect{snap, topics, found})
	}
}

// Announcements returns the number of announcements.
func (l *Log) Announcements() uint64 { return l.announcements.Load() }

// Unannounced returns the number of changes that were found and not announced.
func (l *Log) Unannounced() uint64 { return l.unannounced.Load() }

// Forged returns the number of announcements of transactions that the server had not
// reached.
func (l *Log) Forged() uint64 { return l.forged.Load() }
