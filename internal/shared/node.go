package shared

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/breaker"
	"github.com/trackpilots/apikey/internal/outage"
)

const (
	// breakAfter is the number of batches that fail in a row before a breaker opens. A batch
	// has failed if none of its commands was answered.
	breakAfter = 10

	// connectTimeout is how long connecting may take: several round trips, and so often
	// longer than a request waits.
	connectTimeout = 5 * time.Second
)

// A node is a server of a Redis Cluster or a Ring, or whatever stands behind another client.
// Each has batches, queues and breakers of its own, since what fails is a node, and nobody
// who asks another one should wait for it. addr is "" for other clients, and until it is known
// which nodes there are.
//
// All commands go in pipelines, even a single one: the client may keep connections for
// pipelines that other commands do not use, and then it is these that must be open.
type node struct {
	*Records
	addr          string
	gets          *batch.Batcher[string, reply]
	reads, writes way
	connecting    atomic.Bool

	mu      sync.Mutex
	pending []record // to be written
	writing bool
}

type reply struct {
	value []byte // nil: none
	err   error
}

type record struct {
	name string
	body []byte
}

// A way is reading or writing. Either may fail alone: where nothing may be written, reading
// finds nothing and succeeds.
type way struct {
	node    *node
	what    string
	breaker *breaker.Breaker
	fault   atomic.Pointer[fault] // of the last batch; nil if all of it was answered
}

// A fault is why a command failed.
type fault struct {
	err  error
	node *node
	name string // of the record
}

func newNode(r *Records, addr string) *node {
	n := &node{Records: r, addr: addr}
	n.gets = batch.New(r.limits, &r.stats.Queue, n.getBatch)
	n.reads.init(n, "reading")
	n.writes.init(n, "writing")
	return n
}

func (w *way) init(n *node, what string) {
	w.node, w.what = n, what
	w.breaker = breaker.New(breakAfter, nil,
		func() {
			var err error
			if f := w.fault.Load(); f != nil {
				err = f.err
			}
			n.logger.Warn("apikey: Redis is not used for "+what+", since it failed several times in a row", "node", n.addr, "error", err)
		},
		func() { n.logger.Info("apikey: Redis is used again for "+what, "node", n.addr) })
}

// errEnded is the fault of a hook that panics, or ends its goroutine.
var errEnded error = outage.New(outage.Ours, "a hook of the client did not return")

// do sends a pipeline for the record of this name and others, unless the breaker is open. It
// returns the commands, each with an error of its own; or one error if nothing was answered.
func (w *way) do(ctx context.Context, name string, pipe redis.Pipeliner) ([]redis.Cmder, error) {
	return breaker.Do(w.breaker, func() ([]redis.Cmder, error) {
		first, failed := errEnded, 0
		defer func() { w.note(first, name) }()
		cmds, err := pipe.Exec(ctx)
		first = nil
		for _, cmd := range cmds {
			if cmdErr := cmd.Err(); isFailure(cmdErr) {
				first = cmp.Or(first, cmdErr)
				failed++
			}
		}
		if failed == 0 && isFailure(err) { // not even sent
			first, failed = err, len(cmds)
		}
		if failed == len(cmds) {
			return nil, first
		}
		w.node.answered.Store(true)
		return cmds, nil
	})
}

// isFailure reports whether err means that a command was not carried out. That there is no
// value, or one of another type, is an answer.
func isFailure(err error) bool {
	return err != nil && !errors.Is(err, redis.Nil) && !isWrongType(err)
}

func isWrongType(err error) bool { return redis.HasErrorPrefix(err, "WRONGTYPE") }

// note notes what has failed; nil if nothing has. Connecting may have caused a timeout, so
// after one it is done in the background.
func (w *way) note(err error, name string) {
	if err == nil {
		w.fault.Store(nil)
		return
	}
	network, is := errors.AsType[net.Error](err)
	if timeout := is && network.Timeout(); timeout || errors.Is(err, context.DeadlineExceeded) {
		if !errors.Is(err, context.DeadlineExceeded) { // the connection has noticed it first
			err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
		}
		w.node.connect(name)
	}
	w.fault.Store(&fault{describe(err, w.what, w.node.addr), w.node, name})
}

// connect opens connections in the background, for later batches to use: one for each batch
// that may run. It does so by reading the record of this name.
func (n *node) connect(name string) {
	if !n.connecting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer n.connecting.Store(false)
		ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
		defer cancel()
		var all []<-chan batch.Result[[]redis.Cmder]
		for range n.limits.AtOnce + 1 { // of reads, and one of writes
			all = append(all, batch.Start(func() ([]redis.Cmder, error) { return n.read(ctx, []string{name}).Exec(ctx) }))
		}
		for _, one := range all {
			if r := <-one; r.Err == nil {
				n.answered.Store(true)
			}
		}
	}()
}

// read returns a pipeline that reads records. Of a value that is too long it reads the
// beginning, which is not sealed.
func (n *node) read(ctx context.Context, names []string) redis.Pipeliner {
	pipe := n.rdb.Pipeline()
	for _, name := range names {
		pipe.GetRange(ctx, name, 0, MaxRecord-1)
	}
	return pipe
}

func (n *node) getBatch(ctx context.Context, names []string) ([]reply, error) {
	cmds, err := n.reads.do(ctx, names[0], n.read(ctx, names))
	if !breaker.Skipped(err) {
		n.stats.Batches.Add(1)
		n.stats.Gets.Add(uint64(len(names)))
	}
	if err != nil {
		return nil, err
	}
	replies := make([]reply, len(names))
	for i, cmd := range cmds {
		switch value, err := cmd.(*redis.StringCmd).Bytes(); {
		case isWrongType(err):
			replies[i].err = ErrRejected
		case isFailure(err):
			replies[i].err = err
		case len(value) > 0: // GETRANGE says the same of no value and of an empty one
			replies[i].value = value
		}
	}
	return replies, nil
}

// set writes a record soon, unless too many wait.
func (n *node) set(rec record) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pending) >= n.limits.Queue {
		return false
	}
	n.pending = append(n.pending, rec)
	if !n.writing {
		n.writing = true
		go n.write()
	}
	return true
}

// write writes batches until nothing is pending.
func (n *node) write() {
	for {
		n.mu.Lock()
		size := min(len(n.pending), n.limits.Size)
		if size == 0 {
			n.pending, n.writing = nil, false
			n.mu.Unlock()
			return
		}
		records := n.pending[:size:size]
		n.pending = n.pending[size:]
		n.mu.Unlock()
		n.setBatch(records)
	}
}

func (n *node) setBatch(records []record) {
	cmds, err := batch.Run(func() ([]redis.Cmder, error) {
		ctx, cancel := context.WithTimeout(context.Background(), n.limits.Budget)
		defer cancel()
		pipe := n.rdb.Pipeline()
		for _, rec := range records {
			pipe.Set(ctx, rec.name, n.sealer.Seal(rec.name, rec.body), n.ttl)
		}
		return n.writes.do(ctx, records[0].name, pipe)
	})
	switch {
	case breaker.Skipped(err):
		n.stats.Skipped.Add(uint64(len(records)))
	case err != nil:
		n.stats.Errors.Add(uint64(len(records)))
	}
	for _, cmd := range cmds {
		if cmd.Err() != nil {
			n.stats.Errors.Add(1)
		}
	}
}
