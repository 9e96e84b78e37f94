// Package clock tells the age of what was read at some time, perhaps on another
// machine, by two clocks: the monotonic one, which cannot be set, but stands still
// while a machine is suspended, and the wall clock, which can be set.
package clock

import "time"

var start = time.Now()

// An Instant is a moment by both clocks. It takes 16 bytes.
type Instant struct{ wall, mono int64 } // nanoseconds; mono is since start

// At returns the Instant of t, which comes from [time.Now] of this process.
func At(t time.Time) Instant { return Instant{t.UnixNano(), int64(t.Sub(start))} }

// Elsewhere returns the Instant of a wall clock's time on another machine, as seen
// here at now. From then on both clocks of this machine tell its age. It reports
// false if that time is still to come.
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

// Age returns the time from i to now by the clock that tells more: what one of them
// calls old is old, and it is young only by both.
func (i Instant) Age(now Instant) time.Duration {
	return time.Duration(max(now.wall-i.wall, now.mono-i.mono))
}

// Before reports whether i is before j by the monotonic clock.
func (i Instant) Before(j Instant) bool { return i.mono < j.mono }
