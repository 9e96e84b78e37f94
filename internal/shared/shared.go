// Package shared has the records in Redis, which all replicas share. They are sealed, and
// found by name. A record that is slow, missing or not sealed under the secret is a miss. A
// record that cannot be written is dropped.
package shared

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	// DefaultTimeout is how long a request waits for Redis by default.
	DefaultTimeout = 50 * time.Millisecond

	// Root is the beginning of all names of records. It changes with their encoding.
	Root = "apikey:3:"

	// MaxRecord is how many bytes of a value are read: whoever can write to Redis could
	// else fill our memory. Most records have 250. A snapshot lists the transactions that
	// were writing when it was taken, and this is room for more than a thousand.
	MaxRecord = 16 << 10
)

var namespaceForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// ValidNamespace reports whether s may be a namespace.
func ValidNamespace(s string) bool { return namespaceForm.MatchString(s) }

// Records are the records in Redis. They are safe for concurrent use.
type Records struct {
	rdb    redis.UniversalClient
	sealer *sealed.Sealer
	limits batch.Limits // of each node
	ttl    time.Duration
	logger *slog.Logger
	stats  Stats

	answered atomic.Bool // by any node; the client then knows which nodes there are
	mu       sync.RWMutex
	nodes    map[string]*node // by address
}

// Stats are the counters of Records.
type Stats struct {
	Queue    batch.Stats   // reads that were not sent because too many waited
	Batches  atomic.Uint64 // of reads
	Gets     atomic.Uint64 // in them
	Rejected atomic.Uint64 // values that were not sealed for their name
	Errors   atomic.Uint64 // reads and writes that failed or took too long
	Skipped  atomic.Uint64 // reads and writes that were not sent: a breaker was open, too many writes waited, or a record was too long
}

// New returns the Records in rdb, which are sealed by sealer and live for ttl.
func New(rdb redis.UniversalClient, sealer *sealed.Sealer, limits batch.Limits, ttl time.Duration, logger *slog.Logger) *Records {
	return &Records{rdb: rdb, sealer: sealer, limits: limits, ttl: ttl, logger: logger, nodes: map[string]*node{}}
}

// Stats returns the counters.
func (r *Records) Stats() *Stats { return &r.stats }

// Fault returns why reading or writing has failed, if it has not succeeded since on the node
// where it did; else nil. It returns all such errors, joined.
func (r *Records) Fault() error {
	r.mu.RLock()
	var faults []*fault
	for _, n := range r.nodes {
		for _, way := range []*way{&n.reads, &n.writes} {
			if f := way.fault.Load(); f != nil {
				faults = append(faults, f)
			}
		}
	}
	r.mu.RUnlock()
	var errs []error
	for _, f := range faults {
		if r.node(f.name) == f.node { // else other nodes have its records now
			errs = append(errs, f.err)
		}
	}
	return errors.Join(errs...)
}

// ErrRejected is the error of a value that was not sealed for its name.
var ErrRejected = errors.New("the value in Redis is not sealed under this secret for its name")

// Get returns the body of a record, or nil if there is none. Any error but ErrRejected means
// that Redis was not asked or did not answer.
func (r *Records) Get(name string) ([]byte, error) {
	answer, err := r.node(name).gets.Do(name, true)
	if err == nil {
		err = answer.err
	}
	switch {
	case err == nil && answer.value == nil:
		return nil, nil
	case err == nil:
		if body, ok := r.sealer.Open(name, answer.value); ok {
			return body, nil
		}
		err = ErrRejected
		r.stats.Rejected.Add(1)
	case errors.Is(err, ErrRejected):
		r.stats.Rejected.Add(1)
	case errors.Is(err, batch.ErrFull), errors.Is(err, batch.ErrWaited): // counted there
	case breaker.Skipped(err):
		r.stats.Skipped.Add(1)
	default:
		r.stats.Errors.Add(1)
	}
	return nil, err
}

// Set writes a record to Redis soon, in the background, unless nobody would read it again
// because it is longer than MaxRecord.
func (r *Records) Set(name string, body []byte) {
	if len(body)+sealed.Overhead > MaxRecord || !r.node(name).set(record{name, body}) {
		r.stats.Skipped.Add(1)
	}
}

// maxNodes is how many nodes a Redis Cluster may have. If we know more, most are gone.
const maxNodes = 1000

// node returns the node that has the record of this name, as far as the client knows.
func (r *Records) node(name string) *node {
	addr := ""
	if r.answered.Load() {
		addr = r.locate(name)
	}
	r.mu.RLock()
	n := r.nodes[addr]
	r.mu.RUnlock()
	if n != nil {
		return n
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[addr]; n != nil {
		return n
	}
	if len(r.nodes) >= maxNodes {
		clear(r.nodes)
	}
	n = newNode(r, addr)
	r.nodes[addr] = n
	return n
}

// locate returns the address of the node that has the record of this name in a Redis Cluster
// or a Ring; "" for other clients. It does no I/O once the client knows its nodes, which is
// when any of them has answered.
func (r *Records) locate(name string) string {
	var at *redis.Client
	var err error
	switch rdb := r.rdb.(type) {
	case interface {
		MasterForKey(context.Context, string) (*redis.Client, error)
	}:
		at, err = rdb.MasterForKey(context.Background(), name)
	case interface {
		GetShardClientForKey(string) (*redis.Client, error)
	}:
		at, err = rdb.GetShardClientForKey(name)
	}
	if err != nil || at == nil {
		return ""
	}
	return at.Options().Addr
}

// describe returns err with what was done, and where.
func describe(err error, what, addr string) error {
	if addr == "" {
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s %s: %w", what, addr, err)
}
