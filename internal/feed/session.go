package feed

// A session on its connection. All sessions listen and read, and one of them, the announcer,
// announces for all. The session speaks the PostgreSQL protocol itself, since it must send a
// read before the previous one was answered: with a slow network that would take too long.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/snapshot"
)

const (
	readsPerLease  = 12
	readAtLeast    = time.Second // the longest time between reads, which announce if the announcer is gone, unless the announcer is slower
	quietPerLease  = 4           // a beat is sent after a lease/quietPerLease without announcements
	closeTimeout   = time.Second
	maxGivenUp     = 8                // connections of the pool that are closed for a session, if the server refuses it one
	connectTimeout = 10 * time.Second // to connect and begin, which takes about six round trips

	// farAhead is more transactions than a server begins between two reads. Announcements
	// of transactions farther ahead are verified at once.
	farAhead = 1 << 20
)

// errPooler refuses a session behind a pooler: it would not receive announcements, and would
// leave LISTEN behind on the connections of others.
var errPooler = errors.New("a pooler (such as PgBouncer) is in between, which does not deliver announcements: " +
	"give Watch a pool that connects to PostgreSQL directly; the stores may stay behind the pooler")

// A wire is the connection of a session.
type wire struct {
	conn   *pgconn.HijackedConn
	log    *Log
	server snapshot.Server // of its period

	mu       sync.Mutex
	proof    proof
	asked    []clock.Instant // when the queries without an answer were sent, oldest first; zero: it is no read
	heard    time.Time       // when the last announcement arrived
	known    clock.Instant   // up to when all changes are known
	answered time.Time       // when the last message arrived

	every     atomic.Int64  // how often the announcer is to announce, in milliseconds
	announcer chan struct{} // closed when the session has become the announcer
	announced chan struct{} // receives when a call of the announcer was answered
}

// connect opens a connection, and begins a session in log.
func connect(ctx context.Context, pool *pgxpool.Pool, log *Log) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, max(log.lease, connectTimeout))
	defer cancel()
	config, err := pg.ConnConfig(ctx, pool)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	// What arrives before the connection is ours. The first read announces, too.
	var early []string
	config.OnNotification = func(_ *pgconn.PgConn, n *pgconn.Notification) {
		if n.Channel == Channel {
			early = append(early, n.Payload)
		}
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	for range maxGivenUp {
		// Hearing of changes is worth more than one more lookup at a time.
		if !pg.IsRefusal(err) || !pg.GiveUp(ctx, pool) {
			break
		}
		conn, err = pgx.ConnectConfig(ctx, config)
	}
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	w, err := begin(ctx, conn, log)
	if err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	for _, payload := range early {
		if err := w.notified(payload); err != nil {
			w.close()
			return nil, err
		}
	}
	return w, nil
}

// begin begins a session on a connection.
func begin(ctx context.Context, conn *pgx.Conn, log *Log) (*wire, error) {
	simple := pgx.QueryExecModeSimpleProtocol
	var pid uint32
	var server snapshot.Server
	if err := conn.QueryRow(ctx, `SELECT pg_catalog.pg_backend_pid(), `+ServerSQL, simple).Scan(&pid, &server); err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	switch {
	case pid != conn.PgConn().PID(): // which the client was told when it connected
		return nil, errPooler
	case server == 0:
		return nil, errors.New("connecting: this is a standby, where nothing is announced: connect to the primary")
	}
	var history string
	if err := conn.QueryRow(ctx, historySQL, simple).Scan(&history); err != nil {
		history = strconv.FormatInt(int64(server), 10) // the role may not read it: each run counts as a history
	}
	for _, sql := range []string{settingsSQL, "LISTEN " + Channel} {
		if _, err := conn.Exec(ctx, sql, simple); err != nil {
			return nil, fmt.Errorf("LISTEN: %w", err)
		}
	}
	asked := clock.At(time.Now())
	var text string
	var every int64
	if err := conn.QueryRow(ctx, readSQL, simple).Scan(&text, &every); err != nil {
		if e, ok := errors.AsType[*pgconn.PgError](err); ok {
			switch e.Code {
			case "42883", "42703": // undefined_function, undefined_column
				err = fmt.Errorf("the migrations are older than this program, or not in the search_path: %w", err)
			case "42501": // insufficient_privilege
				err = fmt.Errorf("GRANT EXECUTE ON FUNCTION apikey_announce() to this role: %w", err)
			}
		}
		return nil, fmt.Errorf("LISTEN: %w", err)
	}
	first, err := snapshot.Parse(text)
	if err != nil {
		return nil, err
	}
	hijacked, err := conn.PgConn().Hijack()
	if err != nil {
		return nil, err
	}
	w := &wire{conn: hijacked, log: log, answered: time.Now(), announcer: make(chan struct{}), announced: make(chan struct{}, 1)}
	w.every.Store(every)
	w.server = log.newPeriod(server, asked)
	first = first.On(w.server)
	w.proof.read(read{asked, first})
	log.Begin(History(history), first, asked)
	return w, nil
}

// run receives until the first fault, or until ctx ends.
func (w *wire) run(ctx context.Context, pool *pgxpool.Pool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var senders sync.WaitGroup
	defer senders.Wait()
	defer cancel(nil)
	defer w.close()
	senders.Go(func() { cancel(guarded(func() error { return w.send(ctx) })) })
	senders.Go(func() { cancel(guarded(func() error { return w.announce(ctx) })) })
	senders.Go(func() { w.compare(ctx, pool) })
	stop := context.AfterFunc(ctx, func() { _ = w.conn.Conn.SetReadDeadline(time.Now()) })
	defer stop()
	for {
		err := w.receive()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return context.Cause(ctx)
		default:
			return fmt.Errorf("listening: %w", err)
		}
	}
}

func (w *wire) close() {
	_ = w.conn.Conn.SetDeadline(time.Now().Add(closeTimeout))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conn.Frontend.Send(&pgproto3.Terminate{})
	_ = w.conn.Frontend.Flush()
	_ = w.conn.Conn.Close()
}

// send reads several times per lease, and adds a beat if nothing was announced for a while.
// It returns an error if the server is silent for a lease.
func (w *wire) send(ctx context.Context) error {
	lease := w.log.lease
	// Sessions that begin at the same time need only one beat.
	wait := rand.N(min(lease/40, readAtLeast) + 1)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		w.mu.Lock()
		silent, quiet, age := time.Since(w.answered), time.Since(w.heard), w.known.Age(clock.At(time.Now()))
		w.mu.Unlock()
		switch {
		case silent >= lease:
			return fmt.Errorf("listening: nothing came from the server for %v", lease)
		case w.log.Mismatched():
			return ErrOtherServer
		}
		sql := readSQL
		if quiet >= lease/quietPerLease || age >= 3*lease/8 { // with a slow network the second comes first
			sql = beatSQL
		}
		select {
		case <-w.announcer:
		default:
			sql += "; " + tryLockSQL
		}
		if err := w.query(sql, clock.At(time.Now())); err != nil {
			return fmt.Errorf("listening: %w", err)
		}
		wait = min(lease/readsPerLease, max(readAtLeast, w.announceEvery()))
		wait += rand.N(wait/4 + 1)
	}
}

// announceEvery is how often the announcer announces: a setting of the database.
func (w *wire) announceEvery() time.Duration {
	return time.Duration(w.every.Load()) * time.Millisecond
}

// announce announces every announceEvery, once the session is the announcer. It pauses at least
// as long as the last call has taken. If the announcer is in trouble, the reads of the others
// announce.
func (w *wire) announce(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-w.announcer:
	}
	for {
		start := time.Now()
		if err := w.query(readSQL, clock.Instant{}); err != nil {
			return fmt.Errorf("announcing: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.announced:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(w.announceEvery(), time.Since(start))):
		}
	}
}

// query sends a query that returns a snapshot. asked is when a read was asked for, or zero for
// a call of the announcer.
func (w *wire) query(sql string, asked clock.Instant) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, asked)
	w.conn.Frontend.Send(&pgproto3.Query{String: sql})
	if err := w.conn.Conn.SetWriteDeadline(time.Now().Add(w.log.lease)); err != nil {
		return err
	}
	return w.conn.Frontend.Flush()
}

// readSoon sends a read, unless one is under way.
func (w *wire) readSoon() error {
	w.mu.Lock()
	waiting := slices.ContainsFunc(w.asked, func(asked clock.Instant) bool { return asked != clock.Instant{} })
	w.mu.Unlock()
	if waiting {
		return nil
	}
	return w.query(readSQL, clock.At(time.Now()))
}

// receive receives one message.
func (w *wire) receive() error {
	message, err := w.conn.Frontend.Receive()
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.answered = time.Now()
	w.mu.Unlock()
	switch m := message.(type) {
	case *pgproto3.NotificationResponse:
		if m.Channel == Channel {
			return w.notified(m.Payload)
		}
	case *pgproto3.DataRow:
		if len(m.Values) == 2 { // readSQL
			return w.snapshot(string(m.Values[0]), string(m.Values[1]))
		}
		if string(m.Values[0]) != "t" { // pg_notify, or tryLockSQL in vain
			return nil
		}
		select {
		case <-w.announcer: // asked again before it was known
		default:
			close(w.announcer)
		}
	case *pgproto3.ErrorResponse:
		return pgconn.ErrorResponseToPgError(m)
	}
	return nil
}

// snapshot handles the answer to the oldest query.
func (w *wire) snapshot(text, againAfter string) error {
	snap, err := snapshot.Parse(text)
	if err != nil {
		return err
	}
	every, err := strconv.ParseInt(againAfter, 10, 64)
	if err != nil {
		return err
	}
	w.every.Store(every)
	snap = snap.On(w.server)
	w.mu.Lock()
	if len(w.asked) == 0 {
		w.mu.Unlock()
		return errors.New("listening: an answer without a query")
	}
	asked := w.asked[0]
	w.asked = w.asked[1:]
	if asked == (clock.Instant{}) {
		w.mu.Unlock()
		w.announced <- struct{}{}
		return nil
	}
	w.proof.read(read{asked, snap})
	w.mu.Unlock()
	w.log.Reached(snap, asked)
	return nil
}

// notified handles an announcement.
func (w *wire) notified(payload string) error {
	a, err := parse(payload)
	if err != nil {
		return err
	}
	now := time.Now()
	a.enter(w.log, clock.At(now))
	if w.log.Crowded() { // the last one was not noted
		return errors.New("more is announced than can be verified")
	}
	if a.kind != kindBeat {
		w.log.logger.Debug("apikey: a change is announced", "kind", a.kind, "subject", fmt.Sprintf("%016x", a.subject), "transaction", a.xid)
	}
	if w.log.FarAhead(a.xid, farAhead) { // most likely forged: it proves nothing
		return w.readSoon()
	}
	w.mu.Lock()
	w.heard = now
	known, ok := w.proof.heard(a.xid)
	if ok {
		w.known = known
	}
	w.mu.Unlock()
	if ok {
		w.log.Renew(known)
	}
	return nil
}

// compare asks through the pool now and then which server the stores read from, if no store
// has reported it lately. It ignores errors: the pool may be busy.
func (w *wire) compare(ctx context.Context, pool *pgxpool.Pool) {
	defer func() { _ = recover() }() // a hook of the pool must not end the process
	lease := w.log.lease
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(lease/2 + rand.N(lease/8+1)):
		}
		if w.log.readSince(lease / 2) {
			continue
		}
		ask, cancel := context.WithTimeout(ctx, lease/4)
		var server snapshot.Server
		err := pool.QueryRow(ask, `SELECT `+ServerSQL, pgx.QueryExecModeExec).Scan(&server)
		cancel()
		if err == nil {
			w.log.Read(server)
		}
	}
}
