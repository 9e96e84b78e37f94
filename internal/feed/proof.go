package feed

import (
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// maxReads bounds the snapshots that wait for a proof. With a slow network several are
// on their way at once.
const maxReads = 16

// A proof keeps the snapshots that a session has taken, until something is heard that
// shows up to when all changes are known: see lease.go.
type proof struct {
	reads []read // oldest first
}

// A read is a snapshot of the server, and when it was asked for.
type read struct {
	asked clock.Instant
	snap  snapshot.Snapshot
}

// read notes a snapshot.
func (p *proof) read(r read) {
	if len(p.reads) == maxReads {
		p.reads = p.reads[1:]
	}
	p.reads = append(p.reads, r)
}

// heard returns the time up to which all changes are known, since transaction xid was
// announced; false if that tells nothing new.
func (p *proof) heard(xid uint64) (known clock.Instant, ok bool) {
	for i := len(p.reads) - 1; i >= 0; i-- {
		if r := p.reads[i]; !r.snap.Sees(xid) {
			p.reads = p.reads[i+1:]
			return r.asked, true
		}
	}
	return known, false
}
