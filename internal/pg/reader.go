package pg

import (
	"context"
	"errors"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/snapshot"
)

// A Reader looks up rows. It is safe for concurrent use if its DB is.
type Reader struct {
	db    DB
	asker asker
	limit limit
}

// NewReader returns a Reader of db.
func NewReader(db DB) *Reader { return &Reader{db: db} }

// DB returns what it reads from.
func (r *Reader) DB() DB { return r.db }

// A Lookup is a statement that looks up the subject $1, and one for many subjects. The first
// columns are a snapshot, whether it is of a standby, the [snapshot.Origin], and the process that
// answers.
type Lookup struct{ One, Many string }

// LookUp looks up the subjects, reports the stamp, and calls each for every row, with the
// columns set; if a statement has to be run again, it may do so twice for a row. The class of
// the error says whether it is an outage: see package outage.
func LookUp[S any](ctx context.Context, r *Reader, l Lookup, subjects []S, columns []any, each func()) error {
	asked := r.asker.begin(ctx, r.db, &r.limit)
	defer asked.end()
	pool, pooled := r.db.(*pgxpool.Pool)
	if !pooled {
		conn := connOf(r.db)
		asked.connected()
		return asked.judge(lookUp(ctx, r.db, conn, l, subjects, columns, each))
	}
	for tries := pool.Config().MaxConns; ; tries-- {
		conn, err := r.limit.acquire(ctx, pool)
		if err != nil {
			return asked.judge(ofPool(err))
		}
		asked.connected()
		dead := false
		err = func() error {
			defer conn.Release() // a hook may panic, or end the goroutine
			err := lookUp(ctx, conn, conn.Conn(), l, subjects, columns, each)
			dead = conn.Conn().IsClosed() && isLastWord(err)
			return err
		}()
		// The pool does not notice that the server has closed its connections, as it has all of them
		// when it was started again. That says nothing about the server: another one is tried, or made.
		if !dead || ctx.Err() != nil || tries <= 0 {
			return asked.judge(err)
		}
	}
}

// isLastWord reports whether err may be what a connection said before it was used, or nothing: the
// server had ended it.
func isLastWord(err error) bool {
	e, said := errors.AsType[*pgconn.PgError](err)
	return err != nil && (!said || slices.Contains([]string{"57P01", "57P02", "57P05"}, e.Code))
}

// connOf returns the connection of db; nil: not known.
func connOf(db DB) *pgx.Conn {
	switch d := db.(type) {
	case *pgx.Conn:
		return d
	case pgx.Tx:
		return d.Conn()
	}
	return nil
}

// lookUp is LookUp on a connection; conn may be nil.
func lookUp[S any](ctx context.Context, db DB, conn *pgx.Conn, l Lookup, subjects []S, columns []any, each func()) error {
	statement, arg := l.Many, any(subjects)
	if len(subjects) == 1 {
		statement, arg = l.One, subjects[0]
	}
	var stamp string
	var standby bool
	var origin snapshot.Origin
	var pid uint32
	columns = append([]any{&stamp, &standby, &origin, &pid}, columns...)
	query := func(args ...any) error {
		rows, err := db.Query(ctx, statement, args...)
		if err != nil {
			return err
		}
		_, err = pgx.ForEachRow(rows, columns, func() error { each(); return nil })
		return err
	}
	var err error
	if isUnpooled(conn) {
		err = query(arg)
	}
	if !isUnpooled(conn) || isStale(err) && conn.PgConn().TxStatus() == 'I' {
		err = query(pgx.QueryExecModeExec, arg)
	}
	if err != nil {
		return err
	}
	if conn != nil && conn.PgConn().PID() == pid {
		conn.PgConn().CustomData()[unpooledKey] = true
	}
	snapshot.ReportOrigin(ctx, origin)
	if standby {
		snapshot.ReportStandby(ctx)
		return nil
	}
	snapshot.Report(ctx, stamp, snapshot.Server(origin))
	return nil
}

// isStale reports whether err is that of a prepared statement which cannot be used any longer.
// pgx forgets such a statement, and prepares it anew the next time.
func isStale(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (e.Code == "0A000" || e.Code == "26000" || e.Code == "42P05")
}

// unpooledKey marks connections without a pooler in between.
const unpooledKey = "github.com/trackpilots/apikey: without a pooler"

// isUnpooled reports whether conn is known to lead to PostgreSQL itself: the process that
// answers is the one that it was connected to. A pooler may run each statement on another
// connection, where it is not prepared.
func isUnpooled(conn *pgx.Conn) bool {
	return conn != nil && conn.PgConn().CustomData()[unpooledKey] != nil
}
