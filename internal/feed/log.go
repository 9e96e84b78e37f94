// Package feed knows what has changed in Postgres since a record was read.
//
// Log is the knowledge: the announced transactions of each topic, and whether the
// announcements are known to be complete. Follow fills it, from LISTEN and NOTIFY;
// another source could.
package feed

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A Kind is a kind of topics.
type Kind uint8

// The kinds of topics: one key, the plan of one organisation, the plans of one tier.
const (
	Key Kind = iota
	Plan
	Tier
	kinds
)

// A Topic is what an announcement is about. Two subjects may share one, which costs
// a needless read and nothing else.
type Topic struct {
	kind Kind
	id   uint64
}

var seed = maphash.MakeSeed()

// KeyTopic returns the topic of a key by the first 8 bytes of its hash, big-endian.
func KeyTopic(id uint64) Topic { return Topic{Key, id} }

// PlanTopic returns the topic of an organisation's plan.
func PlanTopic(orgID string) Topic { return Topic{Plan, maphash.String(seed, orgID)} }

// TierTopic returns the topic of all plans of a tier.
func TierTopic(name string) Topic { return Topic{Tier, maphash.String(seed, name)} }

// Cell returns the number of the cell that a topic is in: see [Log.Epoch].
func (t Topic) Cell() Cell { return Cell(t.id % cells) }

// A Cell is one of some thousand groups of topics.
type Cell uint16

const (
	cells    = 4096
	capacity = 65_536 // topics of a kind whose announcements a Log tells apart
)

// A Log is what has been announced. It is safe for concurrent use.
type Log struct {
	lease   time.Duration
	life    time.Duration
	session atomic.Pointer[Session]
	epochs  [cells]atomic.Uint32

	mu       sync.RWMutex
	marks    [kinds]marks
	suspects []suspect

	announcements, unannounced atomic.Uint64
	fault                      atomic.Pointer[error]
}

// marks are the announcements of one kind. They are dropped after one to two lives
// of a record: what is older than they are is not used any more, and what is younger
// has seen them.
type marks struct {
	young, old map[uint64]mark
	since      clock.Instant // of young
	all        mark          // for every topic of the kind
}

func (m *marks) seenBy(s snapshot.Snapshot, id uint64) bool {
	return m.young[id].seenBy(s) && m.old[id].seenBy(s) && m.all.seenBy(s)
}

// A mark stands for the announced transactions of one topic. Postgres commits
// transactions that notify one after the other, so whoever sees the last one
// announced sees all before it; the largest is kept in case it ever stops to.
type mark struct{ last, largest uint64 }

func (m mark) with(xid uint64) mark { return mark{xid, max(m.largest, xid)} }

func (m mark) seenBy(s snapshot.Snapshot) bool {
	return m.last == 0 || s.Sees(m.last) && s.Sees(m.largest)
}

// A Session is a time through which every announcement is received.
type Session struct {
	start     clock.Instant
	firstBeat uint64                        // a transaction that was announced when announcements were already received
	renewed   atomic.Pointer[clock.Instant] // when the last beat that came back was sent
}

// A suspect is a record that was found to be out of date and was not refuted.
type suspect struct {
	snap   snapshot.Snapshot
	topics []Topic
	found  clock.Instant
}

// maxSuspects bounds the suspects between two beats; more are not counted.
const maxSuspects = 1024

// NewLog returns an empty Log without a session. A session is live for lease after
// the sending of the last beat that came back. No record is used for longer than
// life.
func NewLog(lease, life time.Duration) *Log {
	l := &Log{lease: lease, life: life}
	for kind := range l.marks {
		l.marks[kind].young = map[uint64]mark{}
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
	m := &l.marks[topic.kind]
	if m.since.Age(now) >= l.life {
		m.old, m.young, m.since = m.young, map[uint64]mark{}, now
	}
	if len(m.young) < capacity {
		m.young[topic.id] = m.young[topic.id].with(xid)
	} else {
		// Too many to tell apart: what has not seen the last of them has to go.
		for _, other := range m.young {
			m.all.largest = max(m.all.largest, other.largest)
		}
		clear(m.young)
		l.announceAll(topic.kind, xid)
	}
	l.announcements.Add(1)
	if topic.kind == Tier { // no record has that for its cell
		l.newEpochs()
		return
	}
	l.epochs[topic.Cell()].Add(1)
}

// AnnounceAll notes that transaction xid may have changed everything of a kind.
func (l *Log) AnnounceAll(kind Kind, xid uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.announcements.Add(1)
	l.announceAll(kind, xid)
}

func (l *Log) announceAll(kind Kind, xid uint64) {
	l.marks[kind].all = l.marks[kind].all.with(xid)
	l.newEpochs()
}

func (l *Log) newEpochs() {
	for cell := range l.epochs {
		l.epochs[cell].Add(1)
	}
}

// Epoch returns a number, never 0, that changes whenever something is announced that
// concerns a topic in the cell. What Refuted reported holds as long as the number
// that was read before stays the same.
func (l *Log) Epoch(cell Cell) uint32 { return l.epochs[cell].Load() }

// Refuted reports whether a change of one of the topics has been announced that a
// record read in snap has not seen. A record without a snapshot is never refuted.
func (l *Log) Refuted(snap snapshot.Snapshot, topics ...Topic) bool {
	if snap.IsZero() {
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

// Beat notes that a beat, sent at a time by transaction xid, has come back. The
// first one begins a session that started with the sending.
func (l *Log) Beat(sent clock.Instant, xid uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.session.Load()
	if s == nil {
		s = &Session{start: sent, firstBeat: xid}
		s.renewed.Store(&sent)
		l.session.Store(s)
	}
	s.renewed.Store(&sent)

	// All that was committed before the beat has been announced by now.
	kept := l.suspects[:0]
	for _, suspect := range l.suspects {
		switch {
		case !suspect.found.Before(sent):
			kept = append(kept, suspect)
		case !l.refuted(suspect.snap, suspect.topics):
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
	l.session.Store(nil)
}

// Fault returns why the last session ended, or none began; nil if none was tried.
func (l *Log) Fault() error {
	if err := l.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// Session returns the present session, or nil.
func (l *Log) Session() *Session { return l.session.Load() }

// Live reports whether there is a session whose lease has not run out at now.
func (l *Log) Live(now clock.Instant) bool {
	s := l.session.Load()
	return s != nil && s.renewed.Load().Age(now) < l.lease
}

// Covers reports whether every change that a record, read at a time in snap, has
// not seen was or will be announced in the present session: the record was read
// after the session began, by this clock and by Postgres.
func (l *Log) Covers(snap snapshot.Snapshot, readAt clock.Instant) bool {
	s := l.session.Load()
	return s != nil && !readAt.Before(s.start) && snap.Sees(s.firstBeat)
}

// Suspect notes that at a time the store had other facts than a record read in snap,
// which was covered and not refuted. If the change is not announced before the next
// beat it never will be, and is counted.
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
