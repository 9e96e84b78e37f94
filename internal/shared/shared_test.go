package shared

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

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

// TestLongest: a record is written and read if it is not longer than what is read of any
// value, as one of more than a thousand writing transactions is. Of longer ones only the
// beginning is read, and a value that is no string is not ours.
func TestLongest(t *testing.T) {
	server := miniredis.RunT(t)
	r := newRecords(t, server, "a")
	body := []byte(strings.Repeat("281474976710655,", 1001)) // ids of transactions; most have ten digits or fewer
	body = append(body, make([]byte, MaxRecord-sealed.Overhead-len(body))...)
	r.Set("longest", body)
	await(t, server, "longest")
	if got, err := r.Get("longest"); string(got) != string(body) || err != nil {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	body = append(body, 'x')
	r.Set("longer", body)
	r.Set("after it", nil)
	await(t, server, "after it")
	if n := r.Stats().Skipped.Load(); n != 1 || server.Exists("longer") {
		t.Errorf("%d are skipped, want the one that nobody would read", n)
	}
	_ = server.Set("longer", string(r.sealer.Seal("longer", body)))
	_, _ = server.Lpush("list", "x")
	for i, name := range []string{"longer", "list"} {
		if got, err := r.Get(name); got != nil || !errors.Is(err, ErrRejected) || r.Stats().Rejected.Load() != uint64(i+1) {
			t.Errorf("%s: got %d bytes, %v, want it rejected", name, len(got), err)
		}
	}
	if err := r.Fault(); err != nil || r.Stats().Errors.Load() > 0 {
		t.Errorf("the fault is %v", err)
	}
}

// TestFaultsApart: what fails in one way stays told while the other way succeeds.
func TestFaultsApart(t *testing.T) {
	server := miniredis.RunT(t)
	r := newRecords(t, server, "a", failing{"set"})
	r.Set("name", nil)
	for deadline := time.Now().Add(30 * time.Second); r.Fault() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no fault")
		}
	}
	for range 2 * breakAfter {
		if _, err := r.Get("name"); err != nil || r.Fault() == nil {
			t.Fatalf("%v, and the fault is %v", err, r.Fault())
		}
	}
}

// TestNodeThatIsGone: the fault of a node that has no records any more is not told for ever.
func TestNodeThatIsGone(t *testing.T) {
	old, next := miniredis.RunT(t), miniredis.RunT(t)
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": old.Addr()}, ContextTimeoutEnabled: true, HeartbeatFrequency: time.Hour})
	defer ring.Close()
	limits := batch.Limits{AtOnce: 1, Size: 10, Queue: 100, Budget: 5 * time.Second}
	r := New(ring, sealed.NewSealer([]byte(strings.Repeat("a", sealed.MinSecretLen))), limits, ttl, slog.New(slog.DiscardHandler))
	if _, err := r.Get("name"); err != nil {
		t.Fatal(err)
	}
	old.SetError("LOADING")
	if _, err := r.Get("name"); err == nil || r.Fault() == nil || !strings.Contains(r.Fault().Error(), old.Addr()) {
		t.Errorf("%v, and the fault is %v", err, r.Fault())
	}
	ring.SetAddrs(map[string]string{"a": next.Addr()})
	if err := r.Fault(); err != nil {
		t.Errorf("the fault is %v", err)
	}
	if _, err := r.Get("name"); err != nil {
		t.Error(err)
	}
}

// failing is a hook that fails the commands of a name.
type failing struct{ command string }

func (failing) DialHook(next redis.DialHook) redis.DialHook { return next }

func (failing) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (h failing) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if cmds[0].Name() == h.command {
			return errors.New("NOPERM") // and the commands say nothing
		}
		return next(ctx, cmds)
	}
}

// BenchmarkRead is what it costs to read a record by GET, by GETRANGE, and by a pipeline of
// one GETRANGE, which is what Records do.
func BenchmarkRead(b *testing.B) {
	rdb := testservers.Redis(b)
	if err := rdb.Set(b.Context(), "name", make([]byte, 250), time.Hour).Err(); err != nil {
		b.Fatal(err)
	}
	for name, read := range map[string]func(context.Context) error{
		"GET":      func(ctx context.Context) error { return rdb.Get(ctx, "name").Err() },
		"GETRANGE": func(ctx context.Context) error { return rdb.GetRange(ctx, "name", 0, MaxRecord-1).Err() },
		"pipeline": func(ctx context.Context) error {
			pipe := rdb.Pipeline()
			pipe.GetRange(ctx, "name", 0, MaxRecord-1)
			_, err := pipe.Exec(ctx)
			return err
		},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := read(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
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
