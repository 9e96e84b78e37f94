package batch

import (
	"sync"
	"time"
)

// A Group lets callers who ask for the same key at the same time share one answer.
// It is safe for concurrent use. The zero value is empty.
type Group[K comparable, V any] struct {
	mu    sync.Mutex
	calls map[K]*Call[V]
}

// A Call is one answer, under way or there.
type Call[V any] struct {
	Started time.Time
	Done    chan struct{} // closed when the answer is there; nobody reads it before
	Value   V
	Err     error
}

// Join returns the call for key that is under way, or else a new one, which the
// caller must answer, whatever happens, by [Group.Answer].
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

// Answer ends the call for key.
func (g *Group[K, V]) Answer(key K, c *Call[V], value V, err error) {
	g.mu.Lock()
	delete(g.calls, key)
	g.mu.Unlock()
	c.Value, c.Err = value, err
	close(c.Done)
}
