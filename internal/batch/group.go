package batch

import (
	"sync"
	"time"
)

// A Group lets concurrent callers with the same key share one call. It is safe for
// concurrent use. The zero value is ready to use.
type Group[K comparable, V any] struct {
	mu    sync.Mutex
	calls map[K]*Call[V]
}

// A Call is a call that is running or has ended.
type Call[V any] struct {
	Started time.Time
	Done    chan struct{} // closed when the call has ended; the fields below may be read then
	Value   V
	Err     error
}

// Join returns the running call for key. If there is none, it returns a new one, and the
// caller must end it with [Group.Answer] in any case.
func (g *Group[K, V]) Join(key K) (c *Call[V], first bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c := g.calls[key]; c != nil {
		return c, false
	}
	if g.calls == nil {
		g.calls = map[K]*Call[V]{}
	}
	c = &Call[V]{Started: time.Now(), Done: make(chan struct{})}
	g.calls[key] = c
	return c, true
}

// Answer ends a call.
func (g *Group[K, V]) Answer(key K, c *Call[V], value V, err error) {
	g.mu.Lock()
	delete(g.calls, key)
	g.mu.Unlock()
	c.Value, c.Err = value, err
	close(c.Done)
}
