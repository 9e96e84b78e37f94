package feed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/clock"
)

// Channel is where the triggers of the migrations announce.
const Channel = "apikey_changes"

const (
	minBackoff   = 50 * time.Millisecond
	maxBackoff   = 5 * time.Second
	closeTimeout = time.Second
)

// Follow fills log with what is announced on Channel until ctx ends. It listens
// on a connection taken out of the pool, and sends beats through the pool: one
// that comes back shows that the server the pool reads from delivers to the
// connection that listens. After any fault it starts a new session.
func Follow(ctx context.Context, pool *pgxpool.Pool, log *Log) {
	backoff := minBackoff
	for {
		err := follow(ctx, pool, log)
		if log.Session() != nil {
			backoff = minBackoff // it worked for a while
		}
		log.End(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff/2 + mathrand.N(backoff/2)):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// follow is one session, from LISTEN to the first fault.
func follow(ctx context.Context, pool *pgxpool.Pool, log *Log) error {
	conn, err := listen(ctx, pool, log.lease)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		_ = conn.Close(ctx)
	}()

	var beats beats
	ctx, cancel := context.WithCancel(ctx)
	var sender sync.WaitGroup
	sender.Go(func() { beats.send(ctx, pool, log.lease) })
	defer sender.Wait()
	defer cancel()

	for heard := time.Now(); ; {
		wait, cancel := context.WithDeadline(ctx, heard.Add(log.lease))
		n, err := conn.WaitForNotification(wait)
		cancel()
		switch {
		case err != nil && ctx.Err() == nil && wait.Err() != nil:
			return fmt.Errorf("no beat came back within %v: %w", log.lease, errors.Join(beats.fault(), err))
		case err != nil:
			return fmt.Errorf("listening: %w", err)
		}
		a, err := parse(n.Payload)
		if err != nil {
			return err // what it announces cannot be known, so nothing is until the next session
		}
		switch a.kind {
		case kindBeat:
			if sent, ok := beats.returned(a.subject); ok {
				log.Beat(clock.At(sent), a.xid)
				heard = sent
			}
		default:
			a.enter(log, clock.At(time.Now()))
		}
	}
}

// listen takes a connection out of pool and makes it listen.
func listen(ctx context.Context, pool *pgxpool.Pool, timeout time.Duration) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	pooled, err := pool.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	conn := pooled.Hijack()
	if _, err := conn.Exec(ctx, "LISTEN "+Channel); err != nil {
		_ = conn.Close(ctx)
		return nil, fmt.Errorf("LISTEN: %w", err)
	}
	return conn, nil
}

// beats are the beats of one session. The zero value is ready to send.
type beats struct {
	mu    sync.Mutex
	nonce string    // of the last one
	sent  time.Time // before it was sent
	err   error     // why it could not be sent
}

// send sends a beat four times a lease until ctx ends.
func (b *beats) send(ctx context.Context, pool *pgxpool.Pool, lease time.Duration) {
	tick := time.NewTicker(lease / 4)
	defer tick.Stop()
	for {
		err := b.sendOne(ctx, pool, lease)
		b.mu.Lock()
		b.err = err
		b.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (b *beats) sendOne(ctx context.Context, pool *pgxpool.Pool, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	nonce := rand.Text()
	b.mu.Lock()
	b.nonce, b.sent = nonce, time.Now()
	b.mu.Unlock()
	// As text, without a prepared statement, so that poolers do not mind.
	_, err = conn.Exec(ctx, fmt.Sprintf(
		`SELECT pg_notify('%s', '%s ' || pg_current_xact_id()::text || ' %s')`, Channel, kindBeat, nonce))
	return err
}

// returned reports when the last beat was sent, if that is the one with nonce.
func (b *beats) returned(nonce string) (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sent, nonce == b.nonce
}

func (b *beats) fault() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// The kinds of announcements: "key <xid> <first 8 bytes of the hash, in hex>",
// "plan <xid> <organisation>", "tier <xid> <name>", "keys <xid>", "plans <xid>",
// "all <xid>", "beat <xid> <nonce>".
const (
	kindKey   = "key"
	kindPlan  = "plan"
	kindTier  = "tier"
	kindKeys  = "keys"
	kindPlans = "plans"
	kindAll   = "all"
	kindBeat  = "beat"
)

type announcement struct {
	kind    string
	xid     uint64
	subject string
	key     uint64 // of kindKey: the subject as a number
}

func parse(payload string) (a announcement, err error) {
	kind, rest, _ := strings.Cut(payload, " ")
	xidText, subject, more := strings.Cut(rest, " ")
	a.kind, a.subject = kind, subject
	a.xid, err = strconv.ParseUint(xidText, 10, 64)
	known := a.xid != 0
	switch kind {
	case kindKey:
		if a.key, _ = strconv.ParseUint(subject, 16, 64); fmt.Sprintf("%016x", a.key) != subject {
			known = false
		}
	case kindPlan, kindTier, kindBeat:
		known = known && more
	case kindKeys, kindPlans, kindAll:
		known = known && !more
	default:
		known = false
	}
	if err != nil || !known {
		return announcement{}, fmt.Errorf("an announcement of unknown form: %q", payload)
	}
	return a, nil
}

// enter enters what was announced in log.
func (a announcement) enter(log *Log, now clock.Instant) {
	switch a.kind {
	case kindKey:
		log.Announce(KeyTopic(a.key), a.xid, now)
	case kindPlan:
		log.Announce(PlanTopic(a.subject), a.xid, now)
	case kindTier:
		log.Announce(TierTopic(a.subject), a.xid, now)
	case kindKeys:
		log.AnnounceAll(Key, a.xid)
	case kindPlans:
		log.AnnounceAll(Plan, a.xid)
	case kindAll:
		log.AnnounceAll(Key, a.xid)
		log.AnnounceAll(Plan, a.xid)
	}
}
