package main

// The command doctor: checks of the database and Redis.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/shared"
	"github.com/trackpilots/apikey/migrations"
)

// A finding is the outcome of one check.
type finding struct {
	Check  string `json:"check"`
	State  string `json:"state"` // ok, warning or FAULT
	Detail string `json:"detail"`
}

const (
	stateOK      = "ok"
	stateWarning = "warning"
	stateFault   = "FAULT"
)

// errFaults is the error of doctor after it has printed faults.
var errFaults = errors.New("faults were found")

func doctor(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "doctor")
	databaseURL := f.databaseURL("PostgreSQL `URL`, as the services use it")
	redisURL := f.redisURL("Redis `URL`; empty: Redis is not looked at")
	redisTimeout := f.Duration("redis-timeout", shared.DefaultTimeout, "the RedisTimeout of the services")
	f.jsonOutput()
	if err := f.parse(args); err != nil {
		return err
	}
	var findings []finding
	pool, err := openPostgres(ctx, *databaseURL)
	if err != nil {
		findings = append(findings, finding{"PostgreSQL", stateFault, err.Error()})
	} else {
		defer pool.Close()
		findings = append(findings, examinePostgres(ctx, pool)...)
	}
	if *redisURL != "" {
		findings = append(findings, examineRedis(ctx, *redisURL, *redisTimeout)...)
	}
	err = f.print(findings, func(w io.Writer) {
		for _, found := range findings {
			row(w, found.State, found.Check, found.Detail)
		}
	})
	if err == nil && slices.ContainsFunc(findings, func(found finding) bool { return found.State == stateFault }) {
		err = errFaults
	}
	return err
}

func examinePostgres(ctx context.Context, pool *pgxpool.Pool) (findings []finding) {
	for _, c := range []struct {
		name  string
		check func(context.Context, *pgxpool.Pool) (state, detail string, err error)
	}{
		{"PostgreSQL", checkServer},
		{"schema", checkSchema},
		{"lookups", checkLookups},
		{"triggers", checkTriggers},
		{"columns", checkColumns},
		{"announcements", checkAnnouncements},
		{"notification queue", checkQueue},
		{"sessions", checkSessions},
		{"announcer", checkAnnouncer},
		{"outbox", checkOutbox},
		{"rights", checkRights},
	} {
		state, detail, err := c.check(ctx, pool)
		if err != nil {
			state, detail = stateFault, strings.Join(strings.Fields(err.Error()), " ")
		}
		findings = append(findings, finding{c.name, state, detail})
	}
	return findings
}

func checkServer(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	var version string
	var number int
	var standby bool
	err = pool.QueryRow(ctx, `SELECT current_setting('server_version'), current_setting('server_version_num')::int, pg_is_in_recovery()`).
		Scan(&version, &number, &standby)
	switch {
	case err != nil:
	case number < 130_000:
		return stateFault, "version " + version + ": 13 is the oldest that will do", nil
	case standby:
		return stateFault, "this is a standby, which lags and announces nothing: use the primary", nil
	}
	return stateOK, "version " + version + ", primary", err
}

func checkSchema(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	missing, err := migrations.Missing(ctx, pool)
	switch {
	case errors.Is(err, migrations.ErrOtherTool):
		return stateOK, "the tables are there, made by another tool than 'apikey migrate': their version is for it to tell", nil
	case err != nil && strings.Contains(err.Error(), "permission denied"):
		return stateOK, "the version of the tables is not for this role to see: GRANT SELECT ON apikey_migrations", nil
	case err != nil:
		return "", "", err
	case len(missing) > 0:
		return stateFault, fmt.Sprintf("not applied: %s: run 'apikey migrate'", strings.Join(missing, ", ")), nil
	}
	return stateOK, "up to date", nil
}

// checkLookups makes the two lookups of the middleware.
func checkLookups(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	start := time.Now()
	_, err = apikey.NewPostgresKeyStore(pool).Key(ctx, apikey.KeyHash{})
	if err == nil || errors.Is(err, apikey.ErrNotFound) {
		_, err = apikey.NewPostgresPlanStore(pool).Plan(ctx, "")
	}
	if err != nil && !errors.Is(err, apikey.ErrNotFound) {
		return "", "", fmt.Errorf("%w: does the role have SELECT?", err)
	}
	return stateOK, fmt.Sprintf("key and plan in %v", time.Since(start).Round(10*time.Microsecond)), nil
}

// trigger is an announcing trigger in the catalogue.
type trigger struct {
	Table, Name, Definition string
	Enabled, Always         bool
}

func triggers(ctx context.Context, pool *pgxpool.Pool) (map[string]trigger, error) {
	rows, err := pool.Query(ctx, `SELECT tgrelid::regclass::text, tgname::text, pg_get_triggerdef(oid), tgenabled IN ('O', 'A'), tgenabled = 'A'
		FROM pg_trigger WHERE tgrelid IN (to_regclass('api_keys')::oid, to_regclass('org_plans')::oid, to_regclass('plan_catalogue')::oid) AND NOT tgisinternal`)
	if err != nil {
		return nil, err
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[trigger])
	found := map[string]trigger{}
	for _, t := range list {
		found[t.Table+"."+t.Name] = t
	}
	return found, err
}

func checkTriggers(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	found, err := triggers(ctx, pool)
	if err != nil {
		return "", "", err
	}
	var wrong, sometimes []string
	wanted := 0
	for table := range migrations.Columns() {
		for _, name := range []string{"apikey_announce_insert_delete", "apikey_announce_update", "apikey_announce_truncate"} {
			wanted++
			t, ok := found[table+"."+name]
			switch {
			case !ok:
				wrong = append(wrong, table+"."+name+" is missing")
			case !t.Enabled:
				wrong = append(wrong, table+"."+name+" is disabled")
			case !t.Always:
				sometimes = append(sometimes, table+"."+name)
			}
		}
	}
	if len(wrong) > 0 {
		slices.Sort(wrong)
		return stateFault, strings.Join(wrong, ", ") + ": changes are noticed after RefreshAfter only", nil
	}
	if len(sometimes) > 0 {
		slices.Sort(sometimes)
		return stateWarning, strings.Join(sometimes, ", ") + " do not fire for logical replication: ALTER TABLE ... ENABLE ALWAYS TRIGGER", nil
	}
	return stateOK, fmt.Sprintf("%d are enabled", wanted), nil
}

func checkColumns(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	found, err := triggers(ctx, pool)
	if err != nil {
		return "", "", err
	}
	var silent []string
	for table, columns := range migrations.Columns() {
		definition := found[table+".apikey_announce_update"].Definition
		for _, column := range columns {
			if !strings.Contains(definition, "new."+column) {
				silent = append(silent, table+"."+column)
			}
		}
	}
	if len(silent) > 0 {
		slices.Sort(silent)
		return stateFault, "read, but changes are not announced: " + strings.Join(silent, ", "), nil
	}
	return stateOK, "all that are read are announced", nil
}

// checkAnnouncements listens on one connection and notifies by another.
func checkAnnouncements(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	const channel, wait = "apikey_doctor", 2 * time.Second
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	listener, err := pgx.ConnectConfig(ctx, pool.Config().ConnConfig)
	if err != nil {
		return "", "", err
	}
	defer listener.Close(context.WithoutCancel(ctx))
	var pid uint32
	if err := listener.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
		return "", "", err
	}
	if pid != listener.PgConn().PID() { // LISTEN would stay behind on the connection of others
		return stateFault, "a pooler is in between, which does not deliver announcements: give Watch a URL that leads to PostgreSQL directly. " +
			"Without Watch changes are noticed after MaxStaleness", nil
	}
	if _, err := listener.Exec(ctx, "LISTEN "+channel); err != nil {
		return "", "", err
	}
	start := time.Now()
	if _, err := pool.Exec(ctx, "NOTIFY "+channel); err != nil {
		return "", "", err
	}
	if _, err := listener.WaitForNotification(ctx); err != nil {
		return stateFault, fmt.Sprintf("a NOTIFY did not arrive within %v: is the notification queue full, or a pooler in between? "+
			"Changes are noticed after MaxStaleness", wait), nil //nolint:nilerr // the finding tells
	}
	return stateOK, fmt.Sprintf("a NOTIFY arrives after %v", time.Since(start).Round(10*time.Microsecond)), nil
}

// checkQueue checks the notification queue. When it is full, nothing can be announced.
func checkQueue(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	var full float64
	if err := pool.QueryRow(ctx, `SELECT pg_notification_queue_usage()`).Scan(&full); err != nil {
		return "", "", err
	}
	detail = fmt.Sprintf("%.1f %% full", 100*full)
	const advice = ": a session that has run LISTEN, of whatever service, does not end its transaction or does not read: " +
		"when it is full, changes are noticed within MaxStaleness only; end that session (see sessions)"
	switch {
	case full > 0.5:
		return stateFault, detail + advice, nil
	case full > 0.05:
		return stateWarning, detail + advice, nil
	}
	return stateOK, detail, nil
}

// checkSessions looks for sessions that hold up the notification queue or VACUUM, because they
// have been in a transaction, or have not read, for a long time. Not every role sees the
// sessions of others.
func checkSessions(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	rows, err := pool.Query(ctx, `
		SELECT format('pid %s (%s, %s)', pid, coalesce(nullif(application_name, ''), 'no application_name'),
			CASE WHEN wait_event = 'ClientWrite' THEN 'it does not read what it is sent' ELSE state END)
		FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid() AND (
			wait_event = 'ClientWrite' AND state_change < now() - interval '30 seconds'
			OR xact_start < now() - interval '5 minutes' AND state LIKE 'idle in transaction%')
		ORDER BY pid`)
	if err != nil {
		return "", "", err
	}
	stuck, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return "", "", err
	}
	if len(stuck) > 0 {
		return stateWarning, "they hold up VACUUM, and the notification queue if they have run LISTEN: " + strings.Join(stuck, ", ") + ": SELECT pg_terminate_backend(pid)", nil
	}
	return stateOK, "none holds up VACUUM or the notification queue, as far as this role may see", nil
}

// checkAnnouncer looks for the replica that announces for all.
func checkAnnouncer(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	var is bool
	if err := pool.QueryRow(ctx, `SELECT `+feed.AnnouncerSQL).Scan(&is); err != nil {
		return "", "", err
	}
	if !is {
		return stateWarning, "no replica runs Cache.Watch at this moment, so that changes are noticed within MaxStaleness only", nil
	}
	return stateOK, "a replica announces what changes", nil
}

// checkOutbox looks for rows of the outbox that VACUUM cannot remove. They take room, and no time.
func checkOutbox(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	var dead int64
	var size string
	var oldest *string
	err = pool.QueryRow(ctx, `
		SELECT n_dead_tup, pg_size_pretty(pg_total_relation_size(relid)), (
			SELECT format('pid %s (%s, %s, for %s)', pid, coalesce(nullif(application_name, ''), 'no application_name'), state, date_trunc('second', now() - xact_start))
			FROM pg_stat_activity WHERE xact_start < now() - interval '1 minute' ORDER BY xact_start LIMIT 1)
		FROM pg_stat_user_tables WHERE relid = to_regclass('apikey_outbox')::oid`).Scan(&dead, &size, &oldest)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return stateFault, "there is no apikey_outbox: run 'apikey migrate'", nil
	case err != nil:
		return "", "", err
	case dead < manyDead:
		return stateOK, size, nil
	case oldest != nil:
		return stateWarning, fmt.Sprintf("%s, %d dead rows: VACUUM cannot remove them while an older transaction is open: %s", size, dead, *oldest), nil
	}
	return stateWarning, fmt.Sprintf("%s, %d dead rows: is autovacuum off, or a prepared transaction or a replication slot old?", size, dead), nil
}

// manyDead is ten times as many rows as autovacuum waits for.
const manyDead = 100_000

// checkRights looks for rights with which a login could become owner of the tables.
func checkRights(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	rows, err := pool.Query(ctx, `
		WITH ours AS (
			SELECT c.oid, c.relname::text AS name, relowner, relacl FROM pg_class c
			WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('apikey_outbox')::oid) AND relname::text = ANY ($1::text[])
		), functions AS (
			SELECT p.oid, proname::text AS name, proowner, proacl, prosecdef FROM pg_proc p
			WHERE pronamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('apikey_outbox')::oid) AND starts_with(proname::text, 'apikey_'::text)
		)
		SELECT 'FAULT', format('%s may EXECUTE %s, which has the rights of its owner: REVOKE it', coalesce(r.rolname, 'PUBLIC'), f.oid::regprocedure)
		FROM functions f CROSS JOIN aclexplode(coalesce(proacl, acldefault('f', proowner))) a LEFT JOIN pg_roles r ON r.oid = a.grantee
		WHERE prosecdef AND a.grantee <> proowner AND (a.grantee = 0::oid OR f.name <> 'apikey_announce'::text)
		UNION ALL
		SELECT 'FAULT', format('%s has %s on %s: REVOKE it', coalesce(r.rolname, 'PUBLIC'), a.privilege_type, o.name)
		FROM ours o CROSS JOIN aclexplode(relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
		WHERE a.grantee <> relowner AND (a.privilege_type = 'TRIGGER'::text OR starts_with(o.name, 'apikey_'::text) AND a.privilege_type <> 'SELECT'::text)
		UNION ALL
		SELECT 'FAULT', format('%s has a trigger %s, which is not of the migrations: whose is it?', o.name, tgname)
		FROM ours o JOIN pg_trigger t ON t.tgrelid = o.oid WHERE starts_with(o.name, 'apikey_'::text) AND NOT tgisinternal
		UNION ALL
		SELECT 'FAULT', format('%s belongs to %s, and the functions to %s', o.name, pg_get_userbyid(relowner), pg_get_userbyid(proowner))
		FROM ours o JOIN functions f ON f.oid = to_regprocedure('apikey_announce()')::oid WHERE relowner <> proowner
		UNION ALL
		SELECT 'warning', format('%s may CREATE in the schema %s: REVOKE CREATE ON SCHEMA %2$I FROM %1$s', coalesce(r.rolname, 'PUBLIC'), nspname)
		FROM pg_namespace CROSS JOIN aclexplode(nspacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
		WHERE nspname = ANY (current_schemas(false)) AND a.grantee <> nspowner AND a.privilege_type = 'CREATE'::text
			AND NOT EXISTS (SELECT FROM functions WHERE proowner = a.grantee)
		UNION ALL
		SELECT 'warning', format('the functions have the rights of %s, who is superuser: let a role own them that owns the tables and may do nothing else', rolname)
		FROM functions f JOIN pg_roles r ON r.oid = proowner
		WHERE f.oid = to_regprocedure('apikey_announce()')::oid AND rolsuper`,
		[]string{"api_keys", "api_key_uses", "org_plans", "plan_catalogue", "apikey_outbox", "apikey_announced", "apikey_settings", "apikey_migrations"})
	if err != nil {
		return "", "", err
	}
	var details []string
	var kind, text string
	state = stateOK
	_, err = pgx.ForEachRow(rows, []any{&kind, &text}, func() error {
		if state != stateFault {
			state = kind
		}
		details = append(details, text)
		return nil
	})
	if len(details) == 0 {
		details = []string{"nobody can become owner of the tables by way of these functions"}
	}
	return state, strings.Join(details, "; "), err
}

func examineRedis(ctx context.Context, redisURL string, timeout time.Duration) []finding {
	rdb, err := openRedis(ctx, redisURL, nil)
	if err != nil {
		return []finding{{"Redis", stateFault, err.Error()}}
	}
	defer rdb.Close()
	return []finding{checkRedis(ctx, rdb, timeout), checkRedisMemory(ctx, rdb)}
}
