// Package migrations holds the tables and triggers of apikey as numbered plain
// SQL, and applies them. Teams with a migration tool of their own copy the files
// from FS instead.
//
// The tables are made in the first schema of the search_path, and found by it.
package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// FS holds the migrations, to be applied once each in the order of their names.
//
//go:embed *.sql
var FS embed.FS

// A DB is where the tables are: a *pgxpool.Pool, a *pgx.Conn or a pgx.Tx.
type DB interface {
	Begin(ctx context.Context) (pgx.Tx, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Columns are the columns that authentication reads, by table. A change of any of them
// is announced.
func Columns() map[string][]string {
	return map[string][]string{
		"api_keys":       {"id", "org_id", "key_hash", "active", "expires_at"},
		"org_plans":      {"org_id", "plan", "status", "ends_at"},
		"plan_catalogue": {"name", "api_access"},
	}
}

// lockID is the advisory lock that two runs at once take in turn.
const lockID = 0x6170696b6579 // "apikey"

// Apply brings the database to the newest version, in one transaction: all
// missing migrations, or none. What is applied is kept in the table
// apikey_migrations. It is harmless to run again, and safe to run twice at once.
//
// It takes the rights of an owner of tables, unless nothing is missing. Run it when you
// deploy, and not from a service, whose role should only read.
func Apply(ctx context.Context, db DB) error {
	missing, err := Missing(ctx, db)
	if err != nil || len(missing) == 0 {
		return err
	}
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(lockID)); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS apikey_migrations (
			name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
			return err
		}
		for _, name := range missing {
			if err := applyFile(ctx, tx, name); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("apikey: migrating: %w", err)
	}
	return nil
}

func applyFile(ctx context.Context, tx pgx.Tx, name string) error {
	tag, err := tx.Exec(ctx, `INSERT INTO apikey_migrations (name) VALUES ($1) ON CONFLICT DO NOTHING`, name)
	if err != nil || tag.RowsAffected() == 0 {
		return err
	}
	sql, err := FS.ReadFile(name)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, string(sql))
	return err
}

// Missing returns the names of the migrations that have not been applied to the
// database, in order; none if it is up to date. It is an error if tables of these names
// are there which Apply has not made: they are others, or another tool's work. It writes
// nothing, and takes SELECT on apikey_migrations.
func Missing(ctx context.Context, db DB) ([]string, error) {
	files, err := FS.ReadDir(".")
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, file := range files {
		missing = append(missing, file.Name())
	}
	known, err := begun(ctx, db)
	if err == nil && !known {
		if err = foreign(ctx, db); err == nil {
			return missing, nil
		}
		var since bool // another Apply may have come between
		if since, _ = begun(ctx, db); since {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	applied, err := collect[string](ctx, db, `SELECT name FROM apikey_migrations`)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(missing, func(name string) bool { return slices.Contains(applied, name) }), nil
}

// begun reports whether Apply has been at work.
func begun(ctx context.Context, db DB) (bool, error) {
	is, err := collect[bool](ctx, db, `SELECT to_regclass('apikey_migrations') IS NOT NULL`)
	return err == nil && is[0], err
}

// ErrOtherTool is the error of [Missing] and [Apply] for tables that are ours, but that
// Apply has not made.
var ErrOtherTool = errors.New("apikey: the tables are there, but no apikey_migrations: they were made by another tool: go on with that one")

// foreign returns an error if there are tables with the names of ours where ours would be
// made.
func foreign(ctx context.Context, db DB) error {
	ours := false
	for table, columns := range Columns() {
		found, err := collect[string](ctx, db, `SELECT attname::text FROM pg_attribute
			WHERE attrelid = to_regclass(quote_ident(current_schema()) || '.' || $1) AND attnum > 0 AND NOT attisdropped`, table)
		if err != nil {
			return err
		}
		ours = ours || len(found) > 0
		for _, column := range columns {
			if len(found) > 0 && !slices.Contains(found, column) {
				return fmt.Errorf("apikey: there is a table %s already that is not of these migrations: it has no column %s: "+
					"make a schema for ours, and put it first in the search_path, such as with ?search_path=apikey,public in the URL", table, column)
			}
		}
	}
	if ours {
		return ErrOtherTool
	}
	return nil
}

func collect[T any](ctx context.Context, db DB, sql string, args ...any) ([]T, error) {
	rows, err := db.Query(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
	var values []T
	if err == nil {
		values, err = pgx.CollectRows(rows, pgx.RowTo[T])
	}
	if err != nil {
		return nil, fmt.Errorf("apikey: looking for the tables: %w", err)
	}
	return values, nil
}
