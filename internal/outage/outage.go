// Package outage says what is an outage. While a store is away, known good keys are admitted
// on facts that are past their time, and so nothing else may be taken for it: whoever causes
// load could keep a revoked key alive.
//
// The rule: an outage is what the server or the network says of this lookup. It refused,
// failed, or stayed silent for the whole budget while a connection was at hand, or did not
// even connect. A full queue, a busy pool, a wait spent behind others, a statement of ours
// that the server rejects, a right that is missing, a session for announcements that never
// was: none of these is an outage, and none admits anything stale.
//
// A lookup that was never sent takes the server's word on those that it waited for. It is an
// outage only if each that ended meanwhile was away, and at least one was.
//
// Only what is away counts for the circuit breaker; all else neither opens nor closes it. A
// lookup that the open breaker skips is an outage. While the breaker tries whether the store
// is back, what it skips takes the word of the last lookup that was sent.
package outage

import (
	"errors"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// A Class says what the error of a lookup means.
type Class int

// The classes. Only Away is an outage.
const (
	Away       Class = iota // the server or the network refused, failed or stayed silent
	Busy                    // there was no place: in a queue, in a pool, or on the server, which is there
	Ours                    // the server rejects what we ask, or this program is at fault
	NotAllowed              // the role may not log in, or may not read
)

// String returns the name of the class.
func (c Class) String() string { return [...]string{"away", "busy", "ours", "not allowed"}[c] }

// states are the classes of SQLSTATEs, and of classes of SQLSTATEs. Any other is Ours: the
// server is there, and has said no.
var states = map[string]Class{
	"08":    Away, // the connection failed, or a pooler could not make one
	"57P01": Away, // the server shuts down, or an administrator ended the session
	"57P02": Away, // it crashed
	"57P03": Away, // it starts, recovers or shuts down
	"57P04": Away, // the database was dropped: load does not do that
	"57P05": Away, // the server ended an idle session, as 57P01 does: no load has caused it
	"3D000": Away, // there is no such database: dropped, or about to be restored
	"58":    Away, // the disk fails
	"XX001": Away, // the data is damaged
	"XX002": Away, // an index is

	"53":    Busy, // no connection, no memory, no space on disk
	"57014": Busy, // statement_timeout, or an administrator cancelled it
	"55P03": Busy, // lock_timeout
	"55006": Busy, // the database is in use by what excludes others, such as its own copying
	"40":    Busy, // deadlock, serialization, or recovery on a standby: all by what others do
	"25P04": Busy, // transaction_timeout

	"42501": NotAllowed,
	"28":    NotAllowed,

	// Those that say why the default is what it is.
	"0A000": Ours, // the plan of a prepared statement is stale; tried again unprepared
	"26000": Ours, // a pooler has no such prepared statement; the same
	"42P05": Ours, // or has it already; the same
	"42":    Ours, // a table, column or function is missing: 42P01, 42703, 42883
	"22":    Ours, // what was asked for is malformed; not what others wait for
	"25":    Ours, // the state of the application's own transaction: 25P02, 25006
	"54":    Ours, // a limit that no other statement changes, such as the depth of the stack
	"XX000": Ours, // an internal error; poolers such as Supavisor say so of too many clients
}

// poolerBusy are the words of PgBouncer for overload. Its SQLSTATE is always 08P01.
var poolerBusy = []string{"query_wait_timeout", "no more connections allowed"}

// clientSide are the errors of pgx before anything was sent. Those of closed things are ours,
// since it is this program that has closed them. pgx exports none of the texts.
var clientSide = map[string]Class{
	"conn busy":   Busy, // a single connection, used by several at once
	"closed pool": Ours,
}

// An Error is an error of a known class.
type Error struct {
	class Class
	err   error
}

// New returns an error of a class.
func New(class Class, text string) *Error { return &Error{class, errors.New(text)} }

// As returns err with another class than its own.
func As(class Class, err error) *Error { return &Error{class, err} }

func (e *Error) Error() string { return e.err.Error() }

// Unwrap returns the error without its class.
func (e *Error) Unwrap() error { return e.err }

// Of returns the class of the error of a lookup, whosever store it is. What it does not know
// is Away: a store of the user's own says with any error that it could not be read. So is a
// deadline: who waited, and should have known, says so by [As].
func Of(err error) Class {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.class
	}
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return ofState(e)
	}
	if _, ok := errors.AsType[pgx.ScanArgError](err); ok || errors.Is(err, pgx.ErrTxClosed) {
		return Ours
	}
	for _, short := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.EADDRNOTAVAIL, syscall.EAGAIN} {
		if errors.Is(err, short) { // this machine has no more of what a connection takes, or a local server's queue is full
			return Busy
		}
	}
	for ; err != nil; err = errors.Unwrap(err) {
		if class, ok := clientSide[err.Error()]; ok {
			return class
		}
	}
	return Away
}

func ofState(e *pgconn.PgError) Class {
	if e.Code == "08P01" {
		for _, words := range poolerBusy {
			if strings.Contains(e.Message, words) {
				return Busy
			}
		}
	}
	for _, code := range []string{e.Code, e.Code[:min(2, len(e.Code))]} {
		if class, ok := states[code]; ok {
			return class
		}
	}
	return Ours
}

// IsAway reports whether err is an outage. Nil is none.
func IsAway(err error) bool { return err != nil && Of(err) == Away }
