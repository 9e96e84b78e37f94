// Package migrations holds the tables and triggers of apikey as numbered plain
// SQL, and applies them. Teams with a migration tool of their own copy the files
// from FS instead.
package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// FS holds the migrations, to be applied once each in the order of their names.
//
//go:embed *.sql
var FS embed.FS

// A DB can begin a transaction: a *pgxpool.Pool, a *pgx.Conn or a pgx.Tx.
type DB interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// lockID is the advisory lock that two runs at once take in turn.
const lockID = 0x6170696b6579 // "apikey"

// Apply brings the database to the newest version, in one transaction: all
// missing migrations, or none. What is applied is kept in the table
// apikey_migrations. It is harmless to run again, and safe to run twice at once.
func Apply(ctx context.Context, db DB) error {
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1)`, int64(lockID)); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS apikey_migrations (
			name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
			return err
		}
		files, err := FS.ReadDir(".")
		if err != nil {
			return err
		}
		for _, file := range files {
			if err := applyFile(ctx, tx, file.Name()); err != nil {
				return fmt.Errorf("%s: %w", file.Name(), err)
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
	if e, ok := errors.AsType[*pgconn.PgError](err); ok && e.Code == "42P07" { // duplicate_table
		err = fmt.Errorf("the tables are there, made by another tool: go on with that one: %w", err)
	}
	return err
}
