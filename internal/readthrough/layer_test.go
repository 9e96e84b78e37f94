package readthrough

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/shared"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// An emptyRedis holds nothing, and keeps nothing.
type emptyRedis struct{}

func (emptyRedis) DialHook(redis.DialHook) redis.DialHook {
	return func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no network here") }
}

func (emptyRedis) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error {
		cmd.SetErr(redis.Nil)
		return redis.Nil
	}
}

func (emptyRedis) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error {
		for _, cmd := range cmds {
			cmd.SetErr(redis.Nil)
		}
		return redis.Nil
	}
}

// newLayer returns a layer before an empty Redis, and a store that is read by one.
func newLayer(t *testing.T, one func(ctx context.Context, subject uint64) (string, bool, error)) (*Layer[uint64, string], *Store[uint64, string]) {
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ContextTimeoutEnabled: true})
	rdb.AddHook(emptyRedis{})
	t.Cleanup(func() { _ = rdb.Close() })
	limits := batch.Limits{AtOnce: 4, Size: 4, Queue: 1000, Budget: time.Second}
	logger := slog.New(slog.DiscardHandler)
	s := &Shared{
		Log:     feed.NewLog(10*time.Second, time.Hour, logger),
		Redis:   shared.New(rdb, sealed.NewSealer(make([]byte, 32)), limits, time.Hour, logger),
		Limits:  Limits{MaxRefusalStaleness: time.Second, MaxStaleness: 10 * time.Second, RefreshAfter: time.Minute, StaleIfError: time.Hour},
		Batches: limits,
		Logger:  logger,
	}
	layer := NewLayer(s, facts, 1000, 1000)
	return layer, NewStore(layer, Reader[uint64, string, string]{
		Name: "facts", One: one, Trusted: true, Fill: func(rec *Record[string], word string) { rec.Value = word },
	})
}

// TestJoinedFlight: who joins a lookup that had begun before a change was announced is
// answered by what came after.
func TestJoinedFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release, lookups := make(chan struct{}), 0
		layer, store := newLayer(t, func(ctx context.Context, _ uint64) (string, bool, error) {
			lookups++
			if lookups > 1 {
				snapshot.Report(ctx, "20:20:", 0)
				return "new", true, nil
			}
			snapshot.Report(ctx, "10:10:", 0)
			<-release
			return "old", true, nil
		})
		ask := func(answer chan<- string) {
			rec, _, err := layer.Fetch(t.Context(), 1, nil, store)
			if err != nil {
				answer <- err.Error()
				return
			}
			answer <- rec.Value
		}
		before, after := make(chan string, 1), make(chan string, 100)
		go ask(before)
		synctest.Wait()
		time.Sleep(time.Millisecond)
		layer.shared.Log.Announce(feed.KeyTopic(1), 15, clock.At(time.Now()))
		for range cap(after) {
			go ask(after)
		}
		synctest.Wait()
		close(release)
		if got := <-before; got != "old" { // it asked before the change
			t.Errorf("who began the lookup got %q", got)
		}
		for range cap(after) {
			if got := <-after; got != "new" {
				t.Errorf("who joined it after the change got %q", got)
			}
		}
		if lookups != 2 {
			t.Errorf("%d lookups, want 2", lookups)
		}
		synctest.Wait()
	})
}

// TestSecondLook: who found nothing in memory, and then comes too late for the lookup that
// he wanted to join, finds what that one brought.
func TestSecondLook(t *testing.T) {
	lookups := 0
	layer, store := newLayer(t, func(context.Context, uint64) (string, bool, error) {
		lookups++
		return "good", true, nil
	})
	for _, want := range []Source{Database, Memory} {
		rec, source, err := layer.Fetch(t.Context(), 1, nil, store)
		if err != nil || rec.Value != "good" || source != want {
			t.Errorf("fetched %+v from %q, %v, want it from %q", rec, source, err, want)
		}
	}
	if lookups != 1 {
		t.Errorf("%d lookups, want 1", lookups)
	}
}

// TestLater: of two records that are both past their time, the later one counts, whichever was asked
// for first: the earlier may admit a key that the later knows to be dead.
func TestLater(t *testing.T) {
	earlier, later2 := &Record[string]{Stamp: Stamp{ReadAt: clock.At(time.Unix(1, 0))}}, &Record[string]{Stamp: Stamp{ReadAt: clock.At(time.Unix(2, 0))}}
	for _, c := range [][3]*Record[string]{{earlier, later2, later2}, {later2, earlier, later2}, {nil, earlier, earlier}, {earlier, nil, earlier}, {nil, nil, nil}} {
		if got := later(c[0], c[1]); got != c[2] {
			t.Errorf("the later of %v and %v is %v", c[0], c[1], got)
		}
	}
}
