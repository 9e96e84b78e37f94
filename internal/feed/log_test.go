package feed

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

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

func TestAnnounce(t *testing.T) {
	l := NewLog(time.Second)
	before := l.State()
	l.Announce("key a", 10)
	if l.State() == before {
		t.Error("an announcement does not end the state")
	}
	for _, c := range []struct {
		subject string
		snap    snapshot.Snapshot
		want    bool
	}{
		{"key a", seen(t, 10), true},
		{"key a", seen(t, 11), false},
		{"key b", seen(t, 10), false},
		{"key a", snapshot.Snapshot{}, false}, // no stamp, so by age alone
	} {
		if got := l.Refuted(c.subject, c.snap); got != c.want {
			t.Errorf("Refuted(%q, %s) = %v, want %v", c.subject, c.snap, got, c.want)
		}
	}
	l.AnnounceAll(20)
	if !l.Refuted("key b", seen(t, 20)) || l.Refuted("key b", seen(t, 21)) {
		t.Error("an announcement of everything does not concern a subject of its own")
	}
	if n := l.Announcements(); n != 2 {
		t.Errorf("%d announcements, want 2", n)
	}
}

// TestOverflow: more subjects than a log tells apart refute everything that has
// not seen them all, and nothing is forgotten.
func TestOverflow(t *testing.T) {
	l := NewLog(time.Second)
	l.Announce("key large", 1_000_000)
	for i := range uint64(capacity - 1) {
		l.Announce(fmt.Sprint("key ", i), 10+i)
	}
	if l.Refuted("key elsewhere", seen(t, 1)) {
		t.Fatal("a full log refutes what was not announced")
	}
	l.Announce("key one too many", 500_000)
	if n := len(l.marks); n > capacity {
		t.Errorf("%d subjects, want %d at most", n, capacity)
	}
	for _, subject := range []string{"key large", "key 0", "key one too many", "key elsewhere"} {
		if !l.Refuted(subject, seen(t, 1_000_000)) || l.Refuted(subject, seen(t, 1_000_001)) {
			t.Errorf("%s: not refuted by exactly what has seen all", subject)
		}
	}
}

func TestLease(t *testing.T) {
	now := time.Now()
	l := NewLog(10 * time.Second)
	if l.Live(l.State(), now) || l.State().Covers(seen(t, 100), now) {
		t.Error("without a beat the log is live, or covers")
	}
	l.Beat(now, 50)
	first := l.State()
	if !l.Live(first, now.Add(10*time.Second-1)) || l.Live(first, now.Add(10*time.Second)) {
		t.Error("the lease does not last from the sending of the beat to its end")
	}
	l.Beat(now.Add(5*time.Second), 60)
	if l.State() != first {
		t.Error("a later beat ends the state")
	}
	if !l.Live(first, now.Add(15*time.Second-1)) {
		t.Error("a later beat does not renew the lease")
	}
	if !first.Covers(seen(t, 51), now) || first.Covers(seen(t, 50), now) || first.Covers(seen(t, 51), now.Add(-1)) {
		t.Error("a record is covered, or not, against the first beat")
	}

	broken := errors.New("broken")
	l.End(broken)
	if l.Live(l.State(), now) || l.State().Covers(seen(t, 100), now) || !errors.Is(l.Fault(), broken) {
		t.Errorf("after the end: live %v, fault %v", l.Live(l.State(), now), l.Fault())
	}
}

// TestSuspects: a change that was found counts as unannounced if the next beat
// comes back and it still was not announced.
func TestSuspects(t *testing.T) {
	now := time.Now()
	l := NewLog(10 * time.Second)
	l.Beat(now, 50)
	l.Suspect("key a", seen(t, 60), now.Add(time.Second))
	l.Suspect("key b", seen(t, 60), now.Add(time.Second))
	l.Suspect("key c", seen(t, 60), now.Add(3*time.Second))
	l.Announce("key b", 61) // on its way when it was found
	l.Beat(now.Add(2*time.Second), 62)
	if n := l.Unannounced(); n != 1 {
		t.Errorf("%d unannounced changes, want 1", n)
	}
	l.Beat(now.Add(4*time.Second), 63)
	l.Beat(now.Add(5*time.Second), 64)
	if n := l.Unannounced(); n != 2 {
		t.Errorf("%d unannounced changes, want 2", n)
	}

	for range 2 * maxSuspects {
		l.Suspect("key d", seen(t, 60), now.Add(6*time.Second))
	}
	if n := len(l.suspects); n != maxSuspects {
		t.Errorf("%d suspects are kept, want %d", n, maxSuspects)
	}
	l.End(nil) // announcements may have been missed, so nothing can be said of them
	l.Beat(now.Add(7*time.Second), 70)
	if n := l.Unannounced(); n != 2 {
		t.Errorf("%d unannounced changes, want 2 as before", n)
	}
}

// TestAge: a clock that is set back does not make anything younger, nor does one
// that stood still.
func TestAge(t *testing.T) {
	now := time.Now()
	wall := func(t time.Time) time.Time { return t.Round(0) } // without the monotonic reading
	for name, c := range map[string]struct {
		then, now time.Time
		want      time.Duration
	}{
		"same process":    {now, now.Add(time.Second), time.Second},
		"other process":   {wall(now), now.Add(time.Second), time.Second},
		"from the future": {wall(now.Add(time.Second)), now, -time.Second},
	} {
		if got := Age(c.then, c.now); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestParse(t *testing.T) {
	for payload, want := range map[string]announcement{
		"key 12 0011223344556677":       {kindKey, 12, "0011223344556677"},
		"plan 12 org 1":                 {kindPlan, 12, "org 1"},
		"plan 12 ":                      {kindPlan, 12, ""},
		"all 18446744073709551615":      {kindAll, 1<<64 - 1, ""},
		"beat 12 " + "NONCE":            {kindBeat, 12, "NONCE"},
		"":                              {},
		"key":                           {},
		"key 12":                        {},
		"key 0 x":                       {},
		"key -1 x":                      {},
		"key 18446744073709551616 x":    {},
		"all 12 x":                      {},
		"All 12":                        {},
		"something 12 else":             {},
		strings.Repeat("key 12 x ", 10): {kindKey, 12, "x " + strings.Repeat("key 12 x ", 9)},
	} {
		got, err := parse(payload)
		if got != want || (err == nil) != (want != announcement{}) {
			t.Errorf("parse(%q) = %+v, %v, want %+v", payload, got, err, want)
		}
	}
}
