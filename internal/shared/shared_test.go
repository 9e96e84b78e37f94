package shared

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/sealed"
)

const ttl = time.Minute

// newRecords returns Records in a Redis, sealed under a secret made of a letter.
func newRecords(t *testing.T, server *miniredis.Miniredis, letter string, hooks ...redis.Hook) *Records {
	t.Helper()
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true, MaxRetries: -1})
	for _, hook := range hooks {
		rdb.AddHook(hook)
	}
	t.Cleanup(func() { _ = rdb.Close() })
	limits := batch.Limits{AtOnce: 1, Size: 10, Queue: 100, Budget: 5 * time.Second}
	secret := []byte(strings.Repeat(letter, sealed.MinSecretLen))
	return New(rdb, sealed.NewSealer(secret), limits, ttl, slog.New(slog.DiscardHandler))
}

// await waits until a record is written.
func await(t *testing.T, server *miniredis.Miniredis, name string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !server.Exists(name); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s is not written", name)
		}
	}
}

// TestRecords: what was set is got, by the same name and under the same secret only.
func TestRecords(t *testing.T) {
	server := miniredis.RunT(t)
	r, other := newRecords(t, server, "a"), newRecords(t, server, "b")
	if body, err := r.Get("name"); body != nil || err != nil {
		t.Errorf("got %q, %v of nothing", body, err)
	}
	r.Set("name", []byte("body"))
	await(t, server, "name")
	if body, err := r.Get("name"); string(body) != "body" || err != nil {
		t.Errorf("got %q, %v", body, err)
	}
	if got := server.TTL("name"); got != ttl {
		t.Errorf("lives for %v, want %v", got, ttl)
	}
	value, _ := server.Get("name")
	_ = server.Set("another name", value)
	_ = server.Set("changed", value[:len(value)-1]+"Y")
	for name, records := range map[string]*Records{"name": other, "another name": r, "changed": r} {
		if body, err := records.Get(name); body != nil || !errors.Is(err, ErrRejected) {
			t.Errorf("%s: got %q, %v, want ErrRejected", name, body, err)
		}
	}
	if n := r.Stats().Rejected.Load(); n != 2 {
		t.Errorf("%d rejected, want 2", n)
	}
}

// broken is a hook that fails the commands on names that begin with a letter.
type broken struct{ letter string }

func (broken) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h broken) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if h.fails(cmd) {
			return cmd.Err()
		}
		return next(ctx, cmd)
	}
}

func (h broken) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		err := next(ctx, cmds)
		for _, cmd := range cmds {
			if h.fails(cmd) {
				err = cmd.Err()
			}
		}
		return err
	}
}

func (h broken) fails(cmd redis.Cmder) bool {
	name, _ := cmd.Args()[1].(string)
	if !strings.HasPrefix(name, h.letter) {
		return false
	}
	cmd.SetErr(errors.New("CLUSTERDOWN"))
	return true
}

// TestOneShardDown: a batch of which something is answered has not failed, so that the
// breaker stays closed, and the other shards are of use.
func TestOneShardDown(t *testing.T) {
	server := miniredis.RunT(t)
	r := newRecords(t, server, "a", broken{"down"})
	_ = server.Set("up", "value")
	for range 3 * breakAfter {
		replies, err := r.node("").getBatch(t.Context(), []string{"up", "down"})
		if err != nil || string(replies[0].value) != "value" || replies[1].err == nil {
			t.Fatalf("got %+v, %v", replies, err)
		}
	}
}

// TestBreaker: a Redis that fails again and again is left alone for a while.
func TestBreaker(t *testing.T) {
	server := miniredis.RunT(t)
	r := newRecords(t, server, "a", broken{""})
	for i := range 2 * breakAfter {
		if _, err := r.Get(fmt.Sprint("name ", i)); err == nil {
			t.Fatal("got something")
		}
	}
	if s := r.Stats(); s.Errors.Load() != breakAfter || s.Skipped.Load() != breakAfter {
		t.Errorf("%d errors, %d skipped, want %d of each", s.Errors.Load(), s.Skipped.Load(), breakAfter)
	}
}

// TestNamespaces: what may be a part of names.
func TestNamespaces(t *testing.T) {
	for namespace, want := range map[string]bool{
		"": true, "production": true, "a-b_c.D9": true, strings.Repeat("x", 64): true,
		strings.Repeat("x", 65): false, "a:b": false, "a b": false, "ä": false, "a\n": false, "{a}": false,
	} {
		if got := ValidNamespace(namespace); got != want {
			t.Errorf("%q: %v, want %v", namespace, got, want)
		}
	}
}
