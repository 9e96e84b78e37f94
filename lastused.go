package apikey

// When keys were last used, written off the request path.

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/trackpilots/apikey/internal/lastused"
	"github.com/trackpilots/apikey/internal/pg"
)

// LastUsed records when keys were last used, in the table api_key_uses: in batches, off
// the request path, to the interval or so. Give it to a [Middleware] by Options.LastUsed,
// and run it. It is safe for concurrent use.
//
// Beside what reading keys takes, its role needs SELECT, INSERT and UPDATE on
// api_key_uses.
type LastUsed struct {
	db       pg.OneTrip
	interval time.Duration
	uses     *lastused.Uses
}

// NewLastUsed returns a LastUsed that writes to db once in every interval, and records a
// key at most that often, whichever replica it was used on; 0 is a minute. It panics if
// db is nil or the interval negative.
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
