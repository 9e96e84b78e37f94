package feed

// One session on the wire: it listens, reads, and one of all sessions announces for all.
// It speaks the protocol itself, since a read must not wait for the answer to the one
// before: with a slow network that would take longer than the lease.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/snapshot"
)

const (
	readsPerLease  = 12
	readAtLeast    = time.Second // how often it reads at least: an announcer that is gone is missed
	quietPerLease  = 4           // after this part of a lease without an announcement a beat is sent
	closeTimeout   = time.Second
	connectTimeout = 10 * time.Second // to connect and begin, some six round trips

	// One session of a fleet, the announcer, announces what was committed this often, and
	// at most for half of the time.
	announceEvery = 20 * time.Millisecond

	// farAhead is how many transactions a server does not begin between two reads: an
	// announcement of one that is farther ahead is looked into at once.
	farAhead = 1 << 20
)

// errPooler is why a session is not begun behind a pooler: it would not be sent what is
// announced, and would leave LISTEN behind on connections that others are given.
var errPooler = errors.New("a pooler (such as PgBouncer) is in between, which does not deliver announcements: " +
	"give Watch a pool that connects to PostgreSQL directly; the stores may stay behind the pooler")

const (
	readSQL = `SELECT apikey_announce()`
	beatSQL = readSQL + `; SELECT pg_catalog.pg_notify('` + Channel + `', '` + kindBeat + ` ' || pg_catalog.pg_current_xact_id()::text)`

	// tryLockSQL makes the session the announcer, unless there is one. The lock is held
	// until the session ends.
	tryLockSQL = `SELECT pg_catalog.pg_try_advisory_lock(` + announcerLock + `, pg_catalog.hashtext('apikey_outbox'::regclass::oid::text))`

	// Whatever the role's settings are, the session announces, and waits for others who do.
	// It is idle for good. When this replica is suspended, or the network is gone, the server
	// is to notice soon: a session that is not read from holds up the notification queue
	// and VACUUM.
	settingsSQL = `SELECT pg_catalog.set_config(name, value, false) FROM pg_catalog.pg_settings JOIN (VALUES
		('default_transaction_isolation', 'read committed'), ('default_transaction_read_only', 'off'), ('statement_timeout', '0'),
		('lock_timeout', '0'), ('idle_session_timeout', '0'), ('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'),
		('tcp_user_timeout', '30000')) AS s (name, value) USING (name)`
)

// announcerLock is the class of the advisory locks of announcers: migration 0002 knows it
// too.
const announcerLock = "1634757477"

// AnnouncerSQL is an expression for whether there is an announcer, in whatever schema of
// the database.
const AnnouncerSQL = `EXISTS (SELECT FROM pg_catalog.pg_locks JOIN pg_catalog.pg_database d ON d.oid = database
	WHERE datname = pg_catalog.current_database() AND locktype = 'advisory' AND classid = ` + announcerLock + ` AND granted)`

// ServerSQL is an expression for the [snapshot.Server] that runs it, as a bigint: the
// microsecond in which it was started, hashed with the name of the database. 0 is a
// standby, whose snapshots are worth nothing.
const ServerSQL = `CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0 ELSE pg_catalog.hashtextextended(pg_catalog.current_database()::text, ` + startedSQL + `) END`

// OriginSQL is an expression for the [snapshot.Origin], as a bigint.
const OriginSQL = `(SELECT pg_catalog.hashtextextended(pg_catalog.concat_ws(' ', pg_catalog.current_database(), pg_catalog.to_regclass('api_keys')::oid,
	pg_catalog.to_regclass('org_plans')::oid), ` + startedSQL + `))`

const startedSQL = `(extract(epoch FROM pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint`

// historySQL tells what database this is, and which timeline of it: it changes when a
// standby is promoted, also if that had not received the last transactions.
const historySQL = `SELECT system_identifier::text || ' ' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) || ' ' ||
	(SELECT oid FROM pg_database WHERE datname = current_database()) FROM pg_control_system()`

// A wire is the connection of a session.
type wire struct {
	conn   *pgconn.HijackedConn
	log    *Log
	server snapshot.Server

	mu       sync.Mutex
	proof    proof
	asked    []clock.Instant // for snapshots, oldest first; zero: not for a read
	heard    time.Time       // when the last announcement was
	known    clock.Instant   // up to when all changes are known
	answered time.Time       // when the server last said something

	announcer chan struct{} // closed when the session is the announcer
	announced chan struct{} // an announcement that was asked for has been made
}

// connect makes a connection, and begins a session in log.
func connect(ctx context.Context, pool *pgxpool.Pool, log *Log) (*wire, error) {
	ctx, cancel := context.WithTimeout(ctx, max(log.lease, connectTimeout))
	defer cancel()
	config, err := connConfig(ctx, pool)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	log.asked.CompareAndSwap(0, int64(time.Since(began)))
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	log.asked.Store(0)
	w, err := begin(ctx, conn, log)
	if err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	return w, nil
}

// connConfig is how the pool connects, without what others do on its connections.
// BeforeConnect is part of how: it may fetch the password.
func connConfig(ctx context.Context, pool *pgxpool.Pool) (*pgx.ConnConfig, error) {
	poolConfig := pool.Config()
	config := poolConfig.ConnConfig.Copy()
	if poolConfig.BeforeConnect != nil {
		if err := poolConfig.BeforeConnect(ctx, config); err != nil {
			return nil, err
		}
	}
	config.OnNotification, config.OnNotice, config.AfterConnect, config.Tracer = nil, nil, nil, nil
	return config, nil
}

// begin makes a connection listen.
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
		history = strconv.FormatInt(int64(server), 10) // not for this role to see: then each run is a history
	}
	for _, sql := range []string{settingsSQL, "LISTEN " + Channel} {
		if _, err := conn.Exec(ctx, sql, simple); err != nil {
			return nil, fmt.Errorf("LISTEN: %w", err)
		}
	}
	asked := clock.At(time.Now())
	var text string
	if err := conn.QueryRow(ctx, readSQL, simple).Scan(&text); err != nil {
		if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == "42883" { // undefined_function
			err = fmt.Errorf("the migrations are older than this program, or not in the search_path: %w", err)
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
	w := &wire{conn: hijacked, log: log, server: server, answered: time.Now(), announcer: make(chan struct{}), announced: make(chan struct{}, 1)}
	first = first.On(server)
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

// send reads several times a lease, and sends a beat with it if nothing has been heard
// for that long from anybody. It returns an error when the server is silent for a
// lease.
func (w *wire) send(ctx context.Context) error {
	lease := w.log.lease
	// Others that begin at this moment need but one beat for all.
	wait := rand.N(lease/40 + 1)
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
		case w.log.Crowded():
			return errors.New("listening: more is announced than can be verified")
		}
		sql := readSQL
		if quiet >= lease/quietPerLease || age >= 3*lease/8 { // with a slow network the latter comes first
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
		wait = min(lease/readsPerLease, readAtLeast)
		wait += rand.N(wait/4 + 1)
	}
}

// announce announces what was committed, again and again, if the session is the
// announcer. The others read, and so announce what one that is in trouble does not.
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
		case <-time.After(max(announceEvery, time.Since(start))):
		}
	}
}

// query sends a query for a snapshot: a read that is asked for at a time, or, if that is
// zero, something else.
func (w *wire) query(sql string, asked clock.Instant) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, asked)
	w.log.asked.CompareAndSwap(0, int64(time.Since(began)))
	w.conn.Frontend.Send(&pgproto3.Query{String: sql})
	if err := w.conn.Conn.SetWriteDeadline(time.Now().Add(w.log.lease)); err != nil {
		return err
	}
	return w.conn.Frontend.Flush()
}

// readSoon sends a query for a snapshot, unless the answer to one is on its way.
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
	w.log.asked.Store(0)
	switch m := message.(type) {
	case *pgproto3.NotificationResponse:
		if m.Channel == Channel {
			return w.notified(m.Payload)
		}
	case *pgproto3.DataRow:
		switch value := string(m.Values[0]); value {
		case "": // of pg_notify
		case "f": // of tryLockSQL
		case "t":
			select {
			case <-w.announcer: // asked again before it was known
			default:
				close(w.announcer)
			}
		default:
			return w.snapshot(value)
		}
	case *pgproto3.ErrorResponse:
		return pgconn.ErrorResponseToPgError(m)
	}
	return nil
}

// snapshot takes the answer to the oldest query.
func (w *wire) snapshot(text string) error {
	snap, err := snapshot.Parse(text)
	if err != nil {
		return err
	}
	snap = snap.On(w.server)
	w.mu.Lock()
	if len(w.asked) == 0 {
		w.mu.Unlock()
		return errors.New("an answer to nothing")
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

// notified takes an announcement.
func (w *wire) notified(payload string) error {
	a, err := parse(payload)
	if err != nil {
		return err // what it announces cannot be known, so nothing is until the next session
	}
	now := time.Now()
	a.enter(w.log, clock.At(now))
	if a.kind != kindBeat {
		w.log.logger.Debug("apikey: a change is announced", "kind", a.kind, "subject", a.subject, "transaction", a.xid)
	}
	if w.log.FarAhead(a.xid, farAhead) { // false, most likely: it proves nothing, and is to be gone soon
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

// compare asks through the pool now and then which server the stores read from, if no
// store has told lately. That the pool has no connection free tells nothing.
func (w *wire) compare(ctx context.Context, pool *pgxpool.Pool) {
	defer func() { _ = recover() }() // a hook of the pool's: it must not end the process
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
