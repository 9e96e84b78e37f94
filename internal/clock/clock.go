// Package clock tells the age of something that was read, perhaps on another machine. It
// uses two clocks: the monotonic clock, which cannot be set but stops while the machine is
// suspended, and the wall clock, which can be set.
package clock

import "time"

var start = time.Now()

// An Instant is a time by both clocks.
type Instant struct{ wall, mono int64 } // nanoseconds; mono is since start

// At returns the Instant of t, which must come from [time.Now] in this process.
func At(t time.Time) Instant { return Instant{t.UnixNano(), int64(t.Sub(start))} }

// Elsewhere returns the Instant of another machine's wall-clock time, as it is seen here at
// now. It returns false if that time is in the future.
func Elsewhere(unixNano int64, now Instant) (Instant, bool) {
	age := now.wall - unixNano
	return Instant{unixNano, now.mono - age}, age >= 0
}

// Add returns the Instant that is d later by both clocks.
func (i Instant) Add(d time.Duration) Instant { return Instant{i.wall + int64(d), i.mono + int64(d)} }

// UnixNano returns i by the wall clock.
func (i Instant) UnixNano() int64 { return i.wall }

// Time returns i by the wall clock.
func (i Instant) Time() time.Time { return time.Unix(0, i.wall) }

// Age returns the time from i to now, by the clock that shows more time. So something is
// young only if it is young by both clocks.
func (i Instant) Age(now Instant) time.Duration {
	return time.Duration(max(now.wall-i.wall, now.mono-i.mono))
}

// Before reports whether i is before j by the monotonic clock.
func (i Instant) Before(j Instant) bool { return i.mono < j.mono }
