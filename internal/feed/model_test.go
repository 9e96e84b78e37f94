package feed

import (
	"flag"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
)

// A state is a database, a session and one record, small enough to go through every
// order in which things can happen to them. A moment is told by the version that the
// row had then: a record that is vouched for must be no older than the row was at the
// time up to which the session says it knows all changes.
type state struct {
	// The database.
	next    uint64             // transaction id
	last    uint64             // the last one that there is
	running []uint64           // transactions that change the row, and have not committed
	outbox  []uint64           // that have committed, and are not announced
	others  []uint64           // of these, what another session is announcing, and has not committed
	asOf    snapshot.Snapshot  // its snapshot
	place   *snapshot.Snapshot // what it sees was announced; nil: there is none yet
	backlog bool               // there is so much to announce that everything is announced at once
	queue   []notice           // announced, and not delivered to the session
	row     int                // its version: each commit makes the next one

	// The session.
	listens bool
	first   *snapshot.Snapshot // nil: there is no session yet
	reads   *read              // its read, under way on the server
	own     []uint64           // what that announces
	proof   proof
	known   int // all changes up to this version are known; 0: none are
	mark    mark

	// A record, and one on its way from the store.
	record, reading *copied
}

type notice struct {
	xid  uint64
	beat bool // of no change
}

type copied struct {
	version int
	snap    snapshot.Snapshot
}

// A mistake is a condition that is left out, to see that the model notices.
type mistake string

const (
	none          mistake = ""
	noServer      mistake = "the server is not compared"
	noUnseen      mistake = "whatever is heard proves the latest snapshot"
	timeAfterRead mistake = "the time of a read is taken when its answer arrives"
	noFirst       mistake = "a record need not include the first snapshot"
	noRefutation  mistake = "an announced change does not refute"
	noListen      mistake = "the first snapshot is taken before the connection listens"
	noDrain       mistake = "a read does not announce what waits"
	noWait        mistake = "a read does not wait for those who announce"
	noSecond      mistake = "what the snapshot of a read has not seen proves that read"
	noRunning     mistake = "the place forgets which transactions were running"
	noOwn         mistake = "a backlog is announced as of its newest transaction"
)

// moment is the present, as an Instant of the proof.
func (s *state) moment() clock.Instant { return at(time.Duration(s.row)) }

func versionAt(i clock.Instant) int { return int(at(0).Age(at(0))) - int(i.Age(at(0))) }

// snapshot is what the server would return now.
func (s *state) snapshot() snapshot.Snapshot {
	text := fmt.Sprintf("%d:%d:", slices.Min(append(slices.Clone(s.running), s.next)), s.next)
	for i, x := range s.running {
		if i > 0 {
			text += ","
		}
		text += fmt.Sprint(x)
	}
	snap, err := snapshot.Parse(text)
	if err != nil {
		panic(err)
	}
	return snap.On(1)
}

// A move is something that can happen. It reports whether it can in this state.
type move struct {
	name string
	make func(s *state, broken mistake) bool
}

var moves = []move{
	{"a change begins", func(s *state, _ mistake) bool {
		s.running = append(slices.Clone(s.running), s.next)
		s.next++
		return len(s.running) <= 2 && s.next <= s.last+1
	}},
	{"the older change commits", func(s *state, _ mistake) bool { return s.commit(0) }},
	{"the newer change commits", func(s *state, _ mistake) bool { return s.commit(1) }},
	{"somebody sends a beat", func(s *state, _ mistake) bool {
		s.queue = append(slices.Clone(s.queue), notice{s.next, true})
		s.next++
		return s.listens && s.next <= s.last+1
	}},
	{"the session listens", func(s *state, broken mistake) bool {
		if s.listens || broken == noListen && s.first == nil {
			return false
		}
		s.listens, s.queue = true, nil // what was committed before is not delivered
		if broken != noListen {
			s.begin()
		}
		return true
	}},
	{"the session takes its first snapshot", func(s *state, broken mistake) bool {
		if broken != noListen || s.first != nil {
			return false
		}
		s.begin()
		return true
	}},
	{"the session is sent a notice", func(s *state, broken mistake) bool {
		if !s.listens || len(s.queue) == 0 {
			return false
		}
		n := s.queue[0]
		s.queue = s.queue[1:]
		if !n.beat {
			s.mark.add(n.xid, snapshot.Snapshot{})
		}
		reads := s.proof.reads
		known, ok := s.proof.heard(n.xid)
		switch last := len(reads) - 1; {
		case broken == noUnseen && last > 0:
			known, ok = reads[last-1].asked, true
		case broken == noSecond && last >= 0 && !reads[last].snap.Sees(n.xid):
			known, ok = reads[last].asked, true
		}
		if ok {
			s.known = max(s.known, versionAt(known))
		}
		return true
	}},
	{"another session begins to announce", func(s *state, _ mistake) bool {
		if len(s.others) > 0 {
			return false
		}
		s.others, s.asOf = s.take(), s.snapshot()
		return len(s.others) > 0
	}},
	{"and commits", func(s *state, broken mistake) bool {
		if len(s.others) == 0 {
			return false
		}
		s.announce(s.others, s.asOf, broken)
		s.others, s.asOf = nil, snapshot.Snapshot{}
		return s.next <= s.last+1
	}},
	{"the session's read is made", func(s *state, broken mistake) bool {
		if !s.listens || s.reads != nil {
			return false
		}
		s.reads = &read{s.moment(), s.snapshot()}
		if broken != noDrain {
			s.own = s.take()
		}
		return true
	}},
	{"and is done", func(s *state, broken mistake) bool {
		if s.reads == nil || len(s.others) > 0 && broken != noWait && broken != noDrain {
			return false // what the others began later need not be waited for: that leaves out no way
		}
		if len(s.own) > 0 {
			s.announce(s.own, s.reads.snap, broken)
		}
		r := *s.reads // its answer comes before what is announced later
		if broken == timeAfterRead {
			r.asked = s.moment()
		}
		s.proof.reads = slices.Clone(s.proof.reads)
		s.proof.read(r)
		s.reads, s.own = nil, nil
		return s.next <= s.last+1
	}},
	{"a store reads", func(s *state, _ mistake) bool {
		wasReading := s.reading != nil
		s.reading = &copied{s.row, s.snapshot()}
		return !wasReading
	}},
	{"a store reads another server, with the first version", func(s *state, broken mistake) bool {
		wasReading := s.reading != nil
		s.reading = &copied{1, s.snapshot().On(2)} // its transaction ids may well be the same
		if broken == noServer {
			s.reading.snap = s.reading.snap.On(1)
		}
		return !wasReading
	}},
	{"its facts arrive", func(s *state, _ mistake) bool {
		if s.reading == nil {
			return false
		}
		s.record, s.reading = s.reading, nil
		return true
	}},
}

func (s *state) begin() {
	first := s.snapshot()
	s.first = &first
	s.proof = proof{[]read{{s.moment(), first}}}
}

// take takes what is looked at from the outbox: what the place has not seen.
func (s *state) take() (taken []uint64) {
	var left []uint64
	for _, xid := range s.outbox {
		if s.place != nil && s.place.Sees(xid) {
			left = append(left, xid)
		} else {
			taken = append(taken, xid)
		}
	}
	s.outbox = left
	return taken
}

// announce commits the announcement of transactions, by a call that has begun with a snapshot.
func (s *state) announce(xids []uint64, as snapshot.Snapshot, broken mistake) {
	switch {
	case s.backlog && broken == noOwn:
		xids = []uint64{slices.Max(xids)}
	case s.backlog:
		xids = []uint64{s.next}
		s.next++
	}
	s.queue = slices.Clone(s.queue)
	for _, xid := range xids {
		s.queue = append(s.queue, notice{xid, false})
	}
	if broken == noRunning {
		as, _ = snapshot.Parse(fmt.Sprintf("%d:%[1]d:", as.XMax()))
	}
	s.place = &as
}

func (s *state) commit(i int) bool {
	if i >= len(s.running) {
		return false
	}
	s.outbox = append(slices.Clone(s.outbox), s.running[i])
	s.running = slices.Delete(slices.Clone(s.running), i, i+1)
	s.row++
	return true
}

// wrong reports whether a stale record is vouched for.
func (s *state) wrong(broken mistake) bool {
	return s.record != nil && s.first != nil && s.record.version < s.known &&
		(s.record.snap.Includes(*s.first) || broken == noFirst && s.record.snap.Server() == 1) &&
		(s.mark.seenBy(s.record.snap) || broken == noRefutation)
}

// key tells states apart.
func (s *state) key() string {
	b := make([]byte, 0, 256)
	numbers := func(xs ...uint64) {
		for _, x := range xs {
			b = append(b, byte(x)) // all are small
		}
		b = append(b, 0xff)
	}
	snap := func(s snapshot.Snapshot) {
		b = append(append(b, byte(s.Server())), s.String()...)
		b = append(b, 0xff)
	}
	numbers(s.next, uint64(s.row), uint64(s.known))
	for _, xs := range [][]uint64{s.running, s.outbox, s.others, s.own, s.mark.xids} {
		numbers(xs...)
	}
	for _, n := range s.queue {
		b = strconv.AppendBool(append(b, byte(n.xid)), n.beat)
	}
	b = strconv.AppendBool(append(b, 0xfe), s.listens)
	for _, r := range s.proof.reads {
		snap(r.snap)
		numbers(uint64(versionAt(r.asked)))
	}
	b = append(b, 0xfd)
	if s.first != nil {
		snap(*s.first)
	}
	b = append(b, 0xfc)
	if s.reads != nil {
		snap(s.reads.snap)
		numbers(uint64(versionAt(s.reads.asked)))
	}
	snap(s.asOf)
	if s.place != nil {
		snap(*s.place)
	}
	for _, c := range []*copied{s.record, s.reading} {
		b = append(b, 0xfb)
		if c != nil {
			snap(c.snap)
			numbers(uint64(c.version))
		}
	}
	return string(b)
}

// A scene is where a search begins.
type scene struct {
	transactions uint64   // that there are
	backlog      bool     // see state
	moves        []string // that have been made
}

// under is a change that is under way while a newer one is committed.
var under = []string{"a change begins", "a change begins", "the newer change commits"}

// search goes through all that can happen in so many moves, and returns the first way to a
// stale record that is vouched for.
func search(broken mistake, from scene, most int) (way []string, states int) {
	type visit struct {
		state
		way []string
	}
	first := state{next: 10, last: 9 + from.transactions, row: 1, backlog: from.backlog}
	for _, name := range from.moves {
		i := slices.IndexFunc(moves, func(m move) bool { return m.name == name })
		if !moves[i].make(&first, broken) {
			panic(name)
		}
	}
	level, seen := []visit{{state: first}}, map[string]bool{}
	for range most {
		var next []visit
		for _, v := range level {
			for _, m := range moves {
				s := v.state
				if !m.make(&s, broken) {
					continue
				}
				if key := s.key(); seen[key] {
					continue
				} else {
					seen[key] = true
				}
				way := append(v.way[:len(v.way):len(v.way)], m.name)
				if s.wrong(broken) {
					return way, len(seen)
				}
				next = append(next, visit{s, way})
			}
		}
		level = next
	}
	return nil, len(seen)
}

var modelMoves = flag.Int("model.moves", 14, "moves in TestModel, with two transactions; less with more")

// TestModel: whatever happens in whatever order, no stale record is vouched for; and if
// one of the conditions is left out, there is a way to one.
func TestModel(t *testing.T) {
	announced := append(under[:3:3], "the session listens", "another session begins to announce", "and commits")
	for _, c := range []struct {
		scene
		moves int
	}{
		{scene{transactions: 2}, *modelMoves},
		{scene{transactions: 4}, *modelMoves - 6},
		{scene{transactions: 3, moves: announced}, *modelMoves - 4},
		{scene{transactions: 4, backlog: true, moves: under}, *modelMoves - 5},
	} {
		way, states := search(none, c.scene, c.moves)
		if way != nil {
			t.Errorf("a stale record is vouched for: %q", way)
		}
		t.Logf("%d states in up to %d moves from %+v", states, c.moves, c.scene)
	}
	for i, c := range []struct {
		broken mistake
		scene
	}{
		{noServer, scene{transactions: 2}},
		{noUnseen, scene{transactions: 2}},
		{noFirst, scene{transactions: 2}},
		{noRunning, scene{transactions: 3, moves: announced}},
		{noOwn, scene{transactions: 3, backlog: true, moves: under}},
		{timeAfterRead, scene{transactions: 2}},
		{noRefutation, scene{transactions: 2}},
		{noListen, scene{transactions: 2}},
		{noDrain, scene{transactions: 2}},
		{noWait, scene{transactions: 2}},
		{noSecond, scene{transactions: 2}},
	} {
		t.Run(string(c.broken), func(t *testing.T) {
			if i > 4 {
				testservers.Long(t)
			}
			way, states := search(c.broken, c.scene, *modelMoves)
			if way == nil {
				t.Errorf("none of %d states shows it", states)
			}
			t.Logf("%d states, then %q", states, way)
		})
	}
}
