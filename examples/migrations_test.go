package examples

// The migrations by tools that teams have already.

import (
	"context"
	"database/sql"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/jackc/tern/v2/migrate"
	"github.com/pressly/goose/v3"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/migrations"
)

func byGoose(ctx context.Context, url string) error {
	db, err := sql.Open("pgx", url)
	if err != nil {
		return err
	}
	defer db.Close()
	provider, err := goose.NewProvider(goose.DialectPostgres, db, migrations.FS)
	if err != nil {
		return err
	}
	_, err = provider.Up(ctx)
	return err
}

func byTern(ctx context.Context, url string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	migrator, err := migrate.NewMigrator(ctx, conn, "schema_version")
	if err != nil {
		return err
	}
	if err := migrator.LoadMigrations(migrations.FS); err != nil {
		return err
	}
	return migrator.Migrate(ctx)
}

func byApply(ctx context.Context, url string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return migrations.Apply(ctx, conn)
}

// TestMigrationTools: each tool makes the tables, and again is harmless. Whoever
// began with one tool is told to go on with it.
func TestMigrationTools(t *testing.T) {
	for name, tool := range map[string]func(context.Context, string) error{"goose": byGoose, "tern": byTern, "Apply": byApply} {
		t.Run(name, func(t *testing.T) {
			url := testservers.EmptyPostgresURL(t)
			for range 2 {
				if err := tool(t.Context(), url); err != nil {
					t.Fatal(err)
				}
			}
			pool := testservers.Pool(t, url)
			keys := apikey.NewPostgresKeyStore(pool)
			info, secret, err := admin.NewKeys(pool).Create(t.Context(), "org_1", admin.NewKey{})
			if err != nil {
				t.Fatal(err)
			}
			found, err := keys.Key(t.Context(), apikey.HashKey(secret.Reveal()))
			if err != nil || found.ID != info.ID {
				t.Errorf("%+v, %v", found, err)
			}
			if name == "Apply" {
				return
			}
			if err := byApply(t.Context(), url); !errors.Is(err, migrations.ErrOtherTool) {
				t.Errorf("Apply after %s: %v", name, err)
			}
			if _, err := keys.Key(t.Context(), apikey.KeyHash{}); !errors.Is(err, apikey.ErrNotFound) {
				t.Errorf("after that: %v", err)
			}
		})
	}
}
