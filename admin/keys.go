package admin

// Creating and managing keys. A new key is in plain text in a Secret only.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/bearer"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
)

// Keys creates and manages the keys in the table api_keys of the migrations. It is safe for
// concurrent use if its DB is. Methods that take an organisation see its keys only.
type Keys struct{ db pg.OneTrip }

// NewKeys returns a Keys that uses db. It panics if db is nil.
func NewKeys(db apikey.DB) *Keys {
	if pg.IsNil(db) {
		panic("admin: NewKeys: db is nil: pass a *pgxpool.Pool or a pgx.Tx")
	}
	return &Keys{pg.OneTrip{DB: db}}
}

// MaxKeysPerOrg is the number of keys that an organisation may have, without expired ones.
// Concurrent calls may exceed it by a few.
const MaxKeysPerOrg = 1000

// A Secret is a new key in plain text. It prints as [redacted], with every verb and inside
// other values. Only Reveal returns the key.
type Secret struct{ reveal func() string } // a closure, since reflection cannot look into it

// Reveal returns the key. Show it to the customer once.
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

// An Environment is a part of a key's text that says what the key is for. Authentication
// does not look at it.
type Environment string

// The environments. Keys that were issued elsewhere may have none, which is "".
const (
	EnvironmentLive = Environment(keyformat.Live)
	EnvironmentTest = Environment(keyformat.Test)
)

// A NewKey are the properties of a new key. [Keys.Rotate] takes those that are zero from
// the old key.
type NewKey struct {
	Name        string      // up to 255 characters without control characters. Defaults to ""
	Environment Environment // ignored by Import and ImportHash. Defaults to EnvironmentLive
	ExpiresAt   time.Time   // from then on the key is refused. Defaults to never
	NeverEnds   bool        // for Rotate: the new key never expires, even if the old one does
}

// A KeyInfo describes a key.
type KeyInfo struct {
	ID         string
	OrgID      string
	Name       string
	Hint       string // the first six random characters of the key; "" if it was issued elsewhere
	Active     bool   // false: deactivated
	CreatedAt  time.Time
	ExpiresAt  time.Time // zero: never
	LastUsedAt time.Time // zero: never, or not recorded: see [apikey.LastUsed]

	Environment Environment
	Hash        apikey.KeyHash
}

// State returns "active", "deactivated" or "expired".
func (k KeyInfo) State(now time.Time) string {
	switch {
	case !k.Active:
		return "deactivated"
	case !k.key().Live(now):
		return "expired"
	}
	return "active"
}

func (k KeyInfo) key() apikey.Key {
	return apikey.Key{ID: k.ID, OrgID: k.OrgID, Active: k.Active, ExpiresAt: k.ExpiresAt}
}

const (
	infoColumns = `k.id::text, k.key_hash, k.org_id, k.name, k.hint, k.active, k.created_at, k.expires_at, k.environment, u.last_used_at`
	infoTables  = `api_keys k LEFT JOIN api_key_uses u ON u.key_id = k.id`
	newColumns  = `k.id::text, k.key_hash, k.org_id, k.name, k.hint, k.active, k.created_at, k.expires_at, k.environment, NULL::timestamptz` // never used
)

// scanInfo reads infoColumns or newColumns, which may all be NULL.
func scanInfo(row pgx.Row, before ...any) (KeyInfo, error) {
	var (
		id, orgID, name, hint, env       *string
		hash                             []byte
		active                           *bool
		createdAt, expiresAt, lastUsedAt *time.Time
	)
	err := row.Scan(append(before, &id, &hash, &orgID, &name, &hint, &active, &createdAt, &expiresAt, &env, &lastUsedAt)...)
	if err != nil || id == nil {
		return KeyInfo{}, err
	}
	return KeyInfo{
		ID: *id, OrgID: *orgID, Name: *name, Hint: *hint, Active: *active,
		CreatedAt: pg.TimeOrZero(createdAt), ExpiresAt: pg.TimeOrZero(expiresAt), LastUsedAt: pg.TimeOrZero(lastUsedAt),
		Environment: Environment(*env), Hash: apikey.KeyHash(hash),
	}, nil
}

// Create creates a key for an organisation. The key itself is not stored: the Secret is the
// only way to get it. Errors: [*InputError], [ErrKeyLimit].
func (s *Keys) Create(ctx context.Context, orgID string, k NewKey) (KeyInfo, Secret, error) {
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

func newSecret(env Environment) (Secret, apikey.KeyHash, string) {
	key := keyformat.New(keyformat.Environment(env))
	return Secret{func() string { return key }}, apikey.HashKey(key), keyformat.Hint(key)
}

// Import adds a key that was issued elsewhere. It must be a token68 (RFC 9110, section 11.2)
// of 16 to 512 bytes. The key itself is not stored. Errors: [*InputError], [ErrKeyLimit],
// and [ErrKeyExists] if any organisation has this key.
func (s *Keys) Import(ctx context.Context, orgID, key string, k NewKey) (KeyInfo, error) {
	switch {
	case len(key) < minKeyLen || len(key) > bearer.MaxKeyLen || !bearer.IsToken68(key):
		return KeyInfo{}, &InputError{"key", fmt.Sprintf("use %d to %d of the characters A-Z a-z 0-9 - . _ ~ + /, and = at the end only", minKeyLen, bearer.MaxKeyLen)}
	case !keyformat.Plausible(key):
		return KeyInfo{}, &InputError{"key", "it begins with tpk_live_ or tpk_test_, but its checksum is wrong: look for a typing error"}
	}
	k.Environment = Environment(keyformat.EnvironmentOf(key))
	return s.insert(ctx, orgID, k, apikey.HashKey(key), keyformat.Hint(key))
}

// minKeyLen is the minimum length in bytes of keys that were issued elsewhere.
const minKeyLen = 16

// ImportHash is like [Keys.Import], by the SHA-256 hash of the key. It cannot check what
// Import checks. A key that Import would refuse, because of its length, its characters or
// its checksum, is imported, but every request with it is refused with
// [apikey.ErrInvalidAPIKey].
func (s *Keys) ImportHash(ctx context.Context, orgID string, h apikey.KeyHash, k NewKey) (KeyInfo, error) {
	return s.insert(ctx, orgID, k, h, "")
}

func (s *Keys) insert(ctx context.Context, orgID string, k NewKey, h apikey.KeyHash, hint string) (KeyInfo, error) {
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
		orgID, k.Name, hint, h[:], pg.NullTime(k.ExpiresAt), MaxKeysPerOrg, string(k.Environment)), &count)
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
	After string // what List returned with the previous page. Defaults to "": the first page
	Limit int    // at most 1000 keys. Defaults to 100
}

// List returns a page of an organisation's keys, oldest first, and the After of the next
// page, "" if there is none. Errors: [*InputError].
func (s *Keys) List(ctx context.Context, orgID string, page Page) (keys []KeyInfo, next string, err error) {
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
		if _, err := fmt.Sscanf(page.After, "%d.%36s", &micros, &id); err != nil || !pg.IsUUID(id) {
			return nil, "", &InputError{"page", "use what List returned with the previous page"}
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

// Deactivate deactivates a key until [Keys.Activate]. A key may be deactivated twice.
// Errors: [apikey.ErrNotFound].
func (s *Keys) Deactivate(ctx context.Context, orgID, keyID string) error {
	return s.change(ctx, "deactivating", `UPDATE api_keys SET active = false WHERE org_id = $1 AND id = $2`, orgID, keyID)
}

// Activate undoes [Keys.Deactivate]. An expired key stays expired. Errors:
// [apikey.ErrNotFound].
func (s *Keys) Activate(ctx context.Context, orgID, keyID string) error {
	return s.change(ctx, "activating", `UPDATE api_keys SET active = true WHERE org_id = $1 AND id = $2`, orgID, keyID)
}

// DeactivateAll deactivates all keys of an organisation, and returns how many were active.
// That includes those that are made meanwhile, by [Keys.Rotate] too: there was a moment
// without an active key before it returns. If it fails, some keys may be deactivated
// already: call it again.
func (s *Keys) DeactivateAll(ctx context.Context, orgID string) (int64, error) {
	// A statement that waits for a Rotate does not see the new key, but the next one does.
	// When a snapshot has no active key no Rotate is going on, since its old key would be
	// active. The order prevents deadlocks.
	ended := map[string]bool{} // since one may be activated, and deactivated again
	for range MaxKeysPerOrg {
		var ids []string
		var more bool
		err := s.db.QueryRow(ctx, `
			WITH had AS (SELECT id FROM api_keys WHERE org_id = $1 AND active ORDER BY id FOR NO KEY UPDATE),
			ended AS (UPDATE api_keys k SET active = false FROM had WHERE k.id = had.id RETURNING k.id::text)
			SELECT (SELECT array_agg(id) FROM ended), EXISTS (SELECT FROM api_keys WHERE org_id = $1 AND active)`, orgID).Scan(&ids, &more)
		if err != nil {
			return 0, fmt.Errorf("apikey: deactivating the keys of an organisation: %w", err)
		}
		for _, id := range ids {
			ended[id] = true
		}
		if !more {
			return int64(len(ended)), nil
		}
	}
	return 0, errors.New("apikey: deactivating the keys of an organisation: there are active ones again and again: stop what makes them")
}

// Prune deletes up to 10,000 keys, of any organisation, that expired before a time. It
// returns their number: call it until that is 0, which may be early if another Prune has
// just deleted the same keys. It waits for those who are changing these keys, and keeps a key
// that they have prolonged.
func (s *Keys) Prune(ctx context.Context, expiredBefore time.Time) (int64, error) {
	if expiredBefore.After(time.Now()) {
		return 0, &InputError{"time", "is in the future: only expired keys are pruned"}
	}
	// The order prevents deadlocks. The last condition looks at keys as they are after the
	// wait for their locks.
	tag, err := s.db.Exec(ctx, `
		DELETE FROM api_keys WHERE id = ANY (ARRAY(
			SELECT id FROM api_keys WHERE id = ANY (ARRAY(SELECT id FROM api_keys WHERE expires_at < $1 LIMIT 10000))
			ORDER BY id FOR UPDATE
		)) AND expires_at < $1`, expiredBefore)
	if err != nil {
		return 0, fmt.Errorf("apikey: pruning keys: %w", err)
	}
	return tag.RowsAffected(), nil
}

// Delete deletes a key. Errors: [apikey.ErrNotFound].
func (s *Keys) Delete(ctx context.Context, orgID, keyID string) error {
	return s.change(ctx, "deleting", `DELETE FROM api_keys WHERE org_id = $1 AND id = $2`, orgID, keyID)
}

// Expire sets when a key expires, which may be in the past; zero means never. Errors:
// [apikey.ErrNotFound].
func (s *Keys) Expire(ctx context.Context, orgID, keyID string, at time.Time) error {
	return s.change(ctx, "expiring", `UPDATE api_keys SET expires_at = $3 WHERE org_id = $1 AND id = $2`, orgID, keyID, pg.NullTime(at))
}

func (s *Keys) change(ctx context.Context, what, sql, orgID, keyID string, args ...any) error {
	if !pg.IsUUID(keyID) {
		return apikey.ErrNotFound
	}
	tag, err := s.db.Exec(ctx, sql, append([]any{orgID, keyID}, args...)...)
	switch {
	case err != nil:
		return fmt.Errorf("apikey: %s a key: %w", what, err)
	case tag.RowsAffected() == 0:
		return apikey.ErrNotFound
	}
	return nil
}

// Rotate creates a new key and lets the old one expire at a time, if it does not expire
// earlier. A time in the past ends the old key at once. What k leaves zero is taken from
// the old key: its name, environment and expiry. Errors: [apikey.ErrNotFound],
// [ErrKeyDead], [ErrKeyLimit], [*InputError].
func (s *Keys) Rotate(ctx context.Context, orgID, keyID string, until time.Time, k NewKey) (KeyInfo, Secret, error) {
	if err := k.check(); err != nil {
		return KeyInfo{}, Secret{}, err
	}
	if until.IsZero() {
		return KeyInfo{}, Secret{}, &InputError{"until", "say when the old key ends; time.Now() ends it at once"}
	}
	if !pg.IsUUID(keyID) {
		return KeyInfo{}, Secret{}, apikey.ErrNotFound
	}
	env := k.Environment
	if env == "" {
		err := s.db.QueryRow(ctx, `SELECT coalesce(nullif(environment, ''), 'live') FROM api_keys WHERE org_id = $1 AND id = $2`, orgID, keyID).Scan(&env)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return KeyInfo{}, Secret{}, apikey.ErrNotFound
		case err != nil:
			return KeyInfo{}, Secret{}, fmt.Errorf("apikey: rotating a key: %w", err)
		}
	}
	secret, h, hint := newSecret(env)
	var known, alive bool
	info, err := scanInfo(s.db.QueryRow(ctx, `
		WITH had AS (
			SELECT id, name, expires_at, active AND coalesce(expires_at > clock_timestamp(), true) AS alive,
				(SELECT count(*) FROM api_keys WHERE org_id = $1 AND coalesce(expires_at > now(), true)) < $8 AS room
			FROM api_keys WHERE org_id = $1 AND id = $2 FOR NO KEY UPDATE
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
		orgID, keyID, until, k.Name, hint, h[:], pg.NullTime(k.ExpiresAt), MaxKeysPerOrg, string(env), k.NeverEnds), &known, &alive)
	switch {
	case err != nil:
		err = fmt.Errorf("apikey: rotating a key: %w", err)
	case info.ID != "":
		return info, secret, nil
	case !known:
		err = apikey.ErrNotFound
	case !alive:
		err = ErrKeyDead
	default:
		err = ErrKeyLimit
	}
	return KeyInfo{}, Secret{}, err
}

// Find returns a key by its id, whichever organisation it belongs to: for support, not
// for customers. Errors: [apikey.ErrNotFound].
func (s *Keys) Find(ctx context.Context, keyID string) (KeyInfo, error) {
	if !pg.IsUUID(keyID) {
		return KeyInfo{}, apikey.ErrNotFound
	}
	return s.find(ctx, `id`, keyID)
}

// FindHash is like [Keys.Find], by the hash of the key.
func (s *Keys) FindHash(ctx context.Context, h apikey.KeyHash) (KeyInfo, error) {
	return s.find(ctx, `key_hash`, h[:])
}

func (s *Keys) find(ctx context.Context, column string, value any) (KeyInfo, error) {
	info, err := scanInfo(s.db.QueryRow(ctx, `SELECT `+infoColumns+` FROM `+infoTables+` WHERE k.`+column+` = $1`, value))
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return KeyInfo{}, apikey.ErrNotFound
	case err != nil:
		return KeyInfo{}, fmt.Errorf("apikey: reading api_keys: %w", err)
	}
	return info, nil
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
		return &InputError{"expiry", "ExpiresAt and NeverEnds exclude each other: set one of them"}
	case !k.ExpiresAt.IsZero() && !k.ExpiresAt.After(time.Now()):
		return &InputError{"expiry", "is in the past: use a later time, or none"}
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
		return &InputError{"organisation", "its id begins or ends with a blank: remove it"}
	}
	return nil
}
