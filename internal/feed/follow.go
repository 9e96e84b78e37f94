package feed

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/clock"
)

const (
	minBackoff    = 500 * time.Millisecond // a fleet that reconnects at once is spread over this
	maxBackoff    = 5 * time.Second
	poolerBackoff = 2 * time.Minute
	remindEvery   = time.Minute // the logger, of what has been told before
)

// Follow fills log with what is announced on Channel until ctx ends. It listens on a
// connection of its own, which is made as those of pool are, but without the pool's
// hooks. After any fault it starts a new session.
func Follow(ctx context.Context, pool *pgxpool.Pool, log *Log) {
	defer log.asked.Store(0)
	backoff := minBackoff
	var told time.Time // when the logger was
	for {
		err := guarded(func() error {
			s, err := connect(ctx, pool, log)
			if err != nil {
				return err
			}
			return s.run(ctx, pool)
		})
		if log.Live(clock.At(time.Now())) { // it worked for a while
			backoff = minBackoff
		}
		renewed := log.End(err)
		if ctx.Err() != nil {
			return
		}
		if renewed || told.IsZero() || time.Since(told) >= remindEvery {
			told = time.Now()
			log.logger.Warn("apikey: changes are not heard, so that they are noticed within MaxStaleness only", "error", err)
		}
		wait := rand.N(backoff)
		if errors.Is(err, errPooler) {
			wait = poolerBackoff/2 + rand.N(poolerBackoff)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// guarded returns the error of do. A panic is one, and does not end the process.
func guarded(do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return do()
}
