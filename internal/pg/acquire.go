package pg

import (
	"context"
	"errors"
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
	waitForFree        = 5 * time.Millisecond
	maxTries           = 200
)

// acquire takes a connection from pool. If the server refuses further connections, it waits
// for one that the pool already has.
func acquire(ctx context.Context, pool *pgxpool.Pool) (*pgxpool.Conn, error) {
	var refusal error // the server's word: more than that our time is over
	for tries := 0; ; tries++ {
		conn, err := pool.Acquire(ctx)
		if err == nil {
			return conn, nil
		}
		e, ok := errors.AsType[*pgconn.PgError](err)
		switch refused := ok && e.Code == tooManyConnections; {
		case refused:
			refusal = err
		case ctx.Err() != nil && refusal != nil:
			return nil, refusal
		default:
			return nil, err
		}
		if pool.Stat().TotalConns() == 0 || tries == maxTries {
			return nil, err
		}
		select {
		case <-time.After(waitForFree):
		case <-ctx.Done():
		}
	}
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
func (a *asker) begin(ctx context.Context, db DB) *asking {
	s := &asking{ctx: ctx, began: time.Now()}
	deadline, limited := ctx.Deadline()
	pool, pooled := db.(*pgxpool.Pool)
	if !limited || !pooled {
		return s
	}
	s.patient = deadline.Sub(s.began) / 4
	s.timer = time.AfterFunc(s.patient, func() { s.question.Store(a.ask(s.began, deadline, pool)) })
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

// connectOnce connects with the settings of pool, without its hooks except for BeforeConnect,
// which may set the password.
func connectOnce(ctx context.Context, pool *pgxpool.Pool) error {
	settings := pool.Config()
	config := settings.ConnConfig.Copy()
	if settings.BeforeConnect != nil {
		if err := settings.BeforeConnect(ctx, config); err != nil {
			return err
		}
	}
	config.OnNotification, config.OnNotice, config.AfterConnect, config.Tracer = nil, nil, nil, nil
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	_ = conn.Close(ctx) // it was there
	return nil
}
