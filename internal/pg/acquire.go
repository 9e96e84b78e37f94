package pg

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/outage"
)

const (
	tooManyConnections = "53300" // SQLSTATE too_many_connections

	// knockEvery is how often a server is asked for a connection when it has refused one, since
	// each attempt makes it start a process. knockEvery is about the mean of what is waited.
	knockEvery  = time.Second
	waitForFree = 2 * time.Millisecond
)

// A limit remembers that the server refuses further connections.
type limit struct {
	mu    sync.Mutex
	last  *refusal // nil: it does not
	conns int32    // that the pool had then
	until time.Time
}

// A refusal is an answer of the server.
type refusal struct {
	err error
	at  time.Time
}

// refused returns the last refusal, and nil to one who may try again after a while.
func (l *limit) refused() *refusal {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last != nil && time.Now().After(l.until) {
		l.until = nextKnock()
		return nil
	}
	return l.last
}

// note notes how an attempt has ended when the pool had so many connections. That it did not get one
// for another reason than a refusal says that the server does not refuse any more.
func (l *limit) note(err error, conns int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case IsRefusal(err):
		l.last, l.conns, l.until = &refusal{err, time.Now()}, conns, nextKnock()
	case err != nil, conns > l.conns:
		l.last = nil
	}
}

// since returns the last refusal if it came after a time, or nil.
func (l *limit) since(t time.Time) *refusal {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == nil || l.last.at.Before(t) {
		return nil
	}
	return l.last
}

func nextKnock() time.Time { return time.Now().Add(knockEvery/2 + rand.N(knockEvery)) }

// IsRefusal reports whether err is a server's refusal of one more connection.
func IsRefusal(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == tooManyConnections
}

// acquire takes a connection from pool. If the server refuses further connections, it waits
// for one that the pool already has, until ctx ends. Without a deadline it does not wait.
func (l *limit) acquire(ctx context.Context, pool *pgxpool.Pool) (*pgxpool.Conn, error) {
	began := time.Now()
	_, limited := ctx.Deadline()
	for {
		refused := l.refused()
		if refused == nil {
			conn, err := pool.Acquire(ctx)
			l.note(err, pool.Stat().TotalConns())
			if !IsRefusal(err) || !limited {
				return conn, err
			}
		} else if !limited {
			return nil, refused.err
		}
		if conn := idle(ctx, pool); conn != nil {
			return conn, nil
		}
		select {
		case <-time.After(waitForFree):
			continue
		case <-ctx.Done():
		}
		if refused := l.since(began); refused != nil {
			return nil, refused.err // the server's word: more than that our time is over
		}
		return nil, ctx.Err()
	}
}

// idle returns a connection that the pool has and nobody uses, or nil.
func idle(ctx context.Context, pool *pgxpool.Pool) *pgxpool.Conn {
	if pool.Stat().IdleConns() == 0 {
		return nil
	}
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return nil
	}
	return conn
}

// GiveUp closes a connection of pool that nobody uses, so that the server has one more for others.
// It returns false if there is none, or it is the last one of the pool.
func GiveUp(ctx context.Context, pool *pgxpool.Pool) bool {
	if pool.Stat().TotalConns() < 2 {
		return false
	}
	done, err := batch.Run(func() (bool, error) { // hooks of the pool are called
		conn := idle(ctx, pool)
		if conn == nil {
			return false, nil
		}
		return true, conn.Hijack().Close(ctx)
	})
	return done || err != nil
}

// ofPool returns an error of a pool with its class: if it is neither of the server nor of the network,
// a hook of the application has returned it.
func ofPool(err error) error {
	_, server := errors.AsType[*pgconn.PgError](err)
	_, connecting := errors.AsType[*pgconn.ConnectError](err)
	_, network := errors.AsType[net.Error](err)
	if server || connecting || network || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return err
	}
	return outage.As(outage.Ours, err)
}

// An asker finds out whether a server is there when a lookup has got no connection from the
// pool: the pool does not say whether it waits for a place, for a hook of the application, or
// for the server. It asks by connecting, outside the pool, and does so once for all who wait.
type asker struct {
	mu     sync.Mutex
	latest *question // nil: none was asked
}

// A question is whether the server is there.
type question struct {
	deadline time.Time
	answered chan struct{} // closed when the fields below may be read
	at       time.Time
	err      error // nil: it is
}

// ask returns the question that is being asked, or was answered well since began, or else a
// new one, which is given up at a deadline.
func (a *asker) ask(began, deadline time.Time, pool *pgxpool.Pool) *question {
	a.mu.Lock()
	defer a.mu.Unlock()
	if q := a.latest; q != nil {
		select {
		case <-q.answered:
			if q.err == nil && q.at.After(began) {
				return q
			}
		default:
			return q
		}
	}
	q := &question{deadline: deadline, answered: make(chan struct{})}
	a.latest = q
	go func() {
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		defer cancel()
		_, q.err = batch.Run(func() (struct{}, error) { return struct{}{}, connectOnce(ctx, pool) })
		q.at = time.Now()
		close(q.answered)
	}()
	return q
}

// An asking belongs to one lookup.
type asking struct {
	ctx      context.Context
	began    time.Time
	sent     time.Time                // when the statement was; zero: it was not
	patient  time.Duration            // what is left of the time after that is nearly the whole
	timer    *time.Timer              // nil: there is nobody to ask
	question atomic.Pointer[question] // nil: the server was not asked
}

// begin is called when a lookup begins. If it has no connection when a quarter of its time is
// over, the server is asked.
func (a *asker) begin(ctx context.Context, db DB, l *limit) *asking {
	s := &asking{ctx: ctx, began: time.Now()}
	deadline, limited := ctx.Deadline()
	pool, pooled := db.(*pgxpool.Pool)
	if !limited || !pooled {
		return s
	}
	s.patient = deadline.Sub(s.began) / 4
	s.timer = time.AfterFunc(s.patient, func() {
		if l.since(s.began) == nil { // else it has said so
			s.question.Store(a.ask(s.began, deadline, pool))
		}
	})
	return s
}

// connected is called when the lookup has a connection.
func (s *asking) connected() {
	s.sent = time.Now()
	if s.atOnce() {
		s.end()
	}
}

// atOnce reports whether the statement had nearly the whole time.
func (s *asking) atOnce() bool { return !s.sent.IsZero() && s.sent.Sub(s.began) < s.patient }

// end is called when the lookup ends.
func (s *asking) end() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

// judge returns err with its class. A deadline is an outage only if the server was silent for
// nearly the whole time: the statement was sent at once, or the server did not let us connect
// when it was asked.
func (s *asking) judge(err error) error {
	late := s.ctx.Err() != nil && (errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err))
	if !late || s.timer == nil || s.atOnce() {
		return err
	}
	q := s.question.Load()
	if q == nil {
		return outage.As(outage.Busy, err)
	}
	class := outage.Busy
	select {
	case <-q.answered:
		if q.err != nil {
			class = outage.Of(q.err)
		}
	default:
		if time.Since(q.deadline) < s.patient { // else a hook hangs, and the server was not asked
			class = outage.Away
		}
	}
	return outage.As(class, err)
}

// ConnConfig returns the settings of pool without its hooks, except for BeforeConnect, which may
// set the password. What that returns is no outage.
func ConnConfig(ctx context.Context, pool *pgxpool.Pool) (*pgx.ConnConfig, error) {
	settings := pool.Config()
	config := settings.ConnConfig.Copy()
	if settings.BeforeConnect != nil {
		if err := settings.BeforeConnect(ctx, config); err != nil {
			return nil, outage.As(outage.Ours, err)
		}
	}
	config.OnNotification, config.OnNotice, config.AfterConnect, config.Tracer = nil, nil, nil, nil
	return config, nil
}

// connectOnce connects with the settings of pool.
func connectOnce(ctx context.Context, pool *pgxpool.Pool) error {
	config, err := ConnConfig(ctx, pool)
	if err != nil {
		return err
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	_ = conn.Close(ctx) // it was there
	return nil
}
