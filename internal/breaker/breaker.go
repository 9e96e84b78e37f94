// Package breaker is the breaker before Redis and before the stores: what fails several
// times in a row is not asked for a while, and then by one at a time, so that an outage
// does not cost every request its budget.
package breaker

import (
	"errors"
	"time"

	"github.com/sony/gobreaker/v2"
)

// For is how long a breaker stays open.
const For = time.Second

// New returns a breaker that opens after so many failures in a row. Errors that are
// excluded count neither way; nil: none are. opens and closes are called when it leaves
// the closed state, and when it is back.
func New[T any](after uint32, excluded func(error) bool, opens, closes func()) *gobreaker.CircuitBreaker[T] {
	return gobreaker.NewCircuitBreaker[T](gobreaker.Settings{
		Timeout:     For,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= after },
		IsExcluded:  excluded,
		OnStateChange: func(_ string, from, to gobreaker.State) {
			switch {
			case from == gobreaker.StateClosed:
				opens()
			case to == gobreaker.StateClosed:
				closes()
			}
		},
	})
}

// Skipped reports whether err is that an open breaker did not ask.
func Skipped(err error) bool {
	return errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests)
}
