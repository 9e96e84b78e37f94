package feed

import (
	"slices"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

const (
	capacity   = 65_536 // topics of a kind whose announcements are told apart
	maxPerMark = 4      // transactions of one topic that are, as far as it can be helped
)

// marks are the announcements of one kind. They are dropped after one to two lives
// of a record: what is older than they are is not used any more, and what is younger
// has seen them.
type marks struct {
	young, old map[uint64]mark
	since      clock.Instant // of young
	all        mark          // for every topic of the kind
}

func newMarks() marks { return marks{young: map[uint64]mark{}} }

// seenBy reports whether s has seen all that was announced under a topic.
func (m *marks) seenBy(s snapshot.Snapshot, id uint64) bool {
	return m.young[id].seenBy(s) && m.old[id].seenBy(s) && m.all.seenBy(s)
}

// add notes that transaction xid was announced under a topic. It reports whether there
// were too many topics, and xid now stands for all of them.
func (m *marks) add(id, xid uint64, latest snapshot.Snapshot) (overflow bool) {
	if _, known := m.young[id]; !known && len(m.young) >= capacity {
		m.all.merge(m.young)
		clear(m.young)
		m.all.add(xid, latest)
		return true
	}
	one := m.young[id]
	one.add(xid, latest)
	m.young[id] = one
	return false
}

// retract takes back what add noted: the announcement was false.
func (m *marks) retract(id, xid uint64) {
	for _, generation := range []map[uint64]mark{m.young, m.old} {
		if one, ok := generation[id]; ok {
			one.retract(xid)
			generation[id] = one
		}
	}
	m.all.retract(xid)
}

// forget begins a new generation if the present one has lasted for a life.
func (m *marks) forget(now clock.Instant, life int64) {
	if int64(m.since.Age(now)) >= life {
		m.old, m.young, m.since = m.young, map[uint64]mark{}, now
	}
}

// A mark stands for the announced transactions of one topic. Each is kept, since one
// that was announced by somebody who made it up must not hide another, until there
// are many: then those that a snapshot of the server has seen are kept as that
// snapshot. A record that includes it has seen them too; one that was read between
// them and the snapshot is read once more for nothing.
type mark struct {
	base *snapshot.Snapshot // nil: none
	xids []uint64           // in the order of their announcements
}

func (m mark) seenBy(s snapshot.Snapshot) bool {
	for _, xid := range m.xids {
		if !s.Sees(xid) {
			return false
		}
	}
	return m.base == nil || s.On(0).Includes(*m.base) // of whatever server of the history
}

// add adds a transaction. latest is the latest snapshot that was taken on the server.
func (m *mark) add(xid uint64, latest snapshot.Snapshot) {
	if slices.Contains(m.xids, xid) {
		return
	}
	m.xids = append(m.xids[:len(m.xids):len(m.xids)], xid)
	m.fold(latest)
}

func (m *mark) fold(latest snapshot.Snapshot) {
	if len(m.xids) <= maxPerMark || !slices.ContainsFunc(m.xids, latest.Sees) {
		return
	}
	m.xids = slices.DeleteFunc(slices.Clone(m.xids), latest.Sees)
	latest = latest.On(0)
	m.base = &latest
}

// merge adds those of others.
func (m *mark) merge(others map[uint64]mark) {
	xids := slices.Clone(m.xids)
	for _, other := range others {
		xids = append(xids, other.xids...)
		if other.base != nil && (m.base == nil || other.base.Includes(*m.base)) {
			m.base = other.base
		}
	}
	slices.Sort(xids)
	m.xids = slices.Compact(xids)
}

func (m *mark) retract(xid uint64) {
	m.xids = slices.DeleteFunc(slices.Clone(m.xids), func(x uint64) bool { return x == xid })
}
