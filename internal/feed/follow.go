package feed

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/clock"
)

const (
	minBackoff    = 500 * time.Millisecond // also spreads a fleet that reconnects at the same time
	maxBackoff    = 5 * time.Second
	poolerBackoff = 2 * time.Minute
	remindEvery   = time.Minute // how often an outage is logged again
)

// Follow adds what is announced on Channel to log until ctx ends. It listens on a connection
// of its own, with the settings of pool but without its hooks. After any fault it starts a
// new session.
func Follow(ctx context.Context, pool *pgxpool.Pool, log *Log) {
	backoff := minBackoff
	var logged time.Time // when the present outage was
	for {
		err := guarded(func() error {
			s, err := connect(ctx, pool, log)
			if err != nil {
				return err
			}
			return s.run(ctx, pool)
		})
		if log.Live(clock.At(time.Now())) { // it has worked
			backoff = minBackoff
		}
		renewed := log.End(err)
		if ctx.Err() != nil {
			return
		}
		if renewed || logged.IsZero() || time.Since(logged) >= remindEvery {
			logged = time.Now()
			log.logger.Warn("apikey: announcements are not heard: a change may go unnoticed for MaxStaleness", "error", err)
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

// guarded calls do, and returns its error. If do panics, or ends its goroutine, that is an error, too.
func guarded(do func() error) error {
	_, err := batch.Run(func() (struct{}, error) { return struct{}{}, do() })
	return err
}
