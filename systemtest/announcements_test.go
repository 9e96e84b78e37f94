package systemtest

// What a replica has been told of, for tests that have to know.

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/trackpilots/apikey"
)

// announcements is a handler of the logger of a cache that keeps what was announced to
// it. What it has, the cache knows.
type announcements struct {
	mu    sync.Mutex
	heard map[string]bool // "<subject> <transaction>"
}

// has reports whether it was announced that a transaction has changed a key.
func (a *announcements) has(h apikey.KeyHash, xid uint64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.heard[fmt.Sprintf("%x %d", h[:8], xid)]
}

func (a *announcements) Enabled(context.Context, slog.Level) bool { return true }

func (a *announcements) Handle(_ context.Context, r slog.Record) error {
	var subject string
	var xid uint64
	r.Attrs(func(attr slog.Attr) bool {
		switch attr.Key {
		case "subject":
			subject = attr.Value.String()
		case "transaction":
			xid = attr.Value.Uint64()
		}
		return true
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.heard == nil {
		a.heard = map[string]bool{}
	}
	a.heard[fmt.Sprint(subject, " ", xid)] = true
	return nil
}

func (a *announcements) WithAttrs([]slog.Attr) slog.Handler { return a }

func (a *announcements) WithGroup(string) slog.Handler { return a }
