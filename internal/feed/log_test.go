package feed

import (
	"errors"
	"fmt"
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

func newLog() *Log { return NewLog(10*time.Second, time.Hour) }

func TestAnnounce(t *testing.T) {
	a, b := KeyTopic(1<<40+7), KeyTopic(2)
	for name, c := range map[string]struct {
		announce func(*Log)
		a, b     bool // is refuted
		plan     bool
	}{
		"a key":     {announce: func(l *Log) { l.Announce(a, 10, at(0)) }, a: true},
		"all keys":  {announce: func(l *Log) { l.AnnounceAll(Key, 10) }, a: true, b: true},
		"a plan":    {announce: func(l *Log) { l.Announce(PlanTopic("org"), 10, at(0)) }, plan: true},
		"a tier":    {announce: func(l *Log) { l.Announce(TierTopic("gold"), 10, at(0)) }, plan: true},
		"all plans": {announce: func(l *Log) { l.AnnounceAll(Plan, 10) }, plan: true},
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
	l := newLog()
	l.Announce(KeyTopic(1<<60), 1_000_000, at(0))
	for i := range uint64(capacity - 1) {
		l.Announce(KeyTopic(i), 10+i, at(0))
	}
	if l.Refuted(seen(t, 1), KeyTopic(1<<61)) {
		t.Fatal("a full log refutes what was not announced")
	}
	epoch := l.Epoch(77)
	l.Announce(KeyTopic(1<<62), 500_000, at(0))
	if n := len(l.marks[Key].young); n > capacity {
		t.Errorf("%d topics, want %d at most", n, capacity)
	}
	if l.Epoch(77) == epoch {
		t.Error("the other epochs do not end")
	}
	for _, id := range []uint64{1 << 60, 0, 1 << 62, 1 << 61} {
		if !l.Refuted(seen(t, 1_000_000), KeyTopic(id)) || l.Refuted(seen(t, 1_000_001), KeyTopic(id)) {
			t.Errorf("%d: not refuted by exactly what has seen all", id)
		}
	}
	if l.Refuted(seen(t, 1), PlanTopic("org")) {
		t.Error("too many keys refute plans")
	}
}

// TestForgets: what is older than every record is forgotten, and nothing before.
func TestForgets(t *testing.T) {
	l := NewLog(time.Second, time.Hour)
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
		if n := len(l.marks[Key].young) + len(l.marks[Key].old); n > 121 {
			t.Fatalf("%d topics after %v", n, now)
		}
	}
}

func TestLease(t *testing.T) {
	l := newLog()
	if l.Live(at(0)) || l.Covers(seen(t, 100), at(0)) {
		t.Error("without a beat the log is live, or covers")
	}
	l.Beat(at(0), 50)
	first := l.Session()
	if !l.Live(at(10*time.Second-1)) || l.Live(at(10*time.Second)) {
		t.Error("the lease does not last from the sending of the beat to its end")
	}
	l.Beat(at(5*time.Second), 60)
	if l.Session() != first {
		t.Error("a later beat ends the session")
	}
	if !l.Live(at(15*time.Second - 1)) {
		t.Error("a later beat does not renew the lease")
	}
	if !l.Covers(seen(t, 51), at(0)) || l.Covers(seen(t, 50), at(0)) || l.Covers(seen(t, 51), at(-1)) {
		t.Error("a record is covered, or not, against the first beat")
	}

	broken := errors.New("broken")
	l.End(broken)
	if l.Live(at(0)) || l.Covers(seen(t, 100), at(0)) || !errors.Is(l.Fault(), broken) {
		t.Errorf("after the end: live %v, fault %v", l.Live(at(0)), l.Fault())
	}
}

// TestSuspects: a change that was found counts as unannounced if the next beat
// comes back and it still was not announced.
func TestSuspects(t *testing.T) {
	l := newLog()
	a, b, c, d := KeyTopic(1), KeyTopic(2), KeyTopic(3), KeyTopic(4)
	l.Beat(at(0), 50)
	l.Suspect(at(time.Second), seen(t, 60), a)
	l.Suspect(at(time.Second), seen(t, 60), b)
	l.Suspect(at(3*time.Second), seen(t, 60), c)
	l.Announce(b, 61, at(0)) // on its way when it was found
	l.Beat(at(2*time.Second), 62)
	if n := l.Unannounced(); n != 1 {
		t.Errorf("%d unannounced changes, want 1", n)
	}
	l.Beat(at(4*time.Second), 63)
	l.Beat(at(5*time.Second), 64)
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
	l.Beat(at(7*time.Second), 70)
	if n := l.Unannounced(); n != 2 {
		t.Errorf("%d unannounced changes, want 2 as before", n)
	}
}

func TestParse(t *testing.T) {
	for payload, want := range map[string]announcement{
		"key 12 0011223344556677":        {kind: kindKey, xid: 12, subject: "0011223344556677", key: 0x0011223344556677},
		"key 12 ffffffffffffffff":        {kind: kindKey, xid: 12, subject: "ffffffffffffffff", key: 1<<64 - 1},
		"plan 12 org 1":                  {kind: kindPlan, xid: 12, subject: "org 1"},
		"plan 12 ":                       {kind: kindPlan, xid: 12},
		"tier 12 gold plus":              {kind: kindTier, xid: 12, subject: "gold plus"},
		"keys 12":                        {kind: kindKeys, xid: 12},
		"plans 12":                       {kind: kindPlans, xid: 12},
		"all 18446744073709551615":       {kind: kindAll, xid: 1<<64 - 1},
		"beat 12 NONCE":                  {kind: kindBeat, xid: 12, subject: "NONCE"},
		"":                               {},
		"key":                            {},
		"key 12":                         {},
		"key 12 ":                        {},
		"key 0 0011223344556677":         {},
		"key -1 0011223344556677":        {},
		"key 12 00112233445566778":       {},
		"key 12 001122334455667":         {},
		"key 12 001122334455667X":        {},
		"key 12 FFFFFFFFFFFFFFFF":        {},
		"key 18446744073709551616 x":     {},
		"plan 12":                        {},
		"all 12 x":                       {},
		"keys 12 x":                      {},
		"All 12":                         {},
		"something 12 else":              {},
		strings.Repeat("plan 12 x ", 10): {kind: kindPlan, xid: 12, subject: "x " + strings.Repeat("plan 12 x ", 9)},
	} {
		got, err := parse(payload)
		if got != want || (err == nil) != (want != announcement{}) {
			t.Errorf("parse(%q) = %+v, %v, want %+v", payload, got, err, want)
		}
	}
}
