package main

// doctor: whether the database and Redis are as the middleware needs them.

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
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
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

// errFaults is what doctor ends with when it has found and printed faults.
var errFaults = errors.New("faults were found")

func doctor(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "doctor")
	databaseURL := f.databaseURL("PostgreSQL `URL`, as the services use it")
	redisURL := f.redisURL("Redis `URL`; empty: Redis is not looked at")
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
		findings = append(findings, examineRedis(ctx, *redisURL)...)
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
	var tables, ours bool
	err = pool.QueryRow(ctx, `SELECT to_regclass('api_keys') IS NOT NULL, to_regclass('apikey_migrations') IS NOT NULL`).Scan(&tables, &ours)
	switch {
	case err != nil:
		return "", "", err
	case !tables:
		return stateFault, "there is no table api_keys: run 'apikey migrate', or the migrations by your own tool", nil
	case !ours:
		return stateOK, "the tables are there, made by another tool than 'apikey migrate': their version is for it to tell", nil
	}
	rows, err := pool.Query(ctx, `SELECT name FROM apikey_migrations`)
	if err != nil {
		return "", "", err
	}
	applied, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		if strings.Contains(err.Error(), "permission denied") {
			return stateOK, "the tables are there; their version is not for this role to see", nil
		}
		return "", "", err
	}
	files, err := migrations.FS.ReadDir(".")
	if err != nil {
		return "", "", err
	}
	var missing []string
	for _, file := range files {
		if !slices.Contains(applied, file.Name()) {
			missing = append(missing, file.Name())
		}
	}
	if len(missing) > 0 {
		return stateFault, fmt.Sprintf("not applied: %s: run 'apikey migrate'", strings.Join(missing, ", ")), nil
	}
	return stateOK, fmt.Sprintf("up to date: %s", files[len(files)-1].Name()), nil
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

// readColumns are the columns that authentication reads, by table. The announcing
// triggers must look at all of them.
var readColumns = map[string][]string{
	"api_keys":       {"id", "org_id", "key_hash", "active", "expires_at"},
	"org_plans":      {"org_id", "plan", "status", "ends_at"},
	"plan_catalogue": {"api_access"},
}

// trigger is an announcing trigger as the catalogue has it.
type trigger struct {
	Table, Name, Definition string
	Enabled                 bool
}

func triggers(ctx context.Context, pool *pgxpool.Pool) (map[string]trigger, error) {
	rows, err := pool.Query(ctx, `SELECT tgrelid::regclass::text, tgname::text, pg_get_triggerdef(oid), tgenabled IN ('O', 'A')
		FROM pg_trigger WHERE tgrelid IN (to_regclass('api_keys'), to_regclass('org_plans'), to_regclass('plan_catalogue')) AND NOT tgisinternal`)
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
	var wrong []string
	wanted := 0
	for table := range readColumns {
		for _, name := range []string{"apikey_announce_insert_delete", "apikey_announce_update", "apikey_announce_truncate"} {
			if table == "plan_catalogue" && name != "apikey_announce_update" {
				continue
			}
			wanted++
			t, ok := found[table+"."+name]
			switch {
			case !ok:
				wrong = append(wrong, table+"."+name+" is missing")
			case !t.Enabled:
				wrong = append(wrong, table+"."+name+" is disabled")
			}
		}
	}
	if len(wrong) > 0 {
		slices.Sort(wrong)
		return stateFault, strings.Join(wrong, ", ") + ": changes are noticed after RefreshAfter only", nil
	}
	return stateOK, fmt.Sprintf("%d are enabled", wanted), nil
}

func checkColumns(ctx context.Context, pool *pgxpool.Pool) (state, detail string, err error) {
	found, err := triggers(ctx, pool)
	if err != nil {
		return "", "", err
	}
	var silent []string
	for table, columns := range readColumns {
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
	if _, err := listener.Exec(ctx, "LISTEN "+channel); err != nil {
		return "", "", err
	}
	start := time.Now()
	if _, err := pool.Exec(ctx, "NOTIFY "+channel); err != nil {
		return "", "", err
	}
	if _, err := listener.WaitForNotification(ctx); err != nil {
		return stateFault, fmt.Sprintf("a NOTIFY did not arrive within %v: is a pooler in transaction mode in between? "+
			"Then changes are noticed after MaxStaleness", wait), nil //nolint:nilerr // the finding tells
	}
	return stateOK, fmt.Sprintf("a NOTIFY arrives after %v", time.Since(start).Round(10*time.Microsecond)), nil
}

func examineRedis(ctx context.Context, redisURL string) []finding {
	rdb, err := openRedis(ctx, redisURL)
	if err != nil {
		return []finding{{"Redis", stateFault, err.Error()}}
	}
	defer rdb.Close()
	return []finding{checkRedis(ctx, rdb), checkRedisMemory(ctx, rdb)}
}

// checkRedis does what a cache does.
func checkRedis(ctx context.Context, rdb *redis.Client) finding {
	const name = "apikey:doctor"
	start := time.Now()
	err := rdb.Set(ctx, name, "ok", time.Second).Err()
	if err == nil {
		err = rdb.Get(ctx, name).Err()
	}
	if err != nil {
		return finding{"Redis", stateFault, err.Error()}
	}
	took := time.Since(start).Round(10 * time.Microsecond)
	if took > 50*time.Millisecond {
		return finding{"Redis", stateWarning, fmt.Sprintf("SET and GET in %v: more than 50 ms for one is taken for a failure", took)}
	}
	return finding{"Redis", stateOK, fmt.Sprintf("SET and GET in %v", took)}
}

func checkRedisMemory(ctx context.Context, rdb *redis.Client) finding {
	const check = "Redis memory"
	settings, err := rdb.ConfigGet(ctx, "maxmemory*").Result()
	switch {
	case err != nil:
		return finding{check, stateWarning, "its settings cannot be read: " + err.Error()}
	case settings["maxmemory"] == "0":
		return finding{check, stateOK, "without a limit"}
	case settings["maxmemory-policy"] == "noeviction":
		return finding{check, stateWarning, "maxmemory-policy is noeviction: when it is full, nothing new is cached; set allkeys-lru or volatile-ttl"}
	}
	return finding{check, stateOK, "maxmemory-policy is " + settings["maxmemory-policy"]}
}
