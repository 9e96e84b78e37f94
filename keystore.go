package apikey

// Whose key it is: KeyHash, Key, KeyStore, and the Postgres key store, which also
// issues keys and ends them. A key's plaintext ends at HashKey, and begins in a
// Secret; nothing here stores or logs it.

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey/internal/bearer"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/lastused"
	"github.com/trackpilots/apikey/internal/readthrough"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// ErrNotFound is a store's answer "looked, and it is not there". Stores may
// wrap it.
var ErrNotFound = errors.New("apikey: not found")

// A KeyHash is the SHA-256 of a key, the only form in which keys are stored and
// looked up. Keys are long and random, so a fast hash without salt is enough.
type KeyHash [sha256.Size]byte

// HashKey returns the hash of a key as the client sends it.
func HashKey(key string) KeyHash {
	var buf [64]byte // a conversion would allocate
	return sha256.Sum256(append(buf[:0], key...))
}

// A Key is what is known of an API key. The key itself is not part of it.
type Key struct {
	ID        string    // names the key in logs and dashboards
	OrgID     string    // the organisation it belongs to; never empty
	Active    bool      // false: deactivated
	ExpiresAt time.Time // the first instant at which it is dead; zero: never
}

func (k Key) equal(other Key) bool {
	same := k.ExpiresAt.Equal(other.ExpiresAt)
	k.ExpiresAt, other.ExpiresAt = time.Time{}, time.Time{}
	return same && k == other
}

// live reports whether the key may be used at now.
func (k Key) live(now time.Time) bool {
	return k.Active && (k.ExpiresAt.IsZero() || now.Before(k.ExpiresAt))
}

// A KeyStore finds a key by its hash. It must be safe for concurrent use and
// honour ctx. It answers with facts: a deactivated or expired key is found.
//
// ErrNotFound, or an error that wraps it, means "looked, and it is not there"
// and refuses the key with [ErrInvalidAPIKey]. Every other error means "could
// not look" and is answered with [ErrUnavailable].
type KeyStore interface {
	Key(ctx context.Context, h KeyHash) (Key, error)
}

// A BatchKeyStore is a KeyStore that finds many keys at once. A [Cache] asks it for
// all that are asked for at the same time: by Keys, and never by Key. So a type that
// embeds one, and has a Key of its own, needs a Keys of its own too.
type BatchKeyStore interface {
	KeyStore

	// Keys returns those of the keys that are there, by their hashes; the others are
	// "looked, and it is not there". The error means "could not look" for all of them.
	Keys(ctx context.Context, hashes []KeyHash) (map[KeyHash]Key, error)
}

// A KeyStoreFunc is a function that is a KeyStore.
type KeyStoreFunc func(ctx context.Context, h KeyHash) (Key, error)

// Key calls f.
func (f KeyStoreFunc) Key(ctx context.Context, h KeyHash) (Key, error) { return f(ctx, h) }

// A DB is where the Postgres stores read and write: a *pgxpool.Pool, a *pgx.Conn
// or a pgx.Tx. Only a pool is safe for concurrent use. For lookups it must lead to
// the primary: a standby lags, and its snapshots leave out running transactions.
type DB interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// A PostgresKeyStore is a KeyStore on the table api_keys of the migrations, and
// looks after the keys in it. It is safe for concurrent use if its DB is.
//
// On a pgx.Tx, all it does is part of that transaction. None of the refusals
// [ErrNotFound], [ErrKeyExists], [ErrKeyLimit], [ErrKeyDead] and [*InputError] ends
// the transaction. Every change names the organisation, and finds only its keys.
type PostgresKeyStore struct{ db oneTrip }

// NewPostgresKeyStore returns the key store on db. It panics if db is nil.
func NewPostgresKeyStore(db DB) *PostgresKeyStore {
	if isNil(db) {
		panic("apikey: NewPostgresKeyStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresKeyStore{oneTrip{db}}
}

// stampSQL are the first columns of a lookup: the snapshot that it runs in, the server,
// which tables these are, and the process that answers.
const stampSQL = `pg_catalog.pg_current_snapshot()::text, ` + feed.ServerSQL + `, ` + feed.OriginSQL + `, pg_catalog.pg_backend_pid()`

// A lookupSQL is a statement that looks subjects up. It begins with stampSQL, and has a
// row even if nothing is found, so that "absent" has a stamp too.
type lookupSQL struct{ one, many string }

// newLookupSQL returns a lookup with $1 for the subject or the array of subjects that
// it looks for. A single subject is no array: Postgres would plan the statement anew
// each time, since it takes every array for one of ten.
func newLookupSQL(sql string) lookupSQL {
	return lookupSQL{sql, strings.Replace(sql, "$1", "ANY($1)", 1)}
}

var (
	keySQL = newLookupSQL(`
SELECT ` + stampSQL + `, k.key_hash, k.id::text, k.org_id, k.active, k.expires_at
FROM (VALUES (1)) AS one
LEFT JOIN api_keys k ON k.key_hash = $1`)

	keyAndPlanSQL = newLookupSQL(`
SELECT ` + stampSQL + `, k.key_hash, k.id::text, k.org_id, k.active, k.expires_at,
	o.plan, o.status, c.api_access, o.ends_at
FROM (VALUES (1)) AS one
LEFT JOIN api_keys k ON k.key_hash = $1
LEFT JOIN (org_plans o JOIN plan_catalogue c ON c.name = o.plan) ON o.org_id = k.org_id`)
)

// Key returns the key with hash h, or ErrNotFound if api_keys has no such row.
func (s *PostgresKeyStore) Key(ctx context.Context, h KeyHash) (Key, error) {
	keys, err := s.Keys(ctx, []KeyHash{h})
	if err != nil {
		return Key{}, err
	}
	key, ok := keys[h]
	if !ok {
		return Key{}, ErrNotFound
	}
	return key, nil
}

// Keys implements [BatchKeyStore], in one statement.
func (s *PostgresKeyStore) Keys(ctx context.Context, hashes []KeyHash) (map[KeyHash]Key, error) {
	keys := make(map[KeyHash]Key, len(hashes))
	var r keyRow
	err := lookUp(ctx, s.db, keySQL, byteSlices(hashes), r.columns(), func() {
		if h, key, ok := r.key(); ok {
			keys[h] = key
		}
	})
	if err != nil {
		return nil, fmt.Errorf("apikey: reading api_keys: %w", err)
	}
	return keys, nil
}

// A keyAndPlan is a key with the plan of its organisation; nil: it has none.
type keyAndPlan struct {
	key  Key
	plan *Plan
}

// keysAndPlans is Keys, with the plans in the same statement.
func (s *PostgresKeyStore) keysAndPlans(ctx context.Context, hashes []KeyHash) (map[KeyHash]keyAndPlan, error) {
	found := make(map[KeyHash]keyAndPlan, len(hashes))
	var k keyRow
	var p planRow
	err := lookUp(ctx, s.db, keyAndPlanSQL, byteSlices(hashes), append(k.columns(), p.columns()...), func() {
		if h, key, ok := k.key(); ok {
			found[h] = keyAndPlan{key, p.plan()}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("apikey: reading api_keys and org_plans: %w", err)
	}
	return found, nil
}

// A keyRow is what a lookup reads of api_keys; all NULL if there is no such row.
type keyRow struct {
	hash      []byte
	id, orgID *string
	active    *bool
	expiresAt *time.Time
}

func (r *keyRow) columns() []any { return []any{&r.hash, &r.id, &r.orgID, &r.active, &r.expiresAt} }

func (r *keyRow) key() (KeyHash, Key, bool) {
	if r.id == nil {
		return KeyHash{}, Key{}, false
	}
	return KeyHash(r.hash), Key{ID: *r.id, OrgID: *r.orgID, Active: *r.active, ExpiresAt: timeOrZero(r.expiresAt)}, true
}

func byteSlices(hashes []KeyHash) [][]byte {
	slices := make([][]byte, len(hashes))
	for i := range hashes {
		slices[i] = hashes[i][:]
	}
	return slices
}

// lookUp looks subjects up, reports the snapshot, and calls each for every row. If the
// pool has no connection free in time, the error is [readthrough.ErrBusy].
func lookUp[S any](ctx context.Context, on oneTrip, sql lookupSQL, subjects []S, columns []any, each func()) error {
	db := on.db
	var conn *pgx.Conn // nil: not known
	switch d := db.(type) {
	case *pgxpool.Pool:
		pooled, err := acquire(ctx, d)
		if err != nil {
			return err
		}
		defer pooled.Release()
		db, conn = pooled, pooled.Conn()
	case *pgx.Conn:
		conn = d
	case pgx.Tx:
		conn = d.Conn()
	}
	statement, arg := sql.many, any(subjects)
	if len(subjects) == 1 {
		statement, arg = sql.one, subjects[0]
	}
	args := []any{pgx.QueryExecModeExec, arg}
	if isDirect(conn) {
		args = args[1:]
	}
	rows, err := db.Query(ctx, statement, args...)
	if err != nil {
		return err
	}
	var stamp string
	var server snapshot.Server
	var origin snapshot.Origin
	var pid uint32
	_, err = pgx.ForEachRow(rows, append([]any{&stamp, &server, &origin, &pid}, columns...), func() error {
		each()
		return nil
	})
	if err != nil {
		return err
	}
	if conn != nil && conn.PgConn().PID() == pid {
		conn.PgConn().CustomData()[directKey] = true
	}
	snapshot.ReportOrigin(ctx, origin)
	if server == 0 {
		snapshot.ReportStandby(ctx)
		return nil
	}
	snapshot.Report(ctx, stamp, server)
	return nil
}

// directKey marks connections that lead to PostgreSQL itself.
const directKey = "github.com/trackpilots/apikey: direct"

// isDirect reports whether conn is known to lead to PostgreSQL itself, and not to a
// pooler, which may run each statement on another connection, where it is not prepared.
// The process that answered is the one that the connection was made to.
func isDirect(conn *pgx.Conn) bool {
	return conn != nil && conn.PgConn().CustomData()[directKey] != nil
}

// oneTrip is a DB whose statements are not prepared, whatever the default of db is:
// they pass poolers, and take one round trip.
type oneTrip struct{ db DB }

func (o oneTrip) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return o.db.Exec(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
}

func (o oneTrip) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return o.db.Query(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
}

func (o oneTrip) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return o.db.QueryRow(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
}

// acquire takes a connection out of pool. If the server allows no more of them, it
// waits for one of those that the pool has or is getting.
func acquire(ctx context.Context, pool *pgxpool.Pool) (*pgxpool.Conn, error) {
	limited := false
	for tries := 0; ; tries++ {
		conn, err := pool.Acquire(ctx)
		if err == nil {
			return conn, nil
		}
		stat := pool.Stat()
		e, refused := errors.AsType[*pgconn.PgError](err)
		refused = refused && e.Code == tooManyConnections
		limited = limited || refused
		switch {
		case ctx.Err() != nil && stat.AcquiredConns() > 0 && (limited || stat.AcquiredConns() >= stat.MaxConns()):
			return nil, fmt.Errorf("%w: %w", readthrough.ErrBusy, err)
		case !refused || ctx.Err() != nil || stat.TotalConns() == 0 || tries == maxTries:
			return nil, err
		}
		select {
		case <-time.After(waitForFree):
		case <-ctx.Done():
		}
	}
}

const (
	tooManyConnections = "53300" // SQLSTATE too_many_connections
	waitForFree        = 5 * time.Millisecond
	maxTries           = 200
)

// MaxKeysPerOrg is how many keys an organisation may have. Expired ones do not count.
// Creations at the same time may exceed it by a few.
const MaxKeysPerOrg = 1000

// What can be wrong with a request to a store, beside [ErrNotFound] and
// [*InputError].
var (
	ErrKeyExists = errors.New("apikey: this key is on record already")
	ErrKeyLimit  = fmt.Errorf("apikey: the organisation has %d keys already: delete some", MaxKeysPerOrg)
	ErrKeyDead   = errors.New("apikey: the key is deactivated or expired: create a new one")
)

// An InputError is a value that cannot be stored, and what to use instead.
type InputError struct{ Field, Problem string }

// Error returns the field and the problem.
func (e *InputError) Error() string { return "apikey: " + e.Field + ": " + e.Problem }

// A Secret is the plaintext of a new key. It prints as [redacted], however deep in
// another value it is and whatever the verb; only Reveal returns it.
type Secret struct{ reveal func() string } // in a function, where reflection finds nothing

// Reveal returns the key: to be shown to the customer, once.
func (s Secret) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// Format implements [fmt.Formatter].
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[redacted]") }

// MarshalText implements [encoding.TextMarshaler], for JSON and logs.
func (Secret) MarshalText() ([]byte, error) { return []byte("[redacted]"), nil }

// An Environment is what a key says that it is for, in its text. Authentication treats
// all alike.
type Environment string

// The environments of keys. Those that were issued elsewhere may have none: "".
const (
	EnvironmentLive = Environment(keyformat.Live)
	EnvironmentTest = Environment(keyformat.Test)
)

// A NewKey is what the maker of a key may choose. What is zero is the default of a new
// key, and what the old key has if the new one takes its place: see
// [PostgresKeyStore.Rotate].
type NewKey struct {
	Name        string      // for people: up to 255 characters, none of them a control character; Defaults to ""
	Environment Environment // Defaults to EnvironmentLive; keys issued elsewhere are left as they are
	ExpiresAt   time.Time   // the first instant at which it is dead; Defaults to never
	NeverEnds   bool        // it never expires, although the old key does
}

// A KeyInfo is what is known of a key, for people to look after it.
type KeyInfo struct {
	ID         string
	OrgID      string
	Name       string
	Hint       string // the first characters of its random part; "" if it was issued elsewhere
	Active     bool   // false: deactivated
	CreatedAt  time.Time
	ExpiresAt  time.Time // zero: never
	LastUsedAt time.Time // zero: never, or not recorded: see [LastUsed]

	Environment Environment
}

// State returns "active", "deactivated" or "expired".
func (k KeyInfo) State(now time.Time) string {
	switch {
	case !k.Active:
		return "deactivated"
	case !k.key().live(now):
		return "expired"
	}
	return "active"
}

func (k KeyInfo) key() Key {
	return Key{ID: k.ID, OrgID: k.OrgID, Active: k.Active, ExpiresAt: k.ExpiresAt}
}

const (
	infoColumns = `k.id::text, k.org_id, k.name, k.hint, k.active, k.created_at, k.expires_at, k.environment, u.last_used_at`
	infoTables  = `api_keys k LEFT JOIN api_key_uses u ON u.key_id = k.id`
	newColumns  = `k.id::text, k.org_id, k.name, k.hint, k.active, k.created_at, k.expires_at, k.environment, NULL::timestamptz` // never used
)

// scanInfo reads infoColumns or newColumns, which may all be NULL.
func scanInfo(row pgx.Row, before ...any) (KeyInfo, error) {
	var (
		id, orgID, name, hint, env       *string
		active                           *bool
		createdAt, expiresAt, lastUsedAt *time.Time
	)
	err := row.Scan(append(before, &id, &orgID, &name, &hint, &active, &createdAt, &expiresAt, &env, &lastUsedAt)...)
	if err != nil || id == nil {
		return KeyInfo{}, err
	}
	return KeyInfo{
		ID: *id, OrgID: *orgID, Name: *name, Hint: *hint, Active: *active,
		CreatedAt: timeOrZero(createdAt), ExpiresAt: timeOrZero(expiresAt), LastUsedAt: timeOrZero(lastUsedAt),
		Environment: Environment(*env),
	}, nil
}

// Create makes a key for an organisation. The Secret is in no store: whoever does
// not reveal it now never will. Errors: [*InputError], [ErrKeyLimit].
func (s *PostgresKeyStore) Create(ctx context.Context, orgID string, k NewKey) (KeyInfo, Secret, error) {
	k.Environment = cmp.Or(k.Environment, EnvironmentLive)
	if err := errors.Join(checkOrgID(orgID), k.check()); err != nil {
		return KeyInfo{}, Secret{}, err
	}
	secret, h, hint := newSecret(k.Environment)
	info, err := s.insert(ctx, orgID, k, h, hint)
	if err != nil {
		return KeyInfo{}, Secret{}, err
	}
	return info, secret, nil
}

func newSecret(env Environment) (Secret, KeyHash, string) {
	key := keyformat.New(keyformat.Environment(env))
	return Secret{func() string { return key }}, HashKey(key), keyformat.Hint(key)
}

// Import takes in a key that was issued elsewhere, by its plaintext, which is not
// kept: a token68 (RFC 9110, section 11.2) of 16 to 512 bytes. Errors:
// [*InputError], [ErrKeyExists], whosever it is, and [ErrKeyLimit].
func (s *PostgresKeyStore) Import(ctx context.Context, orgID, key string, k NewKey) (KeyInfo, error) {
	switch {
	case len(key) < minKeyLen || len(key) > bearer.MaxKeyLen || !bearer.IsToken68(key):
		return KeyInfo{}, &InputError{"key", fmt.Sprintf("use %d to %d of the characters A-Z a-z 0-9 - . _ ~ + /, and = at the end only", minKeyLen, bearer.MaxKeyLen)}
	case !keyformat.Plausible(key):
		return KeyInfo{}, &InputError{"key", "it begins like a key of ours, but its checksum is wrong: look for a typing error"}
	}
	k.Environment = Environment(keyformat.EnvironmentOf(key))
	return s.insert(ctx, orgID, k, HashKey(key), keyformat.Hint(key))
}

// minKeyLen is the length in bytes that keys issued elsewhere must have.
const minKeyLen = 16

// ImportHash is [PostgresKeyStore.Import] by the SHA-256 of the key, which does not tell
// what Import refuses: a key that is too short or long, or no token68, or that begins
// with tpk_live_ or tpk_test_ and has another checksum, is then on record and refused
// with [ErrInvalidAPIKey] all the same.
func (s *PostgresKeyStore) ImportHash(ctx context.Context, orgID string, h KeyHash, k NewKey) (KeyInfo, error) {
	return s.insert(ctx, orgID, k, h, "")
}

func (s *PostgresKeyStore) insert(ctx context.Context, orgID string, k NewKey, h KeyHash, hint string) (KeyInfo, error) {
	if err := errors.Join(checkOrgID(orgID), k.check()); err != nil {
		return KeyInfo{}, err
	}
	var count int
	info, err := scanInfo(s.db.QueryRow(ctx, `
		WITH had AS (SELECT count(*) AS n FROM api_keys WHERE org_id = $1 AND coalesce(expires_at > now(), true)),
		made AS (
			INSERT INTO api_keys (org_id, name, hint, key_hash, expires_at, environment)
			SELECT $1, $2, $3, $4, $5, $7 FROM had WHERE n < $6
			ON CONFLICT (key_hash) DO NOTHING RETURNING *
		)
		SELECT had.n, `+newColumns+` FROM had LEFT JOIN made k ON true`,
		orgID, k.Name, hint, h[:], nullTime(k.ExpiresAt), MaxKeysPerOrg, string(k.Environment)), &count)
	switch {
	case err != nil:
		return KeyInfo{}, fmt.Errorf("apikey: creating a key: %w", err)
	case info.ID != "":
		return info, nil
	case count >= MaxKeysPerOrg:
		return KeyInfo{}, ErrKeyLimit
	}
	return KeyInfo{}, ErrKeyExists
}

// A Page is a part of a list.
type Page struct {
	After string // what List returned with the page before; "": the first page
	Limit int    // Defaults to 100, at most 1000
}

// List returns the keys of an organisation, oldest first, and what the After of the
// next page is; "" if there is none. Errors: [*InputError].
func (s *PostgresKeyStore) List(ctx context.Context, orgID string, page Page) (keys []KeyInfo, next string, err error) {
	if page.Limit == 0 {
		page.Limit = 100
	}
	if page.Limit < 1 || page.Limit > 1000 {
		return nil, "", &InputError{"page limit", fmt.Sprintf("is %d: use 1 to 1000", page.Limit)}
	}
	createdAt := pgtype.Timestamptz{InfinityModifier: pgtype.NegativeInfinity, Valid: true}
	id := "00000000-0000-0000-0000-000000000000"
	if page.After != "" {
		var micros int64
		if _, err := fmt.Sscanf(page.After, "%d.%36s", &micros, &id); err != nil || !isUUID(id) {
			return nil, "", &InputError{"page", "use what came with the page before, unchanged"}
		}
		createdAt = pgtype.Timestamptz{Time: time.UnixMicro(micros), Valid: true}
	}
	rows, err := s.db.Query(ctx, `SELECT `+infoColumns+` FROM `+infoTables+`
		WHERE k.org_id = $1 AND (k.created_at, k.id) > ($2, $3) ORDER BY k.created_at, k.id LIMIT $4`, orgID, createdAt, id, page.Limit+1)
	if err == nil {
		keys, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (KeyInfo, error) { return scanInfo(row) })
	}
	if err != nil {
		return nil, "", fmt.Errorf("apikey: listing keys: %w", err)
	}
	if len(keys) > page.Limit {
		keys = keys[:page.Limit]
		last := keys[len(keys)-1]
		next = fmt.Sprintf("%d.%s", last.CreatedAt.UnixMicro(), last.ID)
	}
	return keys, next, nil
}

// Deactivate makes a key dead until it is activated again. It is no error if it
// was so already. Errors: [ErrNotFound].
func (s *PostgresKeyStore) Deactivate(ctx context.Context, orgID, keyID string) error {
	return s.change(ctx, "deactivating", `UPDATE api_keys SET active = false WHERE org_id = $1 AND id = $2`, orgID, keyID)
}

// Activate takes back Deactivate, but not an expiry. Errors: [ErrNotFound].
func (s *PostgresKeyStore) Activate(ctx context.Context, orgID, keyID string) error {
	return s.change(ctx, "activating", `UPDATE api_keys SET active = true WHERE org_id = $1 AND id = $2`, orgID, keyID)
}

// DeactivateAll makes all keys of an organisation dead, and returns how many were active.
func (s *PostgresKeyStore) DeactivateAll(ctx context.Context, orgID string) (int64, error) {
	tag, err := s.db.Exec(ctx, `UPDATE api_keys SET active = false WHERE org_id = $1 AND active`, orgID)
	if err != nil {
		return 0, fmt.Errorf("apikey: deactivating the keys of an organisation: %w", err)
	}
	return tag.RowsAffected(), nil
}

// Prune deletes the keys of all organisations that expired before a time, at most 10,000
// of them, and returns how many: call it again until it returns 0.
func (s *PostgresKeyStore) Prune(ctx context.Context, expiredBefore time.Time) (int64, error) {
	if expiredBefore.After(time.Now()) {
		return 0, &InputError{"time", "is still to come: keys that are not expired are not pruned"}
	}
	tag, err := s.db.Exec(ctx, `DELETE FROM api_keys WHERE id IN (SELECT id FROM api_keys WHERE expires_at < $1 LIMIT 10000)`, expiredBefore)
	if err != nil {
		return 0, fmt.Errorf("apikey: pruning keys: %w", err)
	}
	return tag.RowsAffected(), nil
}

// Delete forgets a key. Errors: [ErrNotFound].
func (s *PostgresKeyStore) Delete(ctx context.Context, orgID, keyID string) error {
	return s.change(ctx, "deleting", `DELETE FROM api_keys WHERE org_id = $1 AND id = $2`, orgID, keyID)
}

// Expire sets the first instant at which a key is dead, which may have passed;
// zero: never. Errors: [ErrNotFound].
func (s *PostgresKeyStore) Expire(ctx context.Context, orgID, keyID string, at time.Time) error {
	return s.change(ctx, "expiring", `UPDATE api_keys SET expires_at = $3 WHERE org_id = $1 AND id = $2`, orgID, keyID, nullTime(at))
}

func (s *PostgresKeyStore) change(ctx context.Context, what, sql, orgID, keyID string, args ...any) error {
	if !isUUID(keyID) {
		return ErrNotFound
	}
	tag, err := s.db.Exec(ctx, sql, append([]any{orgID, keyID}, args...)...)
	switch {
	case err != nil:
		return fmt.Errorf("apikey: %s a key: %w", what, err)
	case tag.RowsAffected() == 0:
		return ErrNotFound
	}
	return nil
}

// Rotate makes a new key in the place of a live one, which lives on until a given
// instant, unless it expires before; one that has passed ends it at once. The new
// key has the old one's name, environment and end, as far as k does not say otherwise.
// Errors: [ErrNotFound], [ErrKeyDead], [ErrKeyLimit], [*InputError].
func (s *PostgresKeyStore) Rotate(ctx context.Context, orgID, keyID string, until time.Time, k NewKey) (KeyInfo, Secret, error) {
	if err := k.check(); err != nil {
		return KeyInfo{}, Secret{}, err
	}
	if until.IsZero() {
		return KeyInfo{}, Secret{}, &InputError{"until", "say when the old key ends; time.Now() ends it at once"}
	}
	if !isUUID(keyID) {
		return KeyInfo{}, Secret{}, ErrNotFound
	}
	env := k.Environment
	if env == "" {
		err := s.db.QueryRow(ctx, `SELECT coalesce(nullif(environment, ''), 'live') FROM api_keys WHERE org_id = $1 AND id = $2`, orgID, keyID).Scan(&env)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return KeyInfo{}, Secret{}, ErrNotFound
		case err != nil:
			return KeyInfo{}, Secret{}, fmt.Errorf("apikey: rotating a key: %w", err)
		}
	}
	secret, h, hint := newSecret(env)
	var known, alive bool
	info, err := scanInfo(s.db.QueryRow(ctx, `
		WITH had AS (
			SELECT id, name, expires_at, active AND coalesce(expires_at > now(), true) AS alive,
				(SELECT count(*) FROM api_keys WHERE org_id = $1 AND coalesce(expires_at > now(), true)) < $8 AS room
			FROM api_keys WHERE org_id = $1 AND id = $2 FOR UPDATE
		),
		old AS (
			UPDATE api_keys k SET expires_at = least(k.expires_at, $3) FROM had
			WHERE k.id = had.id AND alive AND room RETURNING k.name, had.expires_at
		),
		made AS (
			INSERT INTO api_keys (org_id, name, hint, key_hash, expires_at, environment)
			SELECT $1, coalesce(nullif($4, ''), name), $5, $6, CASE WHEN $10 THEN NULL ELSE coalesce($7::timestamptz, expires_at) END, $9 FROM old RETURNING *
		)
		SELECT had.id IS NOT NULL, coalesce(alive, false), `+newColumns+`
		FROM (VALUES (1)) AS one LEFT JOIN had ON true LEFT JOIN made k ON true`,
		orgID, keyID, until, k.Name, hint, h[:], nullTime(k.ExpiresAt), MaxKeysPerOrg, string(env), k.NeverEnds), &known, &alive)
	switch {
	case err != nil:
		err = fmt.Errorf("apikey: rotating a key: %w", err)
	case info.ID != "":
		return info, secret, nil
	case !known:
		err = ErrNotFound
	case !alive:
		err = ErrKeyDead
	default:
		err = ErrKeyLimit
	}
	return KeyInfo{}, Secret{}, err
}

// Find returns a key by its id, whosever it is, and its hash: for support, not for
// customers. Errors: [ErrNotFound].
func (s *PostgresKeyStore) Find(ctx context.Context, keyID string) (KeyInfo, KeyHash, error) {
	if !isUUID(keyID) {
		return KeyInfo{}, KeyHash{}, ErrNotFound
	}
	return s.find(ctx, `id`, keyID)
}

// FindHash is [PostgresKeyStore.Find] by the hash of the key.
func (s *PostgresKeyStore) FindHash(ctx context.Context, h KeyHash) (KeyInfo, KeyHash, error) {
	return s.find(ctx, `key_hash`, h[:])
}

func (s *PostgresKeyStore) find(ctx context.Context, column string, value any) (KeyInfo, KeyHash, error) {
	var h []byte
	info, err := scanInfo(s.db.QueryRow(ctx, `SELECT k.key_hash, `+infoColumns+` FROM `+infoTables+` WHERE k.`+column+` = $1`, value), &h)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return KeyInfo{}, KeyHash{}, ErrNotFound
	case err != nil:
		return KeyInfo{}, KeyHash{}, fmt.Errorf("apikey: reading api_keys: %w", err)
	}
	return info, KeyHash(h), nil
}

// LastUsed records when keys were last used, in the table api_key_uses: in batches, off
// the request path, to the interval or so. Give it to a [Middleware] by Options.LastUsed,
// and run it. It is safe for concurrent use.
//
// Beside what reading keys takes, its role needs SELECT, INSERT and UPDATE on
// api_key_uses.
type LastUsed struct {
	db       oneTrip
	interval time.Duration
	uses     *lastused.Uses
}

// NewLastUsed returns a LastUsed that writes to db once in every interval, and records a
// key at most that often, whichever replica it was used on; 0 is a minute. It panics if
// db is nil or the interval negative.
func NewLastUsed(db DB, interval time.Duration) *LastUsed {
	if isNil(db) {
		panic("apikey: NewLastUsed: db is nil: pass a *pgxpool.Pool")
	}
	if interval < 0 {
		panic(fmt.Sprintf("apikey: NewLastUsed: the interval is %v: use 0 for a minute, or more", interval))
	}
	interval = cmp.Or(interval, time.Minute)
	return &LastUsed{oneTrip{db}, interval, lastused.New(interval)}
}

// Run writes until ctx ends, and then once more, for up to 5 s; it returns the error of
// that last write. Wait for it before the program ends. Uses that cannot be written are
// kept for the next time, as far as there is room for them: see [LastUsed.Dropped].
func (u *LastUsed) Run(ctx context.Context) error { return u.uses.Run(ctx, u.write) }

// Dropped returns how many uses were not recorded, because more than 65,536 keys waited.
func (u *LastUsed) Dropped() uint64 { return u.uses.Dropped() }

// write writes what no replica has written within the interval. All write in the order
// of ids, so that they do not wait for each other in a circle.
func (u *LastUsed) write(ctx context.Context, ids []string, times []time.Time) error {
	var uuids []string // keys of other stores have other ids
	var at []time.Time
	for i, id := range ids {
		if isUUID(id) {
			uuids, at = append(uuids, id), append(at, times[i])
		}
	}
	_, err := u.db.Exec(ctx, `
		INSERT INTO api_key_uses AS u (key_id, last_used_at)
		SELECT k.id, used.at FROM unnest($1::uuid[], $2::timestamptz[]) AS used (id, at)
		JOIN api_keys k USING (id) LEFT JOIN api_key_uses had ON had.key_id = k.id
		WHERE had.last_used_at IS NULL OR had.last_used_at <= used.at - make_interval(secs => $3)
		ORDER BY k.id
		ON CONFLICT (key_id) DO UPDATE SET last_used_at = excluded.last_used_at
		WHERE u.last_used_at <= excluded.last_used_at - make_interval(secs => $3)`, uuids, at, u.interval.Seconds())
	if err != nil {
		return fmt.Errorf("apikey: recording the last use of %d keys: %w", len(uuids), err)
	}
	return nil
}

func (k NewKey) check() error {
	switch {
	case !utf8.ValidString(k.Name) || strings.ContainsFunc(k.Name, unicode.IsControl):
		return &InputError{"name", "use UTF-8 without control characters"}
	case utf8.RuneCountInString(k.Name) > maxNameLen:
		return &InputError{"name", fmt.Sprintf("has %d characters: use at most %d", utf8.RuneCountInString(k.Name), maxNameLen)}
	case k.Environment != "" && k.Environment != EnvironmentLive && k.Environment != EnvironmentTest:
		return &InputError{"environment", fmt.Sprintf("%q is neither %q nor %q", k.Environment, EnvironmentLive, EnvironmentTest)}
	case k.NeverEnds && !k.ExpiresAt.IsZero():
		return &InputError{"expiry", "a key that never ends has none: leave one of the two out"}
	case !k.ExpiresAt.IsZero() && !k.ExpiresAt.After(time.Now()):
		return &InputError{"expiry", "has passed already: use a time to come, or none"}
	}
	return nil
}

const (
	maxNameLen  = 255 // characters
	maxOrgIDLen = 255 // bytes
)

func checkOrgID(orgID string) error {
	switch {
	case orgID == "" || len(orgID) > maxOrgIDLen || !utf8.ValidString(orgID) || strings.ContainsRune(orgID, 0):
		return &InputError{"organisation", fmt.Sprintf("use 1 to %d bytes of UTF-8 for its id", maxOrgIDLen)}
	case strings.TrimSpace(orgID) != orgID:
		return &InputError{"organisation", "its id has blanks around it: leave them out"}
	}
	return nil
}

func isUUID(s string) bool {
	var u pgtype.UUID
	return len(s) == 36 && u.Scan(s) == nil
}

// nullTime maps the zero time to NULL.
func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// isNil reports whether v is nil, or holds a nil pointer or function: what would
// panic at the first request.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Pointer, reflect.Func:
		return r.IsNil()
	}
	return false
}

// timeOrZero maps NULL to the zero time.
func timeOrZero(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.UTC()
}
