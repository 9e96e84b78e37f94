package admin_test

// Two methods at once: what comes of it is what comes of one after the other.

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// A scene is an organisation, a key and a tier that two calls are about.
type scene struct {
	org  string // and the tier
	text string // of the key
	id   string // of the key, which may be missing
	now  time.Time
}

// A call is a writing method with arguments. It returns a number if the method does.
type call struct {
	name string // the method, and after a comma what the arguments are
	do   func(ctx context.Context, db apikey.DB, s scene) (int64, error)
}

func keyCall(name string, do func(ctx context.Context, k *admin.Keys, s scene) error) call {
	return call{name, func(ctx context.Context, db apikey.DB, s scene) (int64, error) {
		return 0, do(ctx, admin.NewKeys(db), s)
	}}
}

func planCall(name string, do func(ctx context.Context, p *admin.Plans, s scene) error) call {
	return call{name, func(ctx context.Context, db apikey.DB, s scene) (int64, error) {
		return 0, do(ctx, admin.NewPlans(db), s)
	}}
}

// The writing methods. A new one joins them, or TestPairs fails.
var (
	keyCalls = []call{
		keyCall("Create", func(ctx context.Context, k *admin.Keys, s scene) error {
			_, _, err := k.Create(ctx, s.org, admin.NewKey{Name: "created"})
			return err
		}),
		keyCall("Import", func(ctx context.Context, k *admin.Keys, s scene) error {
			_, err := k.Import(ctx, s.org, s.text, admin.NewKey{Name: "imported"})
			return err
		}),
		keyCall("ImportHash", func(ctx context.Context, k *admin.Keys, s scene) error {
			_, err := k.ImportHash(ctx, s.org, apikey.HashKey(s.text), admin.NewKey{Name: "imported"})
			return err
		}),
		keyCall("Rotate, with an overlap", func(ctx context.Context, k *admin.Keys, s scene) error {
			_, _, err := k.Rotate(ctx, s.org, s.id, s.now.Add(time.Hour), admin.NewKey{})
			return err
		}),
		keyCall("Rotate, at once", func(ctx context.Context, k *admin.Keys, s scene) error {
			_, _, err := k.Rotate(ctx, s.org, s.id, time.Now(), admin.NewKey{})
			return err
		}),
		keyCall("Deactivate", func(ctx context.Context, k *admin.Keys, s scene) error { return k.Deactivate(ctx, s.org, s.id) }),
		keyCall("Activate", func(ctx context.Context, k *admin.Keys, s scene) error { return k.Activate(ctx, s.org, s.id) }),
		{"DeactivateAll", func(ctx context.Context, db apikey.DB, s scene) (int64, error) {
			return admin.NewKeys(db).DeactivateAll(ctx, s.org)
		}},
		keyCall("Expire, later", func(ctx context.Context, k *admin.Keys, s scene) error {
			return k.Expire(ctx, s.org, s.id, s.now.Add(2*time.Hour))
		}),
		keyCall("Expire, too late for Prune", func(ctx context.Context, k *admin.Keys, s scene) error {
			return k.Expire(ctx, s.org, s.id, s.now.Add(-time.Hour))
		}),
		keyCall("Delete", func(ctx context.Context, k *admin.Keys, s scene) error { return k.Delete(ctx, s.org, s.id) }),
		{"Prune", func(ctx context.Context, db apikey.DB, s scene) (int64, error) {
			return admin.NewKeys(db).Prune(ctx, s.now.Add(-time.Hour))
		}},
	}
	planCalls = []call{
		planCall("DefineTier, with the API", func(ctx context.Context, p *admin.Plans, s scene) error { return p.DefineTier(ctx, s.org, true) }),
		planCall("DefineTier, without", func(ctx context.Context, p *admin.Plans, s scene) error { return p.DefineTier(ctx, s.org, false) }),
		planCall("Subscribe", func(ctx context.Context, p *admin.Plans, s scene) error {
			return p.Subscribe(ctx, s.org, s.org, apikey.PlanPending, s.now.Add(time.Hour))
		}),
		planCall("SetTier", func(ctx context.Context, p *admin.Plans, s scene) error { return p.SetTier(ctx, s.org, s.org) }),
		planCall("SetStatus", func(ctx context.Context, p *admin.Plans, s scene) error {
			return p.SetStatus(ctx, s.org, apikey.PlanPastDue)
		}),
		planCall("SetEnd", func(ctx context.Context, p *admin.Plans, s scene) error {
			return p.SetEnd(ctx, s.org, s.now.Add(2*time.Hour))
		}),
	}
	readers = []string{"Find", "FindHash", "List"}
)

// starts are what pairs of calls begin with, and how it comes to be: there is a tier named
// basic, and the key, which expires in three hours.
var starts = []struct {
	name  string
	calls []call
	set   func(ctx context.Context, k *admin.Keys, p *admin.Plans, s scene) error
}{
	{"a live key", keyCalls, func(context.Context, *admin.Keys, *admin.Plans, scene) error { return nil }},
	{"a deactivated key", keyCalls, func(ctx context.Context, k *admin.Keys, _ *admin.Plans, s scene) error {
		return k.Deactivate(ctx, s.org, s.id)
	}},
	{"an expired key", keyCalls, func(ctx context.Context, k *admin.Keys, _ *admin.Plans, s scene) error {
		return k.Expire(ctx, s.org, s.id, s.now.Add(-2*time.Hour))
	}},
	{"no key", keyCalls, func(ctx context.Context, k *admin.Keys, _ *admin.Plans, s scene) error {
		return k.Delete(ctx, s.org, s.id)
	}},
	{"no plan", planCalls, func(ctx context.Context, _ *admin.Keys, p *admin.Plans, s scene) error {
		return p.DefineTier(ctx, s.org, true)
	}},
	{"a plan", planCalls, func(ctx context.Context, _ *admin.Keys, p *admin.Plans, s scene) error {
		return errors.Join(p.DefineTier(ctx, s.org, true), p.Subscribe(ctx, s.org, "basic", apikey.PlanActive, time.Time{}))
	}},
	{"a plan and no tier", planCalls, func(ctx context.Context, _ *admin.Keys, p *admin.Plans, s scene) error {
		return p.Subscribe(ctx, s.org, "basic", apikey.PlanActive, time.Time{})
	}},
}

// pairs are pairs of calls on a database.
type pairs struct {
	pool    *pgxpool.Pool
	set     func(ctx context.Context, k *admin.Keys, p *admin.Plans, s scene) error
	scenes  int
	serials map[[2]string]outcome // what serial has returned, by the names of the calls
}

func (p *pairs) scene(t *testing.T) scene {
	t.Helper()
	testservers.Exec(t, p.pool, `DELETE FROM api_keys`) // Prune sees those of all organisations
	p.scenes++
	s := scene{org: fmt.Sprint("org_", p.scenes), text: fmt.Sprintf("issued-elsewhere-%d", p.scenes), now: time.Now()}
	k := admin.NewKeys(p.pool)
	info, err := k.Import(t.Context(), s.org, s.text, admin.NewKey{Name: "old", ExpiresAt: s.now.Add(3 * time.Hour)})
	s.id = info.ID
	world.MustNot(t, errors.Join(err, p.set(t.Context(), k, admin.NewPlans(p.pool), s)))
	return s
}

// An outcome is what two calls have returned, and the state they have left.
type outcome struct{ a, b, state string }

func (o outcome) swapped() outcome { return outcome{o.b, o.a, o.state} }

// outcome reads the state. Its times are minutes from the beginning.
func (p *pairs) outcome(t *testing.T, s scene, a, b string) outcome {
	t.Helper()
	rows, err := p.pool.Query(t.Context(), `
		SELECT concat_ws(' ', CASE WHEN id = $2 THEN 'the key' ELSE 'a new key' END, name, environment, active, round(extract(epoch FROM expires_at - $3) / 60))
			FROM api_keys WHERE org_id = $1
		UNION ALL SELECT concat_ws(' ', 'plan', CASE plan WHEN $1 THEN 'tier' ELSE plan END, status, round(extract(epoch FROM ends_at - $3) / 60))
			FROM org_plans WHERE org_id = $1
		UNION ALL SELECT concat_ws(' ', 'tier', api_access) FROM plan_catalogue WHERE name = $1
		ORDER BY 1`, s.org, s.id, s.now)
	world.MustNot(t, err)
	state, err := pgx.CollectRows(rows, pgx.RowTo[string])
	world.MustNot(t, err)
	return outcome{a, b, fmt.Sprintf("%q", state)}
}

const serializationFailure = "40001"

// result describes what a call has returned.
func result(n int64, err error) string {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code
	}
	if e, ok := errors.AsType[*admin.InputError](err); ok {
		return "InputError of " + e.Field
	}
	return fmt.Sprint(n, " ", err)
}

func run(ctx context.Context, c call, db apikey.DB, s scene) string { return result(c.do(ctx, db, s)) }

// fails is a call that is not serialized.
var fails = call{"fails", func(context.Context, apikey.DB, scene) (int64, error) {
	return 0, &pgconn.PgError{Code: serializationFailure}
}}

// serial runs a before b.
func (p *pairs) serial(t *testing.T, a, b call) outcome {
	t.Helper()
	names := [2]string{a.name, b.name}
	if _, ok := p.serials[names]; !ok {
		s := p.scene(t)
		ra := run(t.Context(), a, p.pool, s)
		p.serials[names] = p.outcome(t, s, ra, run(t.Context(), b, p.pool, s))
	}
	return p.serials[names]
}

// free starts both at once.
func (p *pairs) free(t *testing.T, a, b call) outcome {
	t.Helper()
	s := p.scene(t)
	var ra string
	var wg sync.WaitGroup
	wg.Go(func() { ra = run(t.Context(), a, p.pool, s) })
	rb := run(t.Context(), b, p.pool, s)
	wg.Wait()
	return p.outcome(t, s, ra, rb)
}

// between runs b before the second statement of a, if there is one.
func (p *pairs) between(t *testing.T, a, b call) outcome {
	t.Helper()
	s := p.scene(t)
	var rb string
	db := &hooked{DB: p.pool, before: func(n int) {
		if n == 2 {
			rb = run(t.Context(), b, p.pool, s)
		}
	}}
	ra := run(t.Context(), a, db, s)
	if db.n < 2 {
		return p.serial(t, a, b)
	}
	return p.outcome(t, s, ra, rb)
}

// A hooked DB calls a function before each statement, with its number.
type hooked struct {
	apikey.DB
	before func(n int)
	n      int
}

func (h *hooked) step() { h.n++; h.before(h.n) }

func (h *hooked) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	h.step()
	return h.DB.Exec(ctx, sql, args...)
}

func (h *hooked) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	h.step()
	return h.DB.Query(ctx, sql, args...)
}

func (h *hooked) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	h.step()
	return h.DB.QueryRow(ctx, sql, args...)
}

// held runs a in a transaction and keeps that open until b waits for it or is over. b has no
// transaction if level is "", and otherwise one whose snapshot is from before a.
func (p *pairs) held(level pgx.TxIsoLevel) func(t *testing.T, a, b call) outcome {
	return func(t *testing.T, a, b call) outcome {
		t.Helper()
		ctx, s, options := t.Context(), p.scene(t), pgx.TxOptions{IsoLevel: level}
		conn, err := p.pool.Acquire(ctx)
		world.MustNot(t, err)
		defer conn.Release()
		runB := func() string { return run(ctx, b, conn, s) }
		if level != "" {
			tx, err := conn.BeginTx(ctx, options)
			world.MustNot(t, err)
			_, err = tx.Exec(ctx, `SELECT`)
			world.MustNot(t, err)
			runB = func() string { return end(ctx, tx, run(ctx, b, tx, s)) }
		}
		tx, err := p.pool.BeginTx(ctx, options)
		world.MustNot(t, err)
		ra := run(ctx, a, tx, s)
		var rb string
		overlap(t, p.pool, conn.Conn(), func() { rb = runB() }, func() { ra = end(ctx, tx, ra) })
		return p.outcome(t, s, ra, rb)
	}
}

// end commits a transaction in which a call has returned r.
func end(ctx context.Context, tx pgx.Tx, r string) string {
	err := tx.Commit(ctx)
	if err == nil || errors.Is(err, pgx.ErrTxCommitRollback) {
		return r
	}
	return result(0, err)
}

// overlap starts do, which uses conn, and calls release when do waits for a lock or is over.
func overlap(t *testing.T, pool *pgxpool.Pool, conn *pgx.Conn, do, release func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	world.WaitFor(t, func() bool {
		select {
		case <-done:
			return true
		default:
			return waits(t, pool, conn)
		}
	})
	release()
	<-done
}

// waits reports whether conn waits for a lock that another has.
func waits(t *testing.T, pool *pgxpool.Pool, conn *pgx.Conn) (yes bool) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), `SELECT cardinality(pg_blocking_pids($1)) > 0`, conn.PgConn().PID()).Scan(&yes); err != nil {
		t.Error(err)
	}
	return yes
}

// TestPairs: every two writing methods at once, on the same key or plan, return and leave
// what they do one after the other. A transaction with a fixed snapshot may fail instead.
func TestPairs(t *testing.T) {
	var methods, known []string
	for _, typ := range []reflect.Type{reflect.TypeFor[*admin.Keys](), reflect.TypeFor[*admin.Plans]()} {
		for i := range typ.NumMethod() {
			methods = append(methods, typ.Method(i).Name)
		}
	}
	for _, c := range slices.Concat(keyCalls, planCalls) {
		name, _, _ := strings.Cut(c.name, ",")
		known = append(known, name)
	}
	slices.Sort(methods)
	known = append(known, readers...)
	slices.Sort(known)
	if known = slices.Compact(known); !slices.Equal(methods, known) {
		t.Errorf("the methods are\n%q, and those in the table\n%q", methods, known)
	}

	for _, start := range starts {
		t.Run(start.name, func(t *testing.T) {
			t.Parallel()
			p := &pairs{testservers.Postgres(t), start.set, 0, map[[2]string]outcome{}}
			world.MustNot(t, admin.NewPlans(p.pool).DefineTier(t.Context(), "basic", false))
			for _, a := range start.calls {
				for _, b := range start.calls {
					p.check(t, a, b)
				}
			}
		})
	}
}

func (p *pairs) check(t *testing.T, a, b call) {
	t.Helper()
	want := []outcome{p.serial(t, a, b), p.serial(t, b, a).swapped()}
	fixed := append(slices.Clone(want), p.serial(t, a, fails), p.serial(t, b, fails).swapped())
	for _, way := range []struct {
		name string
		run  func(t *testing.T, a, b call) outcome
		want []outcome
	}{
		{"at once", p.free, want},
		{"between two statements", p.between, want},
		{"during a transaction", p.held(""), want},
		{"read committed", p.held(pgx.ReadCommitted), want},
		{"repeatable read", p.held(pgx.RepeatableRead), fixed},
		{"serializable", p.held(pgx.Serializable), fixed},
	} {
		if got := way.run(t, a, b); !slices.Contains(way.want, got) {
			t.Errorf("%s, and %s: %s:\n got %v\nwant one of %v", a.name, b.name, way.name, got, way.want)
		}
	}
}

// TestDeactivateAllOutlastsRotates: each of its statements waits for a transaction that
// rotates the newest key. None of the new keys is left over.
func TestDeactivateAllOutlastsRotates(t *testing.T) {
	const rotates = 3
	ctx, pool := t.Context(), testservers.Postgres(t)
	for name, change := range map[string]func(k *admin.Keys, org, id string) error{
		"keep the old key":       func(*admin.Keys, string, string) error { return nil },
		"deactivate the old key": func(k *admin.Keys, org, id string) error { return k.Deactivate(ctx, org, id) },
		"delete the old key":     func(k *admin.Keys, org, id string) error { return k.Delete(ctx, org, id) },
	} {
		for _, own := range []bool{false, true} { // whether DeactivateAll has a transaction
			org := fmt.Sprint(name, own)
			newest, _, err := admin.NewKeys(pool).Create(ctx, org, admin.NewKey{})
			world.MustNot(t, err)
			conn, err := pool.Acquire(ctx)
			world.MustNot(t, err)
			db, commit := apikey.DB(conn), func() {}
			if own {
				tx, err := conn.Begin(ctx)
				world.MustNot(t, err)
				db, commit = tx, func() { world.MustNot(t, tx.Commit(ctx)) }
			}
			var committing sync.WaitGroup
			hook := &hooked{DB: db, before: func(n int) {
				committing.Wait()
				if n > rotates {
					return
				}
				tx, err := pool.Begin(ctx)
				world.MustNot(t, err)
				keys, old := admin.NewKeys(tx), newest.ID
				newest, _, err = keys.Rotate(ctx, org, old, time.Now().Add(time.Hour), admin.NewKey{})
				world.MustNot(t, errors.Join(err, change(keys, org, old)))
				committing.Go(func() {
					for n := 0; n < 10_000 && !waits(t, pool, conn.Conn()); n++ {
						time.Sleep(time.Millisecond)
					}
					if err := tx.Commit(ctx); err != nil {
						t.Error(err)
					}
				})
			}}
			n, err := admin.NewKeys(hook).DeactivateAll(ctx, org)
			committing.Wait()
			commit()
			conn.Release()
			keys, _, listErr := admin.NewKeys(pool).List(ctx, org, admin.Page{})
			if err := errors.Join(err, listErr); err != nil || hook.n <= rotates {
				t.Errorf("%s: %d statements, %v", org, hook.n, err)
			}
			if slices.ContainsFunc(keys, func(k admin.KeyInfo) bool { return k.Active }) {
				t.Errorf("%s: %d were deactivated, and left are %+v", org, n, keys)
			}
		}
	}
}

// TestDeactivateAllGivesUp: it does not say that keys are deactivated which are not.
func TestDeactivateAllGivesUp(t *testing.T) {
	pool := testservers.Postgres(t)
	testservers.Exec(t, pool, `
		CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
		CREATE TRIGGER keep BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION keep();
		INSERT INTO api_keys (org_id, key_hash) VALUES ('org_1', sha256('1'))`)
	if n, err := admin.NewKeys(pool).DeactivateAll(t.Context(), "org_1"); err == nil || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
}

// TestLocks: methods that change many keys lock them in the order of their ids, so that two
// of them do not wait for each other. And whoever changes keys does not keep others from
// recording their uses.
func TestLocks(t *testing.T) {
	ctx, pool := t.Context(), testservers.Postgres(t)
	const first, second = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
	testservers.Exec(t, pool, `INSERT INTO api_keys (id, org_id, key_hash, expires_at)
		VALUES ('`+second+`', 'org_1', sha256('2'), now() - interval '1 hour'), ('`+first+`', 'org_1', sha256('1'), now() - interval '1 hour')`)
	for name, do := range map[string]func(k *admin.Keys) error{
		"DeactivateAll": func(k *admin.Keys) error { _, err := k.DeactivateAll(ctx, "org_1"); return err },
		"Prune":         func(k *admin.Keys) error { _, err := k.Prune(ctx, time.Now()); return err },
	} {
		tx, err := pool.Begin(ctx)
		world.MustNot(t, err)
		world.MustNot(t, admin.NewKeys(tx).Expire(ctx, "org_1", first, time.Now().Add(-time.Hour)))
		conn, err := pool.Acquire(ctx)
		world.MustNot(t, err)
		other, err := conn.Begin(ctx)
		world.MustNot(t, err)
		overlap(t, pool, conn.Conn(), func() { err = do(admin.NewKeys(other)) }, func() {
			if _, err := tx.Exec(ctx, `SELECT FROM api_keys WHERE id = $1 FOR UPDATE NOWAIT`, second); err != nil {
				t.Errorf("%s: the second key is locked before the first: %v", name, err)
			}
			world.MustNot(t, tx.Rollback(ctx))
		})
		world.MustNot(t, errors.Join(err, other.Rollback(ctx)))
		conn.Release()
	}

	live, _, err := admin.NewKeys(pool).Create(ctx, "org_2", admin.NewKey{})
	world.MustNot(t, err)
	s := scene{org: "org_2", id: live.ID, now: time.Now()}
	for _, c := range keyCalls {
		if c.name == "Delete" {
			continue
		}
		tx, err := pool.Begin(ctx)
		world.MustNot(t, err)
		_, _ = c.do(ctx, tx, s)
		if _, err := pool.Exec(ctx, `SELECT FROM api_keys WHERE id = $1 FOR KEY SHARE NOWAIT`, live.ID); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		world.MustNot(t, tx.Rollback(ctx))
	}
}

// TestPruneBounds: a key that expired at the time itself is kept, and one call deletes
// 10,000 keys.
func TestPruneBounds(t *testing.T) {
	pool := testservers.Postgres(t)
	keys := admin.NewKeys(pool)
	at := time.Now().Add(-time.Hour).Truncate(time.Microsecond)
	testservers.Exec(t, pool, `INSERT INTO api_keys (org_id, key_hash, expires_at) VALUES ('org_1', sha256('at'), $1)`, at)
	testservers.Exec(t, pool, `INSERT INTO api_keys (org_id, key_hash, expires_at)
		SELECT 'org_1', sha256(i::text::bytea), $1::timestamptz - interval '1 microsecond' FROM generate_series(1, 10001) i`, at)
	for _, want := range []int64{10_000, 1, 0} {
		if n, err := keys.Prune(t.Context(), at); n != want || err != nil {
			t.Errorf("%d keys were pruned, %v, want %d", n, err, want)
		}
	}
	if n, err := keys.Prune(t.Context(), at.Add(time.Microsecond)); n != 1 || err != nil {
		t.Errorf("%d keys were pruned, %v, want the last one", n, err)
	}
}
