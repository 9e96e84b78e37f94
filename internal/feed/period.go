package feed

import (
	"math/rand/v2"
	"slices"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// A period is the time of a session, and what follows until the next one. A server that crashes and
// recovers without its postmaster has the same start, and uses transaction ids again. But no session
// survives that: so the records of each period have a server of their own, which the others do not
// have, and sessions of one server are told apart like those of several.
type period struct {
	id     snapshot.Server // of the records
	server snapshot.Server
	began  clock.Instant
}

// Period returns the server that the stamp of a record is to have which was read from a server, by a
// statement that was sent at a time: that of the session which had begun then. Before all sessions it
// is the server itself.
func (l *Log) Period(server snapshot.Server, sent clock.Instant) snapshot.Server {
	for _, p := range slices.Backward(*l.periods.Load()) {
		if p.server == server && !sent.Before(p.began) {
			return p.id
		}
	}
	return server
}

// newPeriod begins a period.
func (l *Log) newPeriod(server snapshot.Server, began clock.Instant) snapshot.Server {
	l.mu.Lock()
	defer l.mu.Unlock()
	periods := *l.periods.Load()
	for len(periods) > 1 && periods[1].began.Age(began) > l.life { // the first is over since then
		periods = periods[1:]
	}
	p := period{snapshot.Server(rand.Int64()), server, began}
	periods = append(periods[:len(periods):len(periods)], p)
	l.periods.Store(&periods)
	return p.id
}

// serverOf is the inverse of Period.
func (l *Log) serverOf(id snapshot.Server) snapshot.Server {
	for _, p := range *l.periods.Load() {
		if p.id == id {
			return p.server
		}
	}
	return id
}
