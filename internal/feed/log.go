// Package feed hears of changes in PostgreSQL, so that records which have not seen a change
// can be told from those that have.
//
// [Log] keeps what was announced: the transactions of each topic (marks.go), and up to when
// all announcements are known (lease.go). [Follow] fills it by LISTEN (follow.go, session.go):
//
//	             LISTEN, first snapshot            a read is proved
//	connecting -------------------------> listening ---------------> live
//	    ^                                     |                        |
//	    |        any fault; try again         |                        |
//	    +-------------------------------------+------------------------+
//
// A live session vouches for records up to the end of its lease, which each proved read
// extends. When the session ends, the lease runs out, and records are used by their age.
package feed

import (
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A Log has what was announced. It is safe for concurrent use.
type Log struct {
	lease    time.Duration
	life     time.Duration
	logger   *slog.Logger
	epochs   [cells]atomic.Uint32
	vouching atomic.Pointer[vouching]
	lastRead atomic.Int64 // when a store last read from the session's server, since began
	readFrom atomic.Int64 // the snapshot.Server that a store last read from
	periods  atomic.Pointer[[]period]
	begun    atomic.Int64  // when a session last began, since began; 0: none has
	live     chan struct{} // closed when a session has been live
	goesLive sync.Once

	mu         sync.RWMutex
	history    History
	runs       []*run            // of the history, oldest first, the present one last
	latest     snapshot.Snapshot // the last one of the session
	unverified []announced       // announcements of transactions that latest had not seen
	crowded    bool              // there was no room for an announcement
	suspects   []suspect

	announcements, unannounced, forged, unknown atomic.Uint64
	fault                                       atomic.Pointer[error]
}

// A run is what was announced to one session. Transaction ids of different runs are not compared: a
// server that has crashed, or was restored from a copy of its disk, uses some again, and while a
// session lasts its server has not crashed.
type run struct {
	server snapshot.Server // of its records: see [Log.Period]
	marks  [kinds]marks
	ended  clock.Instant // when the next one was found; zero: it is the present one
}

func newRun(server snapshot.Server) *run {
	r := &run{server: server}
	for kind := range r.marks {
		r.marks[kind] = newMarks()
	}
	return r
}

// current returns the present run.
func (l *Log) current() *run { return l.runs[len(l.runs)-1] }

// An announced transaction has changed a topic, or all topics of a kind.
type announced struct {
	topic Topic
	all   bool
	xid   uint64
	heard clock.Instant
}

// A suspect is a record that was out of date although nothing had refuted it.
type suspect struct {
	snap   snapshot.Snapshot
	topics []Topic
	found  clock.Instant
}

const (
	maxSuspects   = 1024    // per renewal of the lease; more are not counted
	maxUnverified = 100_000 // announcements between two snapshots of the session
	maxOfOne      = 4096    // of these, for one topic or all of a kind: each is compared with the others
)

// NewLog returns an empty Log without a session. lease is how long records may be used after
// all announcements were known; life is the maximum age of any record. logger logs when
// sessions go live and end and, at level Debug, each announcement once it is in the Log.
func NewLog(lease, life time.Duration, logger *slog.Logger) *Log {
	l := &Log{lease: lease, life: life, logger: logger, live: make(chan struct{}), runs: []*run{newRun(0)}}
	l.vouching.Store(new(vouching))
	l.periods.Store(new([]period))
	for cell := range l.epochs {
		l.epochs[cell].Store(1)
	}
	return l
}

// Announce notes at now that transaction xid has changed topic. If too much is announced, it does
// not: see [Log.Crowded].
func (l *Log) Announce(topic Topic, xid uint64, now clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announcements.Add(1)
	m := &l.current().marks[topic.kind]
	if !l.verify(announced{topic: topic, xid: xid, heard: now}, m.young[topic.id]) {
		return
	}
	m.forget(now, int64(l.life))
	if m.add(topic.id, xid, l.latest) || topic.kind != Key && topic.kind != Plan { // no record has the cell of the others
		l.newEpochs()
		return
	}
	l.epochs[topic.Cell()].Add(1)
}

// AnnounceAll is like Announce, and notes that transaction xid may have changed everything of a kind.
func (l *Log) AnnounceAll(kind Kind, xid uint64, now clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announcements.Add(1)
	all := &l.current().marks[kind].all
	if l.verify(announced{topic: Topic{kind: kind}, all: true, xid: xid, heard: now}, *all) {
		all.add(xid, l.latest)
		l.newEpochs()
	}
}

func (l *Log) newEpochs() {
	for cell := range l.epochs {
		l.epochs[cell].Add(1)
	}
}

// verify keeps a, for the mark m, until a snapshot shows whether there is such a transaction. It
// returns false if there is no room: then a must not be noted, since it could never be retracted.
func (l *Log) verify(a announced, m mark) bool {
	if l.latest.Sees(a.xid) || l.latest.IsZero() {
		return true
	}
	if len(l.unverified) >= maxUnverified || len(m.xids) >= maxOfOne {
		l.crowded = true
		return false
	}
	l.unverified = append(l.unverified, a)
	return true
}

// Reached notes a snapshot of the server, for which the session asked at a time. If the
// snapshot has not seen a transaction that was announced before that time, the announcement
// was forged, since only what is committed is announced: everybody who may connect to the
// database may run NOTIFY.
func (l *Log) Reached(snap snapshot.Snapshot, asked clock.Instant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reached(snap, asked)
}

func (l *Log) reached(snap snapshot.Snapshot, asked clock.Instant) {
	l.latest = snap
	marks := &l.current().marks
	for kind := range marks {
		marks[kind].all.fold(snap)
	}
	kept := l.unverified[:0]
	for _, a := range l.unverified {
		switch {
		case snap.Sees(a.xid):
		case !a.heard.Before(asked):
			kept = append(kept, a)
		case a.all:
			l.forged.Add(1)
			marks[a.topic.kind].all.retract(a.xid)
		default:
			l.forged.Add(1)
			marks[a.topic.kind].retract(a.topic.id, a.xid)
		}
	}
	clear(l.unverified[len(kept):])
	l.unverified = kept
}

// FarAhead reports whether transaction xid is more than n ahead of the last snapshot of the
// session.
func (l *Log) FarAhead(xid, n uint64) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return xid >= l.latest.XMax()+n
}

// Crowded reports whether more was announced since the last snapshot than can be verified. The
// session must end then: what it was told last was not noted.
func (l *Log) Crowded() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.crowded
}

// Epoch returns a number that changes whenever a topic in the cell is announced. It is never
// 0. A result of Refuted holds for as long as the number that was read before it.
func (l *Log) Epoch(cell Cell) uint32 { return l.epochs[cell].Load() }

// Refuted reports whether a change of one of the topics was announced that snap has not seen.
// A zero snapshot, or one of another history, is never refuted.
func (l *Log) Refuted(snap snapshot.Snapshot, topics ...Topic) bool {
	if snap.IsZero() || l.Foreign(snap) {
		return false
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.refuted(snap, topics)
}

func (l *Log) refuted(snap snapshot.Snapshot, topics []Topic) bool {
	servers := l.vouching.Load().servers // nil: none is known yet
	if servers != nil && !slices.Contains(servers, snap.Server()) {
		return false // it is later than all that was heard
	}
	for i := len(l.runs) - 1; i >= 0; i-- {
		r := l.runs[i]
		ofRun := servers == nil || r.server == snap.Server()
		for _, t := range topics {
			if m := &r.marks[t.kind]; ofRun && !m.seenBy(snap, t.id) || !ofRun && m.has(t.id) { // a later run has changed it
				return true
			}
		}
		if ofRun {
			break
		}
	}
	return false
}

// Suspect notes that the store had other facts, at a time, than a record that was read in
// snap and vouched for. If the change is not announced until the lease is renewed to a later
// time, it never will be, and counts as unannounced.
func (l *Log) Suspect(found clock.Instant, snap snapshot.Snapshot, topics ...Topic) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.suspects) < maxSuspects {
		l.suspects = append(l.suspects, suspect{snap, topics, found})
	}
}

// Announcements returns the number of announced changes.
func (l *Log) Announcements() uint64 { return l.announcements.Load() }

// Unannounced returns the number of changes that were found but never announced.
func (l *Log) Unannounced() uint64 { return l.unannounced.Load() }

// Forged returns the number of announcements of transactions that did not exist.
func (l *Log) Forged() uint64 { return l.forged.Load() }

// Unknown returns the number of announcements of a kind or form that this version does not
// know.
func (l *Log) Unknown() uint64 { return l.unknown.Load() }
