package apikey

// Recording when keys were last used, off the request path.

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/trackpilots/apikey/internal/lastused"
	"github.com/trackpilots/apikey/internal/pg"
)

// LastUsed records in the table api_key_uses when keys were last used, in batches and off
// the request path. Set it as Options.LastUsed and call [LastUsed.Run]. It is safe for
// concurrent use.
//
// Its role needs SELECT, INSERT and UPDATE on api_key_uses, and what reading keys needs.
type LastUsed struct {
	db       pg.OneTrip
	interval time.Duration
	uses     *lastused.Uses
}

// NewLastUsed returns a LastUsed that writes to db once per interval. A key is written at
// most once per interval, even if many replicas use it. An interval of 0 means a minute.
// NewLastUsed panics if db is nil or interval is negative.
func NewLastUsed(db DB, interval time.Duration) *LastUsed {
	if pg.IsNil(db) {
		panic("apikey: NewLastUsed: db is nil: pass a *pgxpool.Pool")
	}
	if interval < 0 {
		panic(fmt.Sprintf("apikey: NewLastUsed: the interval is %v: use 0 for a minute, or more", interval))
	}
	interval = cmp.Or(interval, time.Minute)
	return &LastUsed{pg.OneTrip{DB: db}, interval, lastused.New(interval)}
}

// Run writes until ctx ends, then writes what is left, for up to 5 s, and returns the error
// of that last write. Wait for it before the program exits. Uses that could not be written
// are kept and written later, up to a limit: see [LastUsed.Dropped].
func (u *LastUsed) Run(ctx context.Context) error { return u.uses.Run(ctx, u.write) }

// Dropped returns the number of uses that were not recorded because 65,536 others waited.
func (u *LastUsed) Dropped() uint64 { return u.uses.Dropped() }

// write writes the uses of keys that no replica has written within the interval. All
// replicas write in the order of ids, so that there is no deadlock.
func (u *LastUsed) write(ctx context.Context, ids []string, times []time.Time) error {
	var uuids []string // keys of other stores have other ids
	var at []time.Time
	for i, id := range ids {
		if pg.IsUUID(id) {
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
