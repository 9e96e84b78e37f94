package feed

import (
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// maxReads bounds the reads that wait for a proof. With a slow network several are on
// their way at once.
const maxReads = 24

// A proof keeps the reads that a session has made, until something is heard that shows
// up to when all changes are known: see lease.go.
type proof struct {
	reads []read // oldest first
}

// A read announces what was committed before it, and takes a snapshot. asked is when it
// was sent.
type read struct {
	asked clock.Instant
	snap  snapshot.Snapshot
}

// read notes a read that was answered.
func (p *proof) read(r read) {
	if len(p.reads) == maxReads {
		p.reads = p.reads[1:]
	}
	p.reads = append(p.reads, r)
}

// heard returns the time up to which all changes are known, since transaction xid was
// announced; false if that tells nothing new.
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
