package feed

import (
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// maxReads limits the reads that wait for a proof. With a slow network there are several.
const maxReads = 24

// A proof keeps the reads of a session until an announcement proves up to when all changes
// are known: see lease.go.
type proof struct {
	reads []read // oldest first
}

// A read is a call of apikey_announce: it announces what was committed before, and returns a
// snapshot. asked is when it was sent.
type read struct {
	asked clock.Instant
	snap  snapshot.Snapshot
}

// read adds a read that was answered.
func (p *proof) read(r read) {
	if len(p.reads) == maxReads {
		p.reads = p.reads[1:]
	}
	p.reads = append(p.reads, r)
}

// heard takes an announcement of transaction xid, and returns the time up to which all changes
// are known now. It returns false if the announcement proves nothing new.
func (p *proof) heard(xid uint64) (known clock.Instant, ok bool) {
	for i := len(p.reads) - 1; i > 0; i-- {
		if !p.reads[i].snap.Sees(xid) {
			known = p.reads[i-1].asked
			p.reads = p.reads[i:]
			return known, true
		}
	}
	return known, false
}
