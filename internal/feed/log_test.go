package feed

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// seen is a snapshot that has seen all transactions before x and none from x on.
func seen(t testing.TB, x uint64) snapshot.Snapshot {
	t.Helper()
	s, err := snapshot.Parse(fmt.Sprintf("%d:%d:", x, x))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// at is a moment of the tests.
func at(d time.Duration) clock.Instant { return clock.At(start.Add(d)) }

var start = time.Now()

func newLog() *Log { return NewLog(10*time.Second, time.Hour, slog.New(slog.DiscardHandler)) }

func TestAnnounce(t *testing.T) {
	a, b := KeyTopic(1<<40+7), KeyTopic(2)
	for name, c := range map[string]struct {
		announce func(*Log)
		a, b     bool // is refuted
		plan     bool
	}{
		"a key":     {announce: func(l *Log) { l.Announce(a, 10, at(0)) }, a: true},
		"all keys":  {announce: func(l *Log) { l.AnnounceAll(Key, 10, at(0)) }, a: true, b: true},
		"a plan":    {announce: func(l *Log) { l.Announce(PlanTopic("org"), 10, at(0)) }, plan: true},
		"a tier":    {announce: func(l *Log) { l.Announce(TierTopic("gold"), 10, at(0)) }, plan: true},
		"all plans": {announce: func(l *Log) { l.AnnounceAll(Plan, 10, at(0)) }, plan: true},
		"others": {announce: func(l *Log) {
			l.Announce(PlanTopic("gold"), 10, at(0))
			l.Announce(TierTopic("org"), 10, at(0))
			l.Announce(KeyTopic(7), 10, at(0))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLog()
			before := map[Topic]uint32{}
			topics := []Topic{a, b, PlanTopic("org")}
			for _, topic := range topics {
				before[topic] = l.Epoch(topic.Cell())
			}
			c.announce(l)
			plan := []Topic{PlanTopic("org"), TierTopic("gold")}
			for _, record := range []struct {
				topics []Topic
				want   bool
			}{{[]Topic{a}, c.a}, {[]Topic{b}, c.b}, {plan, c.plan}} {
				topics := record.topics
				if got := l.Refuted(seen(t, 10), topics...); got != record.want {
					t.Errorf("%v is refuted: %v", topics, got)
				}
				if l.Refuted(seen(t, 11), topics...) || l.Refuted(snapshot.Snapshot{}, topics...) {
					t.Errorf("%v is refuted although it has seen the change, or has no stamp", topics)
				}
				if record.want && l.Epoch(topics[0].Cell()) == before[topics[0]] {
					t.Errorf("the epoch of %v does not end", topics)
				}
			}
			if l.Announcements() == 0 {
				t.Error("not counted")
			}
		})
	}
}

// TestOthersCostNothing: an announcement ends the epoch of few other topics.
func TestOthersCostNothing(t *testing.T) {
	l := newLog()
	var before [cells]uint32
	for cell := range before {
		before[cell] = l.Epoch(Cell(cell))
	}
	l.Announce(PlanTopic("org"), 10, at(0))
	ended := 0
	for cell := range before {
		if l.Epoch(Cell(cell)) != before[cell] {
			ended++
		}
	}
	if ended != 1 {
		t.Errorf("%d of %d epochs end, want 1", ended, cells)
	}
}

// TestOverflow: more topics than a log tells apart refute all of their kind that has
// not seen them all, and nothing is forgotten.
func TestOverflow(t *testing.T) {
	for name, latest := range map[string]uint64{"no snapshot yet": 0, "a snapshot before": 5, "in between": 40_000, "after": 2_000_000} {
		t.Run(name, func(t *testing.T) {
			l := newLog()
			if latest > 0 {
				l.Begin("history", seen(t, latest), at(0))
			}
			l.Announce(KeyTopic(1<<60), 1_000_000, at(0))
			for i := range uint64(capacity - 1) {
				l.Announce(KeyTopic(i), 10+i, at(0))
			}
			if l.Refuted(seen(t, 1), KeyTopic(1<<61)) {
				t.Fatal("a full log refutes what was not announced")
			}
			epoch := l.Epoch(77)
			l.Announce(KeyTopic(1<<62), 500_000, at(0))
			if n := len(l.current().marks[Key].young); n > capacity {
				t.Errorf("%d topics, want %d at most", n, capacity)
			}
			if l.Epoch(77) == epoch {
				t.Error("the other epochs do not end")
			}
			for _, id := range []uint64{1 << 60, 0, 1 << 62, 1 << 61} {
				if !l.Refuted(seen(t, 1_000_000), KeyTopic(id)) && latest < 1_000_000 {
					t.Errorf("%d: not refuted although one is not seen", id)
				}
				if l.Refuted(seen(t, max(latest, 1_000_001)), KeyTopic(id)) {
					t.Errorf("%d: refuted although all are seen", id)
				}
			}
			if l.Refuted(seen(t, 1), PlanTopic("org")) {
				t.Error("too many keys refute plans")
			}
		})
	}
}

// TestForgets: what is older than every record is forgotten, and nothing before.
func TestForgets(t *testing.T) {
	l := NewLog(time.Second, time.Hour, slog.New(slog.DiscardHandler))
	early := KeyTopic(1)
	l.Announce(early, 10, at(0))
	for i := range uint64(600) { // ten hours
		now := time.Duration(i) * time.Minute
		l.Announce(KeyTopic(1000+i), 20+i, at(now))
		if now < time.Hour && !l.Refuted(seen(t, 5), early) {
			t.Fatalf("forgotten after %v, while there may be records that have not seen it", now)
		}
		if now > 2*time.Hour && l.Refuted(seen(t, 5), early) {
			t.Fatalf("still there after %v", now)
		}
		if n := len(l.current().marks[Key].young) + len(l.current().marks[Key].old); n > 121 {
			t.Fatalf("%d topics after %v", n, now)
		}
	}
}

// TestManyOfOne: a topic that changes over and over is refuted by exactly what has not
// seen all of it, and takes a bounded place.
func TestManyOfOne(t *testing.T) {
	l := newLog()
	topic := KeyTopic(1)
	l.Begin("history", seen(t, 100), at(0))
	for xid := uint64(100); xid < 2000; xid++ {
		l.Announce(topic, xid, at(0))
		if l.Refuted(seen(t, xid+1), topic) || !l.Refuted(seen(t, xid), topic) {
			t.Fatalf("after %d: refuted, or not, by the wrong snapshots", xid)
		}
		if xid%10 == 0 {
			l.Reached(seen(t, xid), at(0))
		}
		if n := len(l.current().marks[Key].young[1].xids); n > maxPerMark+11 {
			t.Fatalf("%d transactions are kept", n)
		}
	}
	// A long transaction that runs through all of it, and holds xmin back, changes nothing.
	snap, err := snapshot.Parse("50:2000:50")
	if err != nil {
		t.Fatal(err)
	}
	l.Reached(snap, at(time.Second))
	for xid := uint64(2000); xid < 2010; xid++ {
		l.Announce(topic, xid, at(time.Second))
	}
	if snap, err = snapshot.Parse("50:2010:50"); err != nil || l.Refuted(snap, topic) {
		t.Errorf("a record that has seen all is refuted while an old transaction runs: %v", err)
	}
}

// TestForged: what somebody makes up costs reads, and is gone with the next snapshot of
// the server. It does not hide what is real.
func TestForged(t *testing.T) {
	l := newLog()
	topic, other := KeyTopic(1), KeyTopic(2)
	l.Begin("history", seen(t, 100), at(0))
	l.Announce(topic, 100, at(time.Second)) // real
	for _, xid := range []uint64{1 << 63, 1<<64 - 1, 5, 6, 7, 8, 9} {
		l.Announce(topic, xid, at(time.Second))
		l.Announce(other, xid, at(time.Second))
		l.Announce(TierTopic("gold"), xid, at(time.Second))
		l.AnnounceAll(Plan, xid, at(time.Second))
	}
	if !l.FarAhead(1<<63, 1<<20) || l.FarAhead(101, 1<<20) {
		t.Error("what is far ahead is not told from what is not")
	}
	if !l.Refuted(seen(t, 110), other) {
		t.Error("what cannot be told from a change does not refute")
	}
	l.Reached(seen(t, 120), at(time.Second/2)) // asked for before
	if l.Forged() != 0 || !l.Refuted(seen(t, 110), other) {
		t.Error("a snapshot from before tells what is false")
	}
	l.Reached(seen(t, 120), at(2*time.Second))
	if n := l.Forged(); n != 8 {
		t.Errorf("%d are found to be false, want 8", n)
	}
	for _, topics := range [][]Topic{{other}, {PlanTopic("org"), TierTopic("gold")}} {
		if l.Refuted(seen(t, 110), topics...) {
			t.Errorf("%v is refuted by what is false", topics)
		}
	}
	if !l.Refuted(seen(t, 100), topic) || l.Refuted(seen(t, 101), topic) {
		t.Error("what is false has hidden what is real")
	}
}

// TestForgedOverflow: what is forged is dropped, too, when there are too many topics to tell apart.
func TestForgedOverflow(t *testing.T) {
	l := newLog()
	l.Begin("history", seen(t, 100), at(0))
	for i := range uint64(capacity) {
		l.Announce(KeyTopic(i+1), 1<<40, at(time.Second))
	}
	l.Announce(KeyTopic(1<<60), 1<<41, at(time.Second))
	l.Reached(seen(t, 120), at(2*time.Second))
	if l.Refuted(seen(t, 110), KeyTopic(1<<61)) {
		t.Errorf("everything is refuted by what is false, of which %d were found", l.Forged())
	}
}

// TestForgedInProgress: a transaction that is announced before it is committed is forged, too. It
// would refute every record for as long as somebody leaves it open.
func TestForgedInProgress(t *testing.T) {
	l := newLog()
	running, err := snapshot.Parse("50:100:50,60")
	if err != nil {
		t.Fatal(err)
	}
	l.Begin("history", running, at(0))
	l.AnnounceAll(Key, 50, at(time.Second)) // open
	l.Announce(KeyTopic(1), 60, at(time.Second))
	later, err := snapshot.Parse("50:110:50")
	if err != nil {
		t.Fatal(err)
	}
	if !l.Refuted(later, KeyTopic(2)) {
		t.Error("what cannot be told from a change does not refute")
	}
	l.Reached(later, at(2*time.Second))
	if n := l.Forged(); n != 1 || l.Refuted(later, KeyTopic(2)) {
		t.Errorf("%d are found to be false, and a transaction that is open refutes", n)
	}
	if !l.Refuted(running, KeyTopic(1)) {
		t.Error("what is real is forgotten")
	}
}

// TestForgedBeforeTheEnd: it does not help to end the session, or to make it end.
func TestForgedBeforeTheEnd(t *testing.T) {
	l := newLog()
	l.Begin("history", seen(t, 100), at(0))
	l.Announce(KeyTopic(1), 1<<63, at(time.Second))
	l.Announce(KeyTopic(2), 101, at(time.Second)) // real
	l.End(errors.New("broken"))
	l.Begin("history", seen(t, 102), at(2*time.Second))
	if n := l.Forged(); n != 1 || l.Refuted(seen(t, 102), KeyTopic(1)) {
		t.Errorf("%d are found to be false, and what is false refutes", n)
	}
	if !l.Refuted(seen(t, 101), KeyTopic(2)) {
		t.Error("what is real is forgotten")
	}
}

func TestLease(t *testing.T) {
	l := newLog()
	if l.Live(at(0)) || l.Vouched(seen(t, 100), 0, at(0), false) {
		t.Error("without a session the log is live, or vouches")
	}
	l.Begin("history", seen(t, 51), at(0))
	if l.Live(at(0)) || l.Vouched(seen(t, 100), 0, at(0), false) {
		t.Error("before anything is heard the log is live, or vouches")
	}
	l.Renew(at(0))
	if !l.Live(at(10*time.Second-1)) || l.Live(at(10*time.Second)) {
		t.Error("the lease does not last from the time up to which all is known")
	}
	l.Renew(at(5 * time.Second))
	l.Renew(at(3 * time.Second)) // late
	for now, want := range map[time.Duration][2]bool{
		10*time.Second - 1: {true, true}, 10 * time.Second: {true, false}, 15*time.Second - 1: {true, false}, 15 * time.Second: {false, false},
	} {
		for i, strict := range []bool{false, true} {
			if got := l.Vouched(seen(t, 51), 77, at(now), strict); got != want[i] {
				t.Errorf("at %v, strict %v: vouched %v", now, strict, got)
			}
		}
	}
	if l.Vouched(seen(t, 50), 0, at(0), false) || l.Vouched(seen(t, 60).On(7), 0, at(0), false) || l.Vouched(snapshot.Snapshot{}, 0, at(0), false) {
		t.Error("it vouches for a record from before the session, of another server, or without a stamp")
	}
}

// TestEnd: what was known when a session ended is known until its lease runs out. The
// records are given up bit by bit.
func TestEnd(t *testing.T) {
	l := newLog()
	l.Begin("history", seen(t, 51), at(0))
	l.Renew(at(0))
	broken := errors.New("broken")
	l.End(broken)
	l.End(broken) // as when the next one cannot be begun
	if l.Live(at(0)) || !errors.Is(l.Fault(), broken) {
		t.Errorf("after the end: live %v, fault %v", l.Live(at(0)), l.Fault())
	}
	given := func(now time.Duration) (n int) {
		for cell := range Cell(cells) {
			if !l.Vouched(seen(t, 60), cell, at(now), false) {
				n++
			}
		}
		return n
	}
	if n := given(2*time.Second + 499*time.Millisecond); n != 0 {
		t.Errorf("%d cells are given up at once", n)
	}
	for second := 3; second < 10; second++ {
		if n := given(time.Duration(second)*time.Second) - given(time.Duration(second-1)*time.Second); n > cells/7 {
			t.Errorf("%d of %d cells are given up in one second", n, cells)
		}
	}
	if n := given(10 * time.Second); n != cells {
		t.Errorf("%d of %d cells are given up when the lease has run out", n, cells)
	}
	l.Begin("history", seen(t, 70), at(3*time.Second))
	l.Renew(at(3 * time.Second))
	if !l.Vouched(seen(t, 60), cells-1, at(4*time.Second), false) || !l.Vouched(seen(t, 70), 0, at(4*time.Second), false) {
		t.Error("the new session ends the lease of the old one, or does not vouch for its own records")
	}
	if l.Vouched(seen(t, 60), cells-1, at(10*time.Second), false) {
		t.Error("the new session vouches for records from before it")
	}
}

// TestHistories: marks and records of another history mean nothing in this one.
func TestHistories(t *testing.T) {
	l := newLog()
	topic := KeyTopic(1)
	old, restarted, other := seen(t, 1000).On(1), seen(t, 1100).On(2), seen(t, 50).On(3)
	if l.Foreign(old) {
		t.Error("foreign before any session")
	}
	l.Begin("a", old, at(0))
	l.Renew(at(0))
	for xid := range uint64(10) { // so many that a snapshot stands for some
		l.Announce(topic, 991+xid, at(0))
	}
	l.End(nil)
	l.Begin("a", restarted, at(time.Second)) // the same database, started again
	if !l.Refuted(seen(t, 1000).On(1), topic) || l.Refuted(restarted, topic) || l.Foreign(old) || l.Foreign(restarted) {
		t.Error("what was announced before a restart is lost")
	}
	l.Announce(topic, 993, at(time.Second)) // an id that was given out before
	if !l.Refuted(seen(t, 1001).On(1), topic) || !l.Refuted(seen(t, 990).On(2), topic) || l.Refuted(seen(t, 994).On(2), topic) {
		t.Error("an announcement of this run does not refute what was read in the last, or refutes who has seen it")
	}
	if !l.Foreign(other) || l.Refuted(other, topic) {
		t.Error("a record of a database with lower transaction ids is refuted for ever")
	}
	l.End(nil)
	epoch := l.Epoch(0)
	l.Begin("b", other, at(2*time.Second))
	l.Renew(at(2 * time.Second))
	if l.Refuted(other, topic) || l.Refuted(old, topic) {
		t.Error("what was announced in one history refutes in another")
	}
	if !l.Foreign(old) || l.Vouched(old, 0, at(2*time.Second), false) || !l.Vouched(other, 0, at(2*time.Second), false) {
		t.Error("a record of the old history is not foreign, or is vouched for")
	}
	if l.Epoch(0) == epoch {
		t.Error("records are not judged anew")
	}
	for _, ended := range []bool{true, false} { // the lease of a session ends with its history
		l = newLog()
		l.Begin("a", old, at(0))
		l.Renew(at(0))
		if ended {
			l.End(nil)
		}
		l.Begin("b", other, at(time.Second))
		if l.Vouched(old, 0, at(time.Second), false) {
			t.Errorf("a session that has ended (%v) vouches for records of its history after another one has come", ended)
		}
	}
}

// TestMismatch: if the stores read from another server than the one that announces,
// nothing is vouched for.
func TestMismatch(t *testing.T) {
	l := newLog()
	l.Read(7)
	l.Begin("history", seen(t, 51).On(1), at(0))
	l.Renew(at(0))
	l.Read(1)
	l.Read(0) // a standby, or a store that does not tell
	if l.Mismatched() || !l.Live(at(0)) || !l.readSince(time.Minute) {
		t.Error("the right server is taken for another one")
	}
	l.Read(2)
	if !l.Mismatched() || l.Live(at(0)) || l.Vouched(seen(t, 60).On(1), 0, at(0), false) || l.Vouched(seen(t, 60).On(2), 0, at(0), false) {
		t.Error("something is vouched for")
	}
	l.End(ErrOtherServer)
	if l.Vouched(seen(t, 60).On(1), 0, at(0), false) {
		t.Error("something is vouched for after the end")
	}

	l = newLog() // an earlier session of the server vouches for nothing either
	l.Begin("history", seen(t, 51).On(1), at(0))
	l.Renew(at(0))
	l.End(nil)
	l.Begin("history", seen(t, 70).On(1), at(time.Second))
	if !l.Vouched(seen(t, 60).On(1), 0, at(time.Second), false) {
		t.Error("the lease of the earlier session is lost")
	}
	l.Read(2)
	if l.Vouched(seen(t, 60).On(1), 0, at(time.Second), false) {
		t.Error("an earlier session vouches although the stores read elsewhere")
	}
}

// TestSuspects: a change that was found counts as unannounced if the lease is renewed
// to a later time and it still was not announced.
func TestSuspects(t *testing.T) {
	l := newLog()
	a, b, c, d := KeyTopic(1), KeyTopic(2), KeyTopic(3), KeyTopic(4)
	l.Begin("history", seen(t, 50), at(0))
	l.Renew(at(0))
	l.Suspect(at(time.Second), seen(t, 60), a)
	l.Suspect(at(time.Second), seen(t, 60), b)
	l.Suspect(at(3*time.Second), seen(t, 60), c)
	l.Announce(b, 61, at(0)) // on its way when it was found
	l.Renew(at(2 * time.Second))
	if n := l.Unannounced(); n != 1 {
		t.Errorf("%d unannounced changes, want 1", n)
	}
	l.Renew(at(4 * time.Second))
	l.Renew(at(5 * time.Second))
	if n := l.Unannounced(); n != 2 {
		t.Errorf("%d unannounced changes, want 2", n)
	}

	for range 2 * maxSuspects {
		l.Suspect(at(6*time.Second), seen(t, 60), d)
	}
	if n := len(l.suspects); n != maxSuspects {
		t.Errorf("%d suspects are kept, want %d", n, maxSuspects)
	}
	l.End(nil) // announcements may have been missed, so nothing can be said of them
	l.Begin("history", seen(t, 50), at(7*time.Second))
	l.Renew(at(7 * time.Second))
	if n := l.Unannounced(); n != 2 {
		t.Errorf("%d unannounced changes, want 2 as before", n)
	}
}

func TestParse(t *testing.T) {
	const subject = 0x0011223344556677
	for payload, want := range map[string]announcement{
		"key 12 0011223344556677":                 {kind: "key", xid: 12, subject: subject},
		"key 12 ffffffffffffffff":                 {kind: "key", xid: 12, subject: 1<<64 - 1},
		"keys-of 12 0011223344556677":             {kind: "keys-of", xid: 12, subject: subject},
		"keys-new 12":                             {kind: "keys-new", xid: 12},
		"keys 12":                                 {kind: "keys", xid: 12},
		"plan 12 0011223344556677":                {kind: "plan", xid: 12, subject: subject},
		"plan 12 0011223344556677 and more words": {kind: "plan", xid: 12, subject: subject}, // of later versions
		"plans-new 12":                            {kind: "plans-new", xid: 12},
		"tier 12 0011223344556677":                {kind: "tier", xid: 12, subject: subject},
		"plans 12":                                {kind: "plans", xid: 12},
		"plans 12 and more":                       {kind: "plans", xid: 12},
		"all 18446744073709551615":                {kind: "all", xid: 1<<64 - 1},
		"?beat 12":                                {kind: "?beat", xid: 12},
		"?something 12 else":                      {kind: "?something", xid: 12},

		"key 12":                   {kind: "key", xid: 12, unknown: true},
		"key 12 ":                  {kind: "key", xid: 12, unknown: true},
		"key 12 00112233445566778": {kind: "key", xid: 12, unknown: true},
		"key 12 001122334455667":   {kind: "key", xid: 12, unknown: true},
		"plan 12 my organisation":  {kind: "plan", xid: 12, unknown: true},
		"All 12":                   {kind: "All", xid: 12, unknown: true},
		"something 12 else":        {kind: "something", xid: 12, unknown: true},
		" 12":                      {xid: 12, unknown: true},

		"":                           {},
		"key":                        {},
		"?beat":                      {},
		"key 0 0011223344556677":     {},
		"key -1 0011223344556677":    {},
		"key 18446744073709551616 x": {},
		"key  12 0011223344556677":   {},
	} {
		got, err := parse(payload)
		if err != nil {
			got = announcement{}
		}
		if got != want || (err == nil) != (want != announcement{}) {
			t.Errorf("parse(%q) = %+v, %v, want %+v", payload, got, err, want)
		}
	}
	got, err := parse("key 12 001122334455667X")
	if err != nil || !got.unknown {
		t.Errorf("a subject of no known form: %+v, %v", got, err)
	}
}

// TestEnter: each kind refutes what it concerns, and no more. An unknown one may concern
// everything.
func TestEnter(t *testing.T) {
	key, absentKey := []Topic{KeyTopic(7), KeysOfTopic("org")}, []Topic{KeyTopic(8), NewKeysTopic()}
	plan, absentPlan := []Topic{PlanTopic("org"), TierTopic("gold")}, []Topic{PlanTopic("other"), NewPlansTopic()}
	for payload, want := range map[string]string{
		"key 10 0000000000000007":                     "key",
		"key 10 0000000000000008":                     "absent key",
		fmt.Sprintf("keys-of 10 %016x", word("org")):  "key",
		fmt.Sprintf("keys-of 10 %016x", word("gold")): "",
		"keys-new 10": "absent key",
		"keys 10":     "key absent key",
		fmt.Sprintf("plan 10 %016x", word("org")):   "plan",
		fmt.Sprintf("plan 10 %016x", word("other")): "absent plan",
		fmt.Sprintf("tier 10 %016x", word("gold")):  "plan",
		"plans-new 10":            "absent plan",
		"plans 10":                "plan absent plan",
		"all 10":                  "key absent key plan absent plan",
		"orgs 10 x":               "key absent key plan absent plan",
		"plan 10 my organisation": "key absent key plan absent plan",
		"?beat 10":                "",
		"?orgs 10 x":              "",
	} {
		l := newLog()
		epochs := map[Topic]uint32{}
		records := map[string][]Topic{"key": key, "absent key": absentKey, "plan": plan, "absent plan": absentPlan}
		for _, topics := range records {
			epochs[topics[0]] = l.Epoch(topics[0].Cell())
		}
		a, err := parse(payload)
		if err != nil {
			t.Fatal(err)
		}
		a.enter(l, at(0))
		var got []string
		for _, name := range []string{"key", "absent key", "plan", "absent plan"} {
			topics := records[name]
			if !l.Refuted(seen(t, 10), topics...) {
				continue
			}
			got = append(got, name)
			if l.Epoch(topics[0].Cell()) == epochs[topics[0]] {
				t.Errorf("%s: the epoch of what is refuted stays", payload)
			}
			if l.Refuted(seen(t, 11), topics...) {
				t.Errorf("%s refutes who has seen it", payload)
			}
		}
		if got := strings.Join(got, " "); got != want {
			t.Errorf("%s refutes %q, want %q", payload, got, want)
		}
		if unknown := l.Unknown() == 1; unknown != (payload == "orgs 10 x" || payload == "plan 10 my organisation") {
			t.Errorf("%s is unknown: %v", payload, unknown)
		}
	}
}
