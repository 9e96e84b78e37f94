// Package migrations has the tables and triggers of apikey as numbered SQL files, and
// applies them. If you have a migration tool of your own, let it run the files.
//
// The tables are created in the first schema of the search_path.
package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
)

// FS has the migrations. Each is to be applied once, in the order of the names.
//
//go:embed *.sql
var FS embed.FS

// A DB is a *pgxpool.Pool, a *pgx.Conn or a pgx.Tx.
type DB interface {
	Begin(ctx context.Context) (pgx.Tx, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Columns are the columns that authentication reads, by table. The triggers announce changes
// of these.
func Columns() map[string][]string {
	return map[string][]string{
		"api_keys":       {"id", "org_id", "key_hash", "active", "expires_at"},
		"org_plans":      {"org_id", "plan", "status", "ends_at"},
		"plan_catalogue": {"name", "api_access"},
	}
}

// lockID is an advisory lock, so that concurrent runs wait for each other.
const lockID = 0x6170696b6579 // "apikey"

// Apply applies all missing migrations in one transaction, and records them in the table
// apikey_migrations. It may run again, and several times at once.
//
// It needs the rights of the tables' owner, unless nothing is missing. Run it when you
// deploy, and not in a service, whose role should only read. Use a role that owns the tables
// and has no other rights, and not a superuser: functions of the migrations run with the
// rights of the role that has applied them.
func Apply(ctx context.Context, db DB) error {
	missing, err := missing(ctx, db, `(SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = pg_catalog.current_schema() AND c.relname = 'apikey_migrations'::pg_catalog.name)`)
	if err != nil || len(missing) == 0 {
		return err
	}
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_catalog.pg_advisory_xact_lock($1)`, int64(lockID)); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS apikey_migrations (
			name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
			return err
		}
		if err := owned(ctx, tx); err != nil {
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

// owned returns an error if apikey_migrations belongs to somebody who has no business here. Where
// everybody may create tables in the schema, as in public up to PostgreSQL 14, he may have made it
// with a trigger that would run with the rights of whoever migrates.
func owned(ctx context.Context, tx pgx.Tx) error {
	stranger, err := collect[string](ctx, tx, `
		SELECT pg_catalog.pg_get_userbyid(c.relowner)::pg_catalog.text
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
			JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
		WHERE c.oid = 'apikey_migrations'::pg_catalog.regclass::pg_catalog.oid AND c.relowner <> n.nspowner AND c.relowner <> d.datdba
			AND pg_catalog.pg_get_userbyid(c.relowner) <> CURRENT_USER`)
	if err == nil && len(stranger) > 0 {
		err = fmt.Errorf("the table apikey_migrations belongs to %s, who is neither this role nor the owner of the schema or the database: "+
			"if that is right, migrate as %[1]s; else drop the table, and REVOKE CREATE ON SCHEMA ... FROM PUBLIC", stranger[0])
	}
	return err
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

// unreleased are migrations from before the first release. Their functions let every login become
// owner of the tables, so that nobody should go on with them.
var unreleased = []string{"0001_init.sql", "0002_announcements.sql", "0003_key_environment.sql", "0004_key_uses.sql"}

// Missing returns the names of the migrations that were not applied, in order. It returns
// an error if there are tables of the same names that Apply has not created. It only reads,
// and needs SELECT on apikey_migrations.
func Missing(ctx context.Context, db DB) ([]string, error) {
	return missing(ctx, db, `pg_catalog.to_regclass('apikey_migrations')::pg_catalog.oid`)
}

// missing is Missing with an expression for the oid of apikey_migrations, NULL if there is none.
func missing(ctx context.Context, db DB, table string) ([]string, error) {
	files, err := FS.ReadDir(".")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, file := range files {
		names = append(names, file.Name())
	}
	done, begun, err := applied(ctx, db, table)
	if err == nil && !begun {
		if err = foreign(ctx, db); err == nil {
			return names, nil
		}
		if again, since, err2 := applied(ctx, db, table); err2 == nil && since { // another Apply has come between
			done, err = again, nil
		}
	}
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(done, func(name string) bool { return slices.Contains(unreleased, name) }) {
		return nil, errors.New("apikey: these tables are from before the first release: " +
			"migrate an empty schema, and copy the rows of api_keys, plan_catalogue and org_plans")
	}
	return slices.DeleteFunc(names, func(name string) bool { return slices.Contains(done, name) }), nil
}

// applied returns what was applied, and whether Apply has run at all. Reading must not run the code of
// somebody who may create objects in the schema, so apikey_migrations must be a table, and not a view,
// and stay one meanwhile.
func applied(ctx context.Context, db DB, table string) (names []string, begun bool, err error) {
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		name, err := collect[string](ctx, tx, `SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
			FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = `+table)
		if err != nil || len(name) == 0 {
			return err
		}
		begun = true
		if _, err := tx.Exec(ctx, `LOCK TABLE ONLY `+name[0]+` IN ACCESS SHARE MODE`); err != nil {
			return err
		}
		plain, err := collect[bool](ctx, tx, `SELECT relkind = 'r' AND NOT relrowsecurity FROM pg_catalog.pg_class WHERE oid = $1::pg_catalog.regclass::pg_catalog.oid`, name[0])
		if err == nil && (len(plain) == 0 || !plain[0]) {
			err = fmt.Errorf("%s is not a table that Apply has made: who else may create objects in this schema?", name[0])
		}
		if err == nil {
			names, err = collect[string](ctx, tx, `SELECT name FROM ONLY `+name[0])
		}
		return err
	})
	return names, begun, err
}

// ErrOtherTool is the error of [Missing] and [Apply] if the tables exist but another tool has
// created them.
var ErrOtherTool = errors.New("apikey: the tables are there, but no apikey_migrations: they were made by another tool: go on with that one")

// foreign returns an error if there are other tables with these names in the schema.
func foreign(ctx context.Context, db DB) error {
	ours := false
	for table, columns := range Columns() {
		found, err := collect[string](ctx, db, `
			SELECT a.attname::pg_catalog.text FROM pg_catalog.pg_attribute a
				JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
			WHERE n.nspname = pg_catalog.current_schema() AND c.relname = $1::pg_catalog.text::pg_catalog.name
				AND a.attnum > 0::pg_catalog.int2 AND NOT a.attisdropped`, table)
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
