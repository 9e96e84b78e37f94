package apikey

// Whose key it is: KeyHash, Key, KeyStore, and the Postgres key store. A key's
// plaintext ends at HashKey; nothing here stores, logs or returns it.

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/jackc/pgx/v5"

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

// A KeyStoreFunc is a function that is a KeyStore.
type KeyStoreFunc func(ctx context.Context, h KeyHash) (Key, error)

// Key calls f.
func (f KeyStoreFunc) Key(ctx context.Context, h KeyHash) (Key, error) { return f(ctx, h) }

// A DB is where the Postgres stores read: a *pgxpool.Pool, a *pgx.Conn or a
// pgx.Tx. Only a pool is safe for concurrent use. It must lead to the primary:
// a standby lags, and its snapshots leave out running transactions.
type DB interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// A PostgresKeyStore is a KeyStore on the table api_keys of the migrations. It
// is safe for concurrent use if its DB is.
type PostgresKeyStore struct{ db DB }

// NewPostgresKeyStore returns the key store on db. It panics if db is nil.
func NewPostgresKeyStore(db DB) *PostgresKeyStore {
	if isNil(db) {
		panic("apikey: NewPostgresKeyStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresKeyStore{db}
}

// keySQL has one row, found or not, so that "absent" has a snapshot too.
const keySQL = `
SELECT pg_current_snapshot()::text, k.id::text, k.org_id, k.active, k.expires_at
FROM (VALUES (1)) AS one
LEFT JOIN api_keys k ON k.key_hash = $1`

// Key returns the key with hash h, or ErrNotFound if api_keys has no such row.
func (s *PostgresKeyStore) Key(ctx context.Context, h KeyHash) (Key, error) {
	var (
		stamp     string
		id, orgID *string
		active    *bool
		expiresAt *time.Time
	)
	err := s.db.QueryRow(ctx, keySQL, h[:]).Scan(&stamp, &id, &orgID, &active, &expiresAt)
	if err != nil {
		return Key{}, fmt.Errorf("apikey: reading api_keys: %w", err)
	}
	snapshot.Report(ctx, stamp)
	if id == nil {
		return Key{}, ErrNotFound
	}
	return Key{ID: *id, OrgID: *orgID, Active: *active, ExpiresAt: timeOrZero(expiresAt)}, nil
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
