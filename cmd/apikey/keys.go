package main

// migrate, keys and plan: what the stores do, on the command line.

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/migrations"
)

func migrate(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "migrate")
	databaseURL := f.databaseURL("PostgreSQL `URL`, of the owner of the tables")
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		if err := migrations.Apply(ctx, pool); err != nil {
			return err
		}
		fmt.Fprintln(a.stdout, "the tables are up to date")
		return nil
	})
}

// keyJSON is a key for programs. Key is the key itself, and only ever that of one
// that was just made.
type keyJSON struct {
	ID         string     `json:"id"`
	OrgID      string     `json:"orgId"`
	Name       string     `json:"name"`
	Hint       string     `json:"hint"`
	State      string     `json:"state"`
	CreatedAt  time.Time  `json:"createdAt"`
	ExpiresAt  *time.Time `json:"expiresAt"`
	LastUsedAt *time.Time `json:"lastUsedAt"`
	Key        string     `json:"key,omitempty"`
}

func toJSON(k apikey.KeyInfo, secret apikey.Secret) keyJSON {
	return keyJSON{
		k.ID, k.OrgID, k.Name, k.Hint, k.State(time.Now()), k.CreatedAt, orNull(k.ExpiresAt), orNull(k.LastUsedAt), secret.Reveal(),
	}
}

// A keyMaker is the flags of a command that makes keys.
type keyMaker struct {
	*flagSet
	databaseURL, org, name *string
}

func newKeyMaker(a *app, command string) keyMaker {
	f := newFlags(a, command)
	f.String("expires", "never", "`when` the key ends: a time, a duration from now, or never")
	f.jsonOutput()
	return keyMaker{f, f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation"), f.String("name", "", "a `name` for people")}
}

func (m keyMaker) parseKey(args []string) (apikey.NewKey, error) {
	if err := m.parse(args); err != nil {
		return apikey.NewKey{}, err
	}
	at, err := m.instant("expires")
	return apikey.NewKey{Name: *m.name, ExpiresAt: at}, err
}

// printNew prints a key that was just made, with its secret.
func (f *flagSet) printNew(info apikey.KeyInfo, secret apikey.Secret) error {
	return f.print(toJSON(info, secret), func(w io.Writer) {
		row(w, "id", info.ID)
		row(w, "expires", info.ExpiresAt)
		row(w, "key", secret.Reveal())
		fmt.Fprintln(w, "\nThis is the only time that the key is shown.")
	})
}

func keysCreate(ctx context.Context, a *app, args []string) error {
	f := newKeyMaker(a, "keys create")
	test := f.Bool("test", false, "make it say test, not live")
	k, err := f.parseKey(args)
	if err != nil {
		return err
	}
	k.Test = *test
	return withPostgres(ctx, *f.databaseURL, func(pool *pgxpool.Pool) error {
		info, secret, err := apikey.NewPostgresKeyStore(pool).Create(ctx, *f.org, k)
		if err != nil {
			return err
		}
		return f.printNew(info, secret)
	})
}

func keysList(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "keys list")
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	f.jsonOutput()
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		all := []keyJSON{}
		for page := (apikey.Page{Limit: 1000}); ; {
			keys, next, err := apikey.NewPostgresKeyStore(pool).List(ctx, *org, page)
			if err != nil {
				return err
			}
			for _, k := range keys {
				all = append(all, toJSON(k, apikey.Secret{}))
			}
			if page.After = next; next == "" {
				break
			}
		}
		return f.print(all, func(w io.Writer) {
			row(w, "ID", "STATE", "HINT", "CREATED", "EXPIRES", "LAST USED", "NAME")
			for _, k := range all {
				row(w, k.ID, k.State, k.Hint, k.CreatedAt, orZero(k.ExpiresAt), orZero(k.LastUsedAt), k.Name)
			}
		})
	})
}

func orZero(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return *t
}

func keysDeactivate(ctx context.Context, a *app, args []string) error {
	return changeKey(ctx, a, args, "deactivate", (*apikey.PostgresKeyStore).Deactivate)
}

func keysActivate(ctx context.Context, a *app, args []string) error {
	return changeKey(ctx, a, args, "activate", (*apikey.PostgresKeyStore).Activate)
}

func keysDelete(ctx context.Context, a *app, args []string) error {
	return changeKey(ctx, a, args, "delete", (*apikey.PostgresKeyStore).Delete)
}

func changeKey(
	ctx context.Context, a *app, args []string, verb string, change func(s *apikey.PostgresKeyStore, ctx context.Context, orgID, keyID string) error,
) error {
	f := newFlags(a, "keys "+verb)
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	id := f.must("id", "the `id` of the key, not the key itself")
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		err := change(apikey.NewPostgresKeyStore(pool), ctx, *org, *id)
		if errors.Is(err, apikey.ErrNotFound) {
			return noSuchKey(*org)
		}
		return err
	})
}

// noSuchKey does not repeat the id, since it may be a key that was given for one.
func noSuchKey(org string) error {
	return fmt.Errorf("organisation %q has no key with this id: 'apikey keys list' shows those it has", org)
}

func keysRotate(ctx context.Context, a *app, args []string) error {
	f := newKeyMaker(a, "keys rotate")
	id := f.must("id", "the `id` of the key to replace, not the key itself")
	overlap := f.Duration("overlap", 24*time.Hour, "`how long` the old key lives on")
	k, err := f.parseKey(args)
	if err != nil {
		return err
	}
	return withPostgres(ctx, *f.databaseURL, func(pool *pgxpool.Pool) error {
		info, secret, err := apikey.NewPostgresKeyStore(pool).Rotate(ctx, *f.org, *id, time.Now().Add(*overlap), k)
		if errors.Is(err, apikey.ErrNotFound) {
			return noSuchKey(*f.org)
		}
		if err != nil {
			return err
		}
		return f.printNew(info, secret)
	})
}

// keysImport imports all of its input, or nothing.
func keysImport(ctx context.Context, a *app, args []string) error {
	f := newKeyMaker(a, "keys import")
	hashed := f.Bool("sha256", false, "the input is the SHA-256 of keys, in hex")
	k, err := f.parseKey(args)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(a.stdin)
	return withPostgres(ctx, *f.databaseURL, func(pool *pgxpool.Pool) error {
		imported := []keyJSON{}
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			store := apikey.NewPostgresKeyStore(tx)
			for n := 1; lines.Scan(); n++ {
				line := strings.TrimSpace(lines.Text())
				if line == "" {
					continue
				}
				info, err := importLine(ctx, store, *f.org, line, *hashed, k)
				if err != nil {
					return fmt.Errorf("line %d, and nothing was imported: %w", n, err) // without the line: it is a key
				}
				imported = append(imported, toJSON(info, apikey.Secret{}))
			}
			if err := lines.Err(); err != nil {
				return fmt.Errorf("reading standard input: %w", err)
			}
			if len(imported) == 0 {
				return errors.New("standard input is empty: write one key to a line")
			}
			return nil
		})
		if err != nil {
			return err
		}
		return f.print(imported, func(w io.Writer) {
			row(w, "ID", "NAME")
			for _, k := range imported {
				row(w, k.ID, k.Name)
			}
		})
	})
}

func importLine(ctx context.Context, store *apikey.PostgresKeyStore, org, line string, hashed bool, k apikey.NewKey) (apikey.KeyInfo, error) {
	if !hashed {
		return store.Import(ctx, org, line, k)
	}
	h, err := hex.DecodeString(line)
	if err != nil || len(h) != len(apikey.KeyHash{}) {
		return apikey.KeyInfo{}, errors.New("a SHA-256 has 64 hexadecimal digits")
	}
	return store.ImportHash(ctx, org, apikey.KeyHash(h), k)
}

func planDefine(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "plan define")
	databaseURL, tier := f.databaseURL("PostgreSQL `URL`"), f.must("tier", "the `name` of the tier")
	api := f.Bool("api", false, "it includes the API")
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		return apikey.NewPostgresPlanStore(pool).DefineTier(ctx, *tier, *api)
	})
}

// planSet changes what it is told to. An organisation without a subscription gets
// one, which needs a tier.
func planSet(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "plan set")
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	tier := f.String("tier", "", "the `name` of the tier")
	status := f.String("status", "", "active, pending, past_due, payment_failed, cancelled or expired (default of a new subscription: active)")
	f.String("ends", "", "`when` the plan ends: a time, a duration from now, or never")
	if err := f.parse(args); err != nil {
		return err
	}
	if !f.given("tier") && !f.given("status") && !f.given("ends") {
		return f.misused("nothing to set: give --tier, --status or --ends")
	}
	ends, err := f.instant("ends")
	if err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			store := apikey.NewPostgresPlanStore(tx)
			p, err := store.Plan(ctx, *org)
			switch {
			case errors.Is(err, apikey.ErrNotFound) && *tier == "":
				return fmt.Errorf("organisation %q has no subscription: give --tier to make one", *org)
			case errors.Is(err, apikey.ErrNotFound):
				p.Status = apikey.PlanActive
			case err != nil:
				return err
			}
			if f.given("tier") {
				p.Name = *tier
			}
			if f.given("status") {
				p.Status = apikey.PlanStatus(*status)
			}
			if f.given("ends") {
				p.EndsAt = ends
			}
			return store.Subscribe(ctx, *org, p.Name, p.Status, p.EndsAt)
		})
	})
}

// planJSON is a plan for programs.
type planJSON struct {
	OrgID     string     `json:"orgId"`
	Tier      string     `json:"tier"`
	Status    string     `json:"status"`
	APIAccess bool       `json:"apiAccess"`
	EndsAt    *time.Time `json:"endsAt"`
	AllowsAPI bool       `json:"allowsApi"`
}

func toPlanJSON(orgID string, p apikey.Plan) planJSON {
	return planJSON{orgID, p.Name, string(p.Status), p.APIAccess, orNull(p.EndsAt), p.AllowsAPI(time.Now())}
}

func planShow(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "plan show")
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	f.jsonOutput()
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		p, err := apikey.NewPostgresPlanStore(pool).Plan(ctx, *org)
		if errors.Is(err, apikey.ErrNotFound) {
			return fmt.Errorf("organisation %q has no subscription", *org)
		}
		if err != nil {
			return err
		}
		value := toPlanJSON(*org, p)
		return f.print(value, func(w io.Writer) {
			row(w, "tier", p.Name)
			row(w, "status", p.Status)
			row(w, "includes the API", p.APIAccess)
			row(w, "ends", p.EndsAt)
			row(w, "admits requests", value.AllowsAPI)
		})
	})
}
