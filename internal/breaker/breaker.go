// Package breaker is the circuit breaker in front of Redis and of the stores. What fails
// several times in a row is not asked for a while, and then by one caller, so that in an
// outage not every request waits for its timeout.
package breaker

import (
	"errors"
	"time"

	"github.com/sony/gobreaker/v2"
)

// For is how long a breaker stays open.
const For = time.Second

// New returns a breaker that opens after a number of failures in a row. Errors that excluded
// reports are neither failures nor successes; it may be nil. opens is called when the breaker
// opens, and closes when it is closed again.
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

// Skipped reports whether err is the error of an open breaker.
func Skipped(err error) bool {
	return errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests)
}
