// Package shared has the records in Redis, which all replicas share. They are sealed, and
// found by name. A record that is slow, missing or not sealed under the secret is a miss. A
// record that cannot be written is dropped.
package shared

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/breaker"
	"github.com/trackpilots/apikey/internal/sealed"
)

const (
	// breakAfter is the number of batches that fail in a row before the breaker opens. In a
	// Redis Cluster one shard may be down while the others work, so a batch has failed only
	// if none of its commands was answered.
	breakAfter = 10

	// connectTimeout is how long connecting may take: several round trips, and so often
	// longer than a request waits.
	connectTimeout = 5 * time.Second
)

// DefaultTimeout is how long a request waits for Redis by default.
const DefaultTimeout = 50 * time.Millisecond

// Root is the beginning of all names of records. It changes with their encoding.
const Root = "apikey:3:"

var namespaceForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// ValidNamespace reports whether s may be a namespace.
func ValidNamespace(s string) bool { return namespaceForm.MatchString(s) }

// Records are the records in Redis. They are safe for concurrent use.
type Records struct {
	rdb     redis.UniversalClient
	sealer  *sealed.Sealer
	limits  batch.Limits
	ttl     time.Duration
	breaker *breaker.Breaker
	gets    *batch.Batcher[string, reply]
	stats   Stats

	fault      atomic.Pointer[error] // of the last batch; nil if it was answered
	connecting atomic.Bool

	mu      sync.Mutex
	pending []record // to be written
	writing bool
}

// Stats are the counters of Records.
type Stats struct {
	Queue    batch.Stats   // GETs that were not sent because too many waited
	Batches  atomic.Uint64 // of GETs
	Gets     atomic.Uint64 // in them
	Rejected atomic.Uint64 // values that were not sealed for their name
	Errors   atomic.Uint64 // GETs and SETs that failed or took too long
	Skipped  atomic.Uint64 // GETs and SETs that were not sent: the breaker was open, or too many SETs waited
}

type reply struct {
	value []byte // nil: none
	err   error
}

type record struct {
	name string
	body []byte
}

// New returns the Records in rdb, which are sealed by sealer and live for ttl.
func New(rdb redis.UniversalClient, sealer *sealed.Sealer, limits batch.Limits, ttl time.Duration, logger *slog.Logger) *Records {
	r := &Records{rdb: rdb, sealer: sealer, limits: limits, ttl: ttl}
	r.breaker = breaker.New(breakAfter, nil,
		func() {
			logger.Warn("apikey: Redis is not used, since it failed several times in a row", "error", r.Fault())
		},
		func() { logger.Info("apikey: Redis is used again") })
	r.gets = batch.New(limits, &r.stats.Queue, r.getBatch)
	return r
}

// Fault returns why the last command failed; nil if it did not.
func (r *Records) Fault() error {
	if err := r.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// Stats returns the counters.
func (r *Records) Stats() *Stats { return &r.stats }

// ErrRejected is the error of a value that was not sealed for its name.
var ErrRejected = errors.New("the value in Redis is not sealed under this secret for its name")

// Get returns the body of a record, or nil if there is none. Any error but ErrRejected means
// that Redis was not asked or did not answer.
func (r *Records) Get(name string) ([]byte, error) {
	answer, err := r.gets.Do(name, true)
	if err == nil {
		err = answer.err
	}
	switch {
	case err == nil && answer.value == nil:
		return nil, nil
	case err == nil:
		body, ok := r.sealer.Open(name, answer.value)
		if !ok {
			r.stats.Rejected.Add(1)
			return nil, ErrRejected
		}
		return body, nil
	case errors.Is(err, batch.ErrFull), errors.Is(err, batch.ErrWaited): // counted there
	case breaker.Skipped(err):
		r.stats.Skipped.Add(1)
	default:
		r.stats.Errors.Add(1)
	}
	return nil, err
}

func (r *Records) getBatch(ctx context.Context, names []string) ([]reply, error) {
	return breaker.Do(r.breaker, func() ([]reply, error) {
		r.stats.Batches.Add(1)
		r.stats.Gets.Add(uint64(len(names)))
		cmds := make([]*redis.StringCmd, len(names))
		if len(names) == 1 {
			cmds[0] = r.rdb.Get(ctx, names[0])
		} else {
			pipe := r.rdb.Pipeline()
			for i, name := range names {
				cmds[i] = pipe.Get(ctx, name)
			}
			_, _ = pipe.Exec(ctx) // each command has its own error
		}
		replies := make([]reply, len(names))
		failed := 0
		for i, cmd := range cmds {
			value, err := cmd.Bytes()
			if err != nil && !errors.Is(err, redis.Nil) {
				replies[i].err = err
				failed++
				continue
			}
			if err == nil {
				replies[i].value = value
			}
		}
		if failed == len(names) {
			r.failed(replies[0].err, names[0])
			return nil, replies[0].err
		}
		r.fault.Store(nil)
		return replies, nil
	})
}

// failed notes a failure. After a timeout, which connecting may have caused, it opens
// connections in the background, with a GET of name, for later batches to use.
func (r *Records) failed(err error, name string) {
	r.fault.Store(&err)
	network, is := errors.AsType[net.Error](err)
	timeout := errors.Is(err, context.DeadlineExceeded) || is && network.Timeout()
	if !timeout || !r.connecting.CompareAndSwap(false, true) {
		return
	}
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	for range r.limits.AtOnce {
		all.Go(func() {
			defer func() { _ = recover() }() // a hook of the client must not end the process
			_ = r.rdb.Get(ctx, name).Err()
		})
	}
	go func() {
		all.Wait()
		cancel()
		r.connecting.Store(false)
	}()
}

// Set writes a record to Redis soon, in the background.
func (r *Records) Set(name string, body []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pending) >= r.limits.Queue {
		r.stats.Skipped.Add(1)
		return
	}
	r.pending = append(r.pending, record{name, body})
	if !r.writing {
		r.writing = true
		go r.write()
	}
}

// write writes batches until nothing is pending.
func (r *Records) write() {
	for {
		r.mu.Lock()
		n := min(len(r.pending), r.limits.Size)
		if n == 0 {
			r.pending, r.writing = nil, false
			r.mu.Unlock()
			return
		}
		records := r.pending[:n:n]
		r.pending = r.pending[n:]
		r.mu.Unlock()
		r.setBatch(records)
	}
}

func (r *Records) setBatch(records []record) {
	failed := len(records) // if a hook of the client panics, or ends its goroutine
	_, err := batch.Run(func() (struct{}, error) {
		return breaker.Do(r.breaker, func() (none struct{}, err error) {
			ctx, cancel := context.WithTimeout(context.Background(), r.limits.Budget)
			defer cancel()
			pipe := r.rdb.Pipeline()
			for _, rec := range records {
				pipe.Set(ctx, rec.name, r.sealer.Seal(rec.name, rec.body), r.ttl)
			}
			cmds, err := pipe.Exec(ctx)
			bad := 0
			for _, cmd := range cmds {
				if cmd.Err() != nil {
					bad++
				}
			}
			if err == nil || bad > 0 { // else it was not sent at all
				failed = bad
			}
			if failed < len(records) {
				return none, nil
			}
			r.failed(err, records[0].name)
			return none, err
		})
	})
	if breaker.Skipped(err) {
		r.stats.Skipped.Add(uint64(len(records)))
		return
	}
	r.stats.Errors.Add(uint64(failed))
}
