package batch

import (
	"fmt"

	"github.com/trackpilots/apikey/internal/outage"
)

// errEnded is the error of what ended its goroutine and did not return.
var errEnded = outage.New(outage.Ours, "runtime.Goexit was called")

// A Result is what a function has returned.
type Result[T any] struct {
	Value T
	Err   error
}

// Start calls do on a goroutine of its own, since it may be somebody else's code: a store, or
// a hook of a client. The channel receives what it returns, once. If do panics, or ends its
// goroutine by [runtime.Goexit] as t.FailNow does, that is an error, and no outage: whoever
// can cause it could keep a revoked key alive.
func Start[T any](do func() (T, error)) <-chan Result[T] {
	results := make(chan Result[T], 1)
	go func() {
		r := Result[T]{Err: errEnded}
		defer func() {
			if p := recover(); p != nil {
				r.Err = outage.As(outage.Ours, fmt.Errorf("panic: %v", p))
			}
			results <- r
		}()
		r.Value, r.Err = do()
	}()
	return results
}

// Run is Start, and waits for the result.
func Run[T any](do func() (T, error)) (T, error) {
	r := <-Start(do)
	return r.Value, r.Err
}
