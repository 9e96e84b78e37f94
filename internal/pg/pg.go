// Package pg has what the packages that use PostgreSQL share.
package pg

import (
	"context"
	"reflect"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// A DB is a pool, a connection or a transaction.
type DB interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// OneTrip is a DB that does not prepare statements, whatever the default of DB is. So they
// work through poolers, and take one round trip.
type OneTrip struct{ DB DB }

// Exec implements [DB].
func (o OneTrip) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return o.DB.Exec(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
}

// Query implements [DB].
func (o OneTrip) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return o.DB.Query(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
}

// QueryRow implements [DB].
func (o OneTrip) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return o.DB.QueryRow(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
}

// NullTime maps the zero time to NULL.
func NullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// TimeOrZero maps NULL to the zero time.
func TimeOrZero(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.UTC()
}

// IsUUID reports whether s is a UUID.
func IsUUID(s string) bool {
	var u pgtype.UUID
	return len(s) == 36 && u.Scan(s) == nil
}

// IsNil reports whether v is nil or a nil pointer or function.
func IsNil(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Pointer, reflect.Func:
		return r.IsNil()
	}
	return false
}
