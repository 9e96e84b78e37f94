package feed

import (
	"slices"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

const (
	capacity   = 65_536 // topics of a kind that have a mark of their own
	maxPerMark = 4      // transactions in a mark before they are folded into a snapshot
)

// marks are the announcements of one kind of topics. They are dropped after one to two
// lives of a record. Records that have not seen them are too old by then to be used.
type marks struct {
	young, old map[uint64]mark
	since      clock.Instant // of young
	all        mark          // for every topic of the kind
}

func newMarks() marks { return marks{young: map[uint64]mark{}} }

// seenBy reports whether s has seen all announced changes of a topic.
func (m *marks) seenBy(s snapshot.Snapshot, id uint64) bool {
	return m.young[id].seenBy(s) && m.old[id].seenBy(s) && m.all.seenBy(s)
}

// has reports whether a change of a topic was announced.
func (m *marks) has(id uint64) bool {
	return !m.young[id].empty() || !m.old[id].empty() || !m.all.empty()
}

// add notes that transaction xid has changed a topic. It returns true if there are too many
// topics, so that xid now counts for all of them.
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

// retract undoes add: the announcement was forged.
func (m *marks) retract(id, xid uint64) {
	for _, generation := range []map[uint64]mark{m.young, m.old} {
		if one, ok := generation[id]; ok {
			one.retract(xid)
			generation[id] = one
		}
	}
	m.all.retract(xid)
}

// forget drops the old generation if the young one is as old as a record may become.
func (m *marks) forget(now clock.Instant, life int64) {
	if int64(m.since.Age(now)) >= life {
		m.old, m.young, m.since = m.young, map[uint64]mark{}, now
	}
}

// A mark has the announced transactions of one topic. Each is kept by itself, so that a
// forged one cannot hide another. When there are many, those that a snapshot of the server
// has seen are replaced by that snapshot: a record that includes it has seen them, too. A
// record that was read between them and the snapshot is read again without need.
type mark struct {
	base *snapshot.Snapshot // nil: none
	xids []uint64           // in the order of announcement
}

func (m mark) seenBy(s snapshot.Snapshot) bool {
	for _, xid := range m.xids {
		if !s.Sees(xid) {
			return false
		}
	}
	return m.base == nil || s.On(0).Includes(*m.base) // on any server of the history
}

func (m mark) empty() bool { return m.base == nil && len(m.xids) == 0 }

// add adds a transaction. latest is the last snapshot of the server.
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

// merge adds the transactions of others.
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
