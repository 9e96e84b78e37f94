package main

// The commands migrate, keys and plan.

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/pg"
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

// keyJSON is a key as JSON. Key is the key itself, only if it was just created.
type keyJSON struct {
	ID          string     `json:"id"`
	OrgID       string     `json:"orgId"`
	Name        string     `json:"name"`
	Hint        string     `json:"hint"`
	State       string     `json:"state"`
	CreatedAt   time.Time  `json:"createdAt"`
	ExpiresAt   *time.Time `json:"expiresAt"`
	LastUsedAt  *time.Time `json:"lastUsedAt"`
	Environment string     `json:"environment"`
	Key         string     `json:"key,omitempty"`
}

func toJSON(k admin.KeyInfo, secret admin.Secret) keyJSON {
	return keyJSON{
		k.ID, k.OrgID, k.Name, k.Hint, k.State(time.Now()), k.CreatedAt, pg.NullTime(k.ExpiresAt), pg.NullTime(k.LastUsedAt), string(k.Environment), secret.Reveal(),
	}
}

// A keyMaker has the flags of a command that creates keys.
type keyMaker struct {
	*flagSet
	databaseURL, org, name *string
}

func newKeyMaker(a *app, command, expires string) keyMaker {
	f := newFlags(a, command)
	f.String("expires", "", "`when` the key expires: a time, a duration from now such as 720h or 30d, or never (default "+expires+")")
	f.jsonOutput()
	return keyMaker{f, f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation"), f.String("name", "", "a `name`, for people to read")}
}

func (m keyMaker) parseKey(args []string) (admin.NewKey, error) {
	if err := m.parse(args); err != nil {
		return admin.NewKey{}, err
	}
	k := admin.NewKey{Name: *m.name}
	if m.given("expires") {
		at, err := m.instant("expires")
		if err != nil {
			return k, err
		}
		k.ExpiresAt, k.NeverEnds = at, at.IsZero()
	}
	return k, nil
}

// show creates a key in a transaction, and prints it before the commit, so that nothing changes
// if nobody has seen the key.
func (m keyMaker) show(ctx context.Context, makeKey func(*admin.Keys) (admin.KeyInfo, admin.Secret, error)) error {
	return withPostgres(ctx, *m.databaseURL, func(pool *pgxpool.Pool) error {
		shown := false
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			info, secret, err := makeKey(admin.NewKeys(tx))
			if err != nil {
				return err
			}
			if err := m.printNew(info, secret); err != nil {
				return fmt.Errorf("the new key could not be printed, and nothing was changed: %w", err)
			}
			shown = true
			return nil
		})
		if err != nil && shown {
			return fmt.Errorf("the key that was shown may not be valid: look with 'apikey keys list': %w", err)
		}
		return err
	})
}

// printNew prints a new key with its secret.
func (f *flagSet) printNew(info admin.KeyInfo, secret admin.Secret) error {
	return f.print(toJSON(info, secret), func(w io.Writer) {
		row(w, "id", info.ID)
		row(w, "expires", info.ExpiresAt)
		row(w, "key", secret.Reveal())
		fmt.Fprintln(w, "\nThis is the only time that the key is shown.")
	})
}

func keysCreate(ctx context.Context, a *app, args []string) error {
	f := newKeyMaker(a, "keys create", never)
	test := f.Bool("test", false, "create a key of the test environment, which begins with tpk_test_")
	k, err := f.parseKey(args)
	if err != nil {
		return err
	}
	if *test {
		k.Environment = admin.EnvironmentTest
	}
	return f.show(ctx, func(store *admin.Keys) (admin.KeyInfo, admin.Secret, error) {
		return store.Create(ctx, *f.org, k)
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
		for page := (admin.Page{Limit: 1000}); ; {
			keys, next, err := admin.NewKeys(pool).List(ctx, *org, page)
			if err != nil {
				return err
			}
			for _, k := range keys {
				all = append(all, toJSON(k, admin.Secret{}))
			}
			if page.After = next; next == "" {
				break
			}
		}
		return f.print(all, func(w io.Writer) {
			row(w, "ID", "STATE", "HINT", "CREATED", "EXPIRES", "LAST USED", "NAME")
			for _, k := range all {
				row(w, k.ID, k.State, k.Hint, k.CreatedAt, pg.TimeOrZero(k.ExpiresAt), pg.TimeOrZero(k.LastUsedAt), k.Name)
			}
		})
	})
}

func keysDeactivate(ctx context.Context, a *app, args []string) error {
	return changeKey(ctx, a, args, "deactivate", (*admin.Keys).Deactivate)
}

func keysActivate(ctx context.Context, a *app, args []string) error {
	return changeKey(ctx, a, args, "activate", (*admin.Keys).Activate)
}

func keysDelete(ctx context.Context, a *app, args []string) error {
	return changeKey(ctx, a, args, "delete", (*admin.Keys).Delete)
}

func changeKey(
	ctx context.Context, a *app, args []string, verb string, change func(s *admin.Keys, ctx context.Context, orgID, keyID string) error,
) error {
	f := newFlags(a, "keys "+verb)
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	id := f.must("id", "the `id` of the key, not the key itself")
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		err := change(admin.NewKeys(pool), ctx, *org, *id)
		if errors.Is(err, apikey.ErrNotFound) {
			return noSuchKey(*org)
		}
		return err
	})
}

// keysDeactivateAll deactivates all keys of an organisation.
func keysDeactivateAll(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "keys deactivate-all")
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	dry := f.Bool("dry-run", false, "only print how many keys that would be")
	if err := f.parse(args); err != nil {
		return err
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		return dryRun(ctx, pool, *dry, func(tx pgx.Tx) error {
			n, err := admin.NewKeys(tx).DeactivateAll(ctx, *org)
			if err == nil {
				fmt.Fprintf(a.stdout, "%d active keys of %s%s\n", n, *org, map[bool]string{true: " would be deactivated", false: " were deactivated"}[*dry])
			}
			return err
		})
	})
}

// keysPrune deletes keys that expired long ago.
func keysPrune(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "keys prune")
	databaseURL := f.databaseURL("PostgreSQL `URL`")
	age := f.duration("expired", 90*24*time.Hour, "for `how long` the keys have been expired, such as 30d (default 90d)")
	dry := f.Bool("dry-run", false, "only print how many keys that would be")
	if err := f.parse(args); err != nil {
		return err
	}
	before := time.Now().Add(-*age)
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		all := int64(0)
		for {
			n := int64(0)
			err := dryRun(ctx, pool, *dry, func(tx pgx.Tx) (err error) {
				n, err = admin.NewKeys(tx).Prune(ctx, before)
				return err
			})
			if err != nil {
				return err
			}
			if all += n; n == 0 || *dry {
				break
			}
		}
		fmt.Fprintf(a.stdout, "%d keys%s\n", all, map[bool]string{true: " would be deleted, or more", false: " were deleted"}[*dry])
		return nil
	})
}

// dryRun runs do in a transaction, and rolls it back if dry.
func dryRun(ctx context.Context, pool *pgxpool.Pool, dry bool, do func(pgx.Tx) error) error {
	errDry := errors.New("dry run")
	err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if err := do(tx); err != nil || !dry {
			return err
		}
		return errDry
	})
	if errors.Is(err, errDry) {
		return nil
	}
	return err
}

// noSuchKey does not repeat the id, since it may be a key by mistake.
func noSuchKey(org string) error {
	return fmt.Errorf("organisation %q has no key with this id: 'apikey keys list' shows those it has%w", org, errNotThere)
}

func keysRotate(ctx context.Context, a *app, args []string) error {
	f := newKeyMaker(a, "keys rotate", "as the old key")
	id := f.must("id", "the `id` of the key to replace, not the key itself")
	overlap := f.duration("overlap", 24*time.Hour, "`how long` the old key still works, such as 90m or 7d (default 24h)")
	k, err := f.parseKey(args)
	if err != nil {
		return err
	}
	if *overlap < 0 {
		return f.misused("--overlap is negative: use 0s to end the old key at once")
	}
	return f.show(ctx, func(store *admin.Keys) (admin.KeyInfo, admin.Secret, error) {
		info, secret, err := store.Rotate(ctx, *f.org, *id, time.Now().Add(*overlap), k)
		if errors.Is(err, apikey.ErrNotFound) {
			err = noSuchKey(*f.org)
		}
		return info, secret, err
	})
}

// keysImport imports all of its input, or nothing.
func keysImport(ctx context.Context, a *app, args []string) error {
	f := newKeyMaker(a, "keys import", never)
	hashed := f.Bool("sha256", false, "the input is the SHA-256 of keys, in hex: of keys that are no token68 of 16 to 512 bytes, or begin with "+
		"tpk_live_ or tpk_test_ and were not made here, it cannot be told that they will be refused")
	k, err := f.parseKey(args)
	if err != nil {
		return err
	}
	lines, err := a.readLines(ctx) // before there is a transaction that waits for it
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		return errors.New("standard input is empty: write one key to a line")
	}
	return withPostgres(ctx, *f.databaseURL, func(pool *pgxpool.Pool) error {
		imported := []keyJSON{}
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			store := admin.NewKeys(tx)
			for _, line := range lines {
				info, err := importLine(ctx, store, *f.org, line.text, *hashed, k)
				if err != nil {
					return fmt.Errorf("line %d, and nothing was imported: %w", line.n, err) // without the line: it is a key
				}
				imported = append(imported, toJSON(info, admin.Secret{}))
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

func importLine(ctx context.Context, store *admin.Keys, org, line string, hashed bool, k admin.NewKey) (admin.KeyInfo, error) {
	if !hashed {
		return store.Import(ctx, org, line, k)
	}
	h, err := hex.DecodeString(line)
	if err != nil || len(h) != len(apikey.KeyHash{}) {
		return admin.KeyInfo{}, errors.New("a SHA-256 has 64 hexadecimal digits")
	}
	return store.ImportHash(ctx, org, apikey.KeyHash(h), k)
}

func planDefine(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "plan define")
	databaseURL, tier := f.databaseURL("PostgreSQL `URL`"), f.must("tier", "the `name` of the tier")
	api := f.Bool("api", false, "whether it includes the API, for all organisations on it: --api or --api=false (required)")
	if err := f.parse(args); err != nil {
		return err
	}
	if !f.given("api") {
		return f.misused("say --api if the tier includes the API, or --api=false if it does not: that holds for all organisations on it")
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		return admin.NewPlans(pool).DefineTier(ctx, *tier, *api)
	})
}

// planSet changes the given properties of a plan. If there is no plan, it creates one, which
// needs a tier.
func planSet(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "plan set")
	databaseURL, org := f.databaseURL("PostgreSQL `URL`"), f.must("org", "the `id` of the organisation")
	tier := f.String("tier", "", "the `name` of the tier")
	status := f.String("status", "", fmt.Sprintf("one of %s", apikey.PlanStatuses())+" (default of a new subscription: active)")
	f.String("ends", "", "`when` the plan ends: a time, a duration from now such as 720h or 30d, or never (default of a new subscription: never)")
	if err := f.parse(args); err != nil {
		return err
	}
	if !f.given("tier") && !f.given("status") && !f.given("ends") {
		return f.misused("nothing to set: give --tier, --status or --ends")
	}
	var ends time.Time
	if f.given("ends") {
		var err error
		if ends, err = f.instant("ends"); err != nil {
			return err
		}
	}
	for _, name := range []string{"tier", "status"} {
		if f.given(name) && f.Lookup(name).Value.String() == "" {
			return f.misused("--%s is empty", name)
		}
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			p, err := apikey.NewPostgresPlanStore(tx).Plan(ctx, *org)
			switch {
			case errors.Is(err, apikey.ErrNotFound) && *tier == "":
				return fmt.Errorf("organisation %q has no subscription: give --tier to make one%w", *org, errNotThere)
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
			return admin.NewPlans(tx).Subscribe(ctx, *org, p.Name, p.Status, p.EndsAt)
		})
	})
}

// planJSON is a plan as JSON.
type planJSON struct {
	OrgID     string     `json:"orgId"`
	Tier      string     `json:"tier"`
	Status    string     `json:"status"`
	APIAccess bool       `json:"apiAccess"`
	EndsAt    *time.Time `json:"endsAt"`
	AllowsAPI bool       `json:"allowsApi"`
}

func toPlanJSON(orgID string, p apikey.Plan) planJSON {
	return planJSON{orgID, p.Name, string(p.Status), p.APIAccess, pg.NullTime(p.EndsAt), p.AllowsAPI(time.Now())}
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
			return fmt.Errorf("organisation %q has no subscription%w", *org, errNotThere)
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
