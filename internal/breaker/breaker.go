// Package breaker is the circuit breaker in front of Redis and of the stores. What fails
// several times in a row is not asked for a while, and then by one caller, so that in an
// outage not every request waits for its timeout.
package breaker

import (
	"errors"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/trackpilots/apikey/internal/outage"
)

// For is how long a breaker stays open.
const For = time.Second

// A Breaker is a circuit breaker. It is safe for concurrent use.
type Breaker struct {
	steps *gobreaker.TwoStepCircuitBreaker[any]
}

// New returns a breaker that opens after a number of failures in a row. Errors that excluded
// reports are neither failures nor successes; it may be nil. opens is called when the breaker
// opens, and closes when it is closed again.
func New(after uint32, excluded func(error) bool, opens, closes func()) *Breaker {
	return &Breaker{gobreaker.NewTwoStepCircuitBreaker[any](gobreaker.Settings{
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
	})}
}

// Do calls do, unless the breaker is open. If do panics, or ends its goroutine, the breaker
// takes it for errEnded, and is not left waiting for the one that tries.
func Do[T any](b *Breaker, do func() (T, error)) (value T, err error) {
	done, err := b.steps.Allow()
	if err != nil {
		return value, err
	}
	err = errEnded
	defer func() { done(err) }()
	return do()
}

var errEnded = outage.New(outage.Ours, "it did not return")

// Skipped reports whether err is the error of an open breaker.
func Skipped(err error) bool {
	return errors.Is(err, gobreaker.ErrOpenState) || errors.Is(err, gobreaker.ErrTooManyRequests)
}

// Trying reports whether err is the error of a breaker that was open, and now lets one caller
// try.
func Trying(err error) bool { return errors.Is(err, gobreaker.ErrTooManyRequests) }
