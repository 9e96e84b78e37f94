package apikey

// Looking up a key: KeyHash, Key, KeyStore, and the Postgres key store. No key goes past
// HashKey in plain text.

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/pg"
)

// ErrNotFound is what a store returns if it was read and holds no such key or plan. Stores
// may wrap it.
var ErrNotFound = errors.New("apikey: not found")

// A KeyHash is the SHA-256 hash of a key. Keys are stored and looked up in this form only.
// They are long and random, so a fast hash without salt is enough.
type KeyHash [sha256.Size]byte

// HashKey returns the hash of a key as clients send it.
func HashKey(key string) KeyHash {
	var buf [64]byte // a conversion would allocate
	return sha256.Sum256(append(buf[:0], key...))
}

// A Key is what a store knows about an API key, without the key itself.
type Key struct {
	ID        string    // identifies the key in logs and dashboards; not secret
	OrgID     string    // its organisation; never empty
	Active    bool      // false: deactivated
	ExpiresAt time.Time // from then on it is refused; zero: never
}

func (k Key) equal(other Key) bool {
	same := k.ExpiresAt.Equal(other.ExpiresAt)
	k.ExpiresAt, other.ExpiresAt = time.Time{}, time.Time{}
	return same && k == other
}

// Live reports whether the key may be used at now.
func (k Key) Live(now time.Time) bool {
	return k.Active && (k.ExpiresAt.IsZero() || now.Before(k.ExpiresAt))
}

// A KeyStore looks up keys by their hash. It must be safe for concurrent use and must
// return when ctx ends. It returns deactivated and expired keys, too: the middleware
// decides.
//
// [ErrNotFound], or an error that wraps it, means that there is no such key: the request
// is refused with [ErrInvalidAPIKey]. Every other error means that the store could not be
// read: the request is answered with [ErrUnavailable].
type KeyStore interface {
	Key(ctx context.Context, h KeyHash) (Key, error)
}

// A BatchKeyStore is a KeyStore that can look up many keys at once. A [Cache] calls Keys
// and never Key, so a type that embeds a BatchKeyStore and overrides Key must override
// Keys, too.
type BatchKeyStore interface {
	KeyStore

	// Keys returns the keys that exist, by hash. A hash without an entry means that there
	// is no such key. An error means that the store could not be read.
	Keys(ctx context.Context, hashes []KeyHash) (map[KeyHash]Key, error)
}

// KeyStoreFunc lets a function be a [KeyStore].
type KeyStoreFunc func(ctx context.Context, h KeyHash) (Key, error)

// Key calls f.
func (f KeyStoreFunc) Key(ctx context.Context, h KeyHash) (Key, error) { return f(ctx, h) }

// A DB is a *pgxpool.Pool, a *pgx.Conn or a pgx.Tx. Only a pool is safe for concurrent
// use. For lookups it must lead to the primary: a standby lags behind, and what it returns
// is used for MaxStaleness only.
type DB interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// A PostgresKeyStore is a [BatchKeyStore] that reads the table api_keys of the migrations.
// It is safe for concurrent use if its DB is. Package admin writes that table.
type PostgresKeyStore struct{ db *pg.Reader }

// NewPostgresKeyStore returns a key store that reads from db. It panics if db is nil.
func NewPostgresKeyStore(db DB) *PostgresKeyStore {
	if pg.IsNil(db) {
		panic("apikey: NewPostgresKeyStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresKeyStore{pg.NewReader(db)}
}

// stampSQL are the first columns of a lookup: the snapshot, whether it is of a standby, the
// identity of the tables, and the process that answers.
const stampSQL = `pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_is_in_recovery(), ` + feed.OriginSQL + `, pg_catalog.pg_backend_pid()`

// newLookup returns the statement that looks up one subject or many. It begins with stampSQL,
// and returns a row even if nothing is found, so that "absent" has a stamp, too. $1 is the
// subject. A single subject is not passed as an array: PostgreSQL assumes ten elements in any
// array, and would plan the statement anew each time.
func newLookup(sql string) pg.Lookup {
	return pg.Lookup{One: sql, Many: strings.Replace(sql, "$1", "ANY($1)", 1)}
}

var (
	keySQL = newLookup(`
SELECT ` + stampSQL + `, k.key_hash, k.id::text, k.org_id, k.active, k.expires_at
FROM (VALUES (1)) AS one
LEFT JOIN api_keys k ON k.key_hash = $1`)

	keyAndPlanSQL = newLookup(`
SELECT ` + stampSQL + `, k.key_hash, k.id::text, k.org_id, k.active, k.expires_at,
	o.plan, o.status, c.api_access, o.ends_at
FROM (VALUES (1)) AS one
LEFT JOIN api_keys k ON k.key_hash = $1
LEFT JOIN (org_plans o JOIN plan_catalogue c ON c.name = o.plan) ON o.org_id = k.org_id`)
)

// Key implements [KeyStore].
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

// Keys implements [BatchKeyStore] with one statement.
func (s *PostgresKeyStore) Keys(ctx context.Context, hashes []KeyHash) (map[KeyHash]Key, error) {
	keys := make(map[KeyHash]Key, len(hashes))
	var r keyRow
	err := pg.LookUp(ctx, s.db, keySQL, byteSlices(hashes), r.columns(), func() {
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

// keysAndPlans is Keys, and reads the plans with the same statement.
func (s *PostgresKeyStore) keysAndPlans(ctx context.Context, hashes []KeyHash) (map[KeyHash]keyAndPlan, error) {
	found := make(map[KeyHash]keyAndPlan, len(hashes))
	var k keyRow
	var p planRow
	err := pg.LookUp(ctx, s.db, keyAndPlanSQL, byteSlices(hashes), append(k.columns(), p.columns()...), func() {
		if h, key, ok := k.key(); ok {
			found[h] = keyAndPlan{key, p.plan()}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("apikey: reading api_keys and org_plans: %w", err)
	}
	return found, nil
}

// A keyRow holds the columns of api_keys in a lookup; all NULL if there is no such row.
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
	return KeyHash(r.hash), Key{ID: *r.id, OrgID: *r.orgID, Active: *r.active, ExpiresAt: pg.TimeOrZero(r.expiresAt)}, true
}

func byteSlices(hashes []KeyHash) [][]byte {
	slices := make([][]byte, len(hashes))
	for i := range hashes {
		slices[i] = hashes[i][:]
	}
	return slices
}
