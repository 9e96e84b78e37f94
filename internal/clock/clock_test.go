package clock

import (
	"testing"
	"time"
)

// TestAge: a clock that is set back does not make anything younger, nor does one
// that stood still, and nothing has a negative age.
func TestAge(t *testing.T) {
	const at = int64(1000 * time.Hour)
	read := Instant{at, 0}
	fromElsewhere, ok := Elsewhere(at-int64(time.Minute), read)
	if _, future := Elsewhere(at+1, read); !ok || future {
		t.Errorf("a record from elsewhere: %v; from the future: %v", ok, future)
	}
	for name, c := range map[string]struct {
		now  Instant
		want time.Duration
	}{
		"a second later":      {Instant{at + int64(time.Second), int64(time.Second)}, time.Second},
		"set back by an hour": {Instant{at + int64(time.Second-time.Hour), int64(time.Second)}, time.Second},
		"set forward":         {Instant{at + int64(time.Hour), int64(time.Second)}, time.Hour},
		"suspended":           {Instant{at + int64(time.Hour), 0}, time.Hour},
	} {
		if got := read.Age(c.now); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if got := fromElsewhere.Age(c.now); got != c.want+time.Minute {
			t.Errorf("%s, read elsewhere a minute before: %v, want %v", name, got, c.want+time.Minute)
		}
	}
	now := time.Now()
	if got := At(now).Age(At(now.Add(time.Second))); got != time.Second {
		t.Errorf("%v, want a second", got)
	}
}
