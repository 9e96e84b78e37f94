package apikey

// What an organisation may do: Plan, PlanStore, and the Postgres plan store.
// A store answers with facts; AllowsAPI reaches the verdict, with the clock.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/trackpilots/apikey/internal/snapshot"
)

// A PlanStatus is the state of an organisation's subscription, as billing sets
// it. Only PlanActive admits; a status that this package does not know refuses.
type PlanStatus string

// The states of a subscription.
const (
	PlanActive        PlanStatus = "active"
	PlanPending       PlanStatus = "pending"
	PlanPastDue       PlanStatus = "past_due"
	PlanPaymentFailed PlanStatus = "payment_failed"
	PlanCancelled     PlanStatus = "cancelled"
	PlanExpired       PlanStatus = "expired"
)

// A Plan is what is known of an organisation's subscription.
type Plan struct {
	Name      string // the tier, such as "starter"
	Status    PlanStatus
	APIAccess bool      // whether the tier includes the API
	EndsAt    time.Time // the first instant at which it no longer holds; zero: no end
}

// AllowsAPI reports whether the plan admits API requests at now: its status is
// active, it includes API access, and it has not ended.
func (p Plan) AllowsAPI(now time.Time) bool {
	return p.Status == PlanActive && p.APIAccess && (p.EndsAt.IsZero() || now.Before(p.EndsAt))
}

// A PlanStore finds the plan of an organisation. It must be safe for concurrent
// use and honour ctx.
//
// ErrNotFound, or an error that wraps it, means "looked, and there is none": the
// organisation is refused with [ErrPlanExpired]. Every other error means "could
// not look" and is answered with [ErrUnavailable].
type PlanStore interface {
	Plan(ctx context.Context, orgID string) (Plan, error)
}

// A PlanStoreFunc is a function that is a PlanStore.
type PlanStoreFunc func(ctx context.Context, orgID string) (Plan, error)

// Plan calls f.
func (f PlanStoreFunc) Plan(ctx context.Context, orgID string) (Plan, error) { return f(ctx, orgID) }

// A PostgresPlanStore is a PlanStore on the tables org_plans and plan_catalogue
// of the migrations, and sets what is in them. It is safe for concurrent use if its
// DB is. On a pgx.Tx, all it does is part of that transaction, which [ErrNotFound]
// and [*InputError] do not end.
type PostgresPlanStore struct{ db DB }

// NewPostgresPlanStore returns the plan store on db. It panics if db is nil.
func NewPostgresPlanStore(db DB) *PostgresPlanStore {
	if isNil(db) {
		panic("apikey: NewPostgresPlanStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresPlanStore{db}
}

// planSQL has one row, found or not, so that "absent" has a snapshot too.
const planSQL = `
SELECT pg_current_snapshot()::text, o.plan, o.status, c.api_access, o.ends_at
FROM (VALUES (1)) AS one
LEFT JOIN (org_plans o JOIN plan_catalogue c ON c.name = o.plan) ON o.org_id = $1`

// Plan returns the plan of orgID, or ErrNotFound if org_plans has no row for it.
func (s *PostgresPlanStore) Plan(ctx context.Context, orgID string) (Plan, error) {
	var (
		stamp        string
		name, status *string
		apiAccess    *bool
		endsAt       *time.Time
	)
	err := s.db.QueryRow(ctx, planSQL, orgID).Scan(&stamp, &name, &status, &apiAccess, &endsAt)
	if err != nil {
		return Plan{}, fmt.Errorf("apikey: reading org_plans: %w", err)
	}
	snapshot.Report(ctx, stamp)
	if name == nil {
		return Plan{}, ErrNotFound
	}
	return Plan{Name: *name, Status: PlanStatus(*status), APIAccess: *apiAccess, EndsAt: timeOrZero(endsAt)}, nil
}

// DefineTier sets whether a tier includes the API, for all organisations on it; a
// tier that is not in the catalogue is added. Errors: [*InputError].
func (s *PostgresPlanStore) DefineTier(ctx context.Context, tier string, apiAccess bool) error {
	if err := checkTier(tier); err != nil {
		return err
	}
	_, err := s.db.Exec(ctx, `INSERT INTO plan_catalogue (name, api_access) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET api_access = excluded.api_access`, tier, apiAccess)
	if err != nil {
		return fmt.Errorf("apikey: writing plan_catalogue: %w", err)
	}
	return nil
}

// Subscribe sets the whole subscription of an organisation, which need not have
// had one. A zero end is none. Errors: [*InputError], also for a tier that is not
// in the catalogue.
func (s *PostgresPlanStore) Subscribe(ctx context.Context, orgID, tier string, status PlanStatus, endsAt time.Time) error {
	if err := errors.Join(checkOrgID(orgID), checkTier(tier), status.check()); err != nil {
		return err
	}
	return s.change(ctx, tier, `INSERT INTO org_plans (org_id, plan, status, ends_at)
		SELECT $1, name, $3, $4 FROM plan_catalogue WHERE name = $2
		ON CONFLICT (org_id) DO UPDATE SET plan = excluded.plan, status = excluded.status, ends_at = excluded.ends_at`,
		orgID, tier, status, nullTime(endsAt))
}

// SetTier moves an organisation to another tier. Errors: [ErrNotFound] if it has no
// subscription, [*InputError] if the tier is not in the catalogue.
func (s *PostgresPlanStore) SetTier(ctx context.Context, orgID, tier string) error {
	if err := checkTier(tier); err != nil {
		return err
	}
	return s.change(ctx, tier, `UPDATE org_plans SET plan = name FROM plan_catalogue WHERE org_id = $1 AND name = $2`, orgID, tier)
}

// SetStatus sets the status of a subscription. Errors: [ErrNotFound], and
// [*InputError] for a status that this package does not know.
func (s *PostgresPlanStore) SetStatus(ctx context.Context, orgID string, status PlanStatus) error {
	if err := status.check(); err != nil {
		return err
	}
	return s.change(ctx, "", `UPDATE org_plans SET status = $2 WHERE org_id = $1`, orgID, status)
}

// SetEnd sets the first instant at which a subscription no longer holds; zero: no
// end. Errors: [ErrNotFound].
func (s *PostgresPlanStore) SetEnd(ctx context.Context, orgID string, endsAt time.Time) error {
	return s.change(ctx, "", `UPDATE org_plans SET ends_at = $2 WHERE org_id = $1`, orgID, nullTime(endsAt))
}

// change runs a statement that changes one row. If it finds none, that may be for
// want of a tier.
func (s *PostgresPlanStore) change(ctx context.Context, tier, sql string, args ...any) error {
	tag, err := s.db.Exec(ctx, sql, args...)
	known := true
	if err == nil && tag.RowsAffected() == 0 && tier != "" {
		err = s.db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM plan_catalogue WHERE name = $1)`, tier).Scan(&known)
	}
	switch {
	case err != nil:
		return fmt.Errorf("apikey: writing org_plans: %w", err)
	case !known:
		return &InputError{"tier", fmt.Sprintf("%q is not in plan_catalogue: define it first", tier)}
	case tag.RowsAffected() == 0:
		return ErrNotFound
	}
	return nil
}

func checkTier(tier string) error {
	if tier == "" || len(tier) > 255 || !utf8.ValidString(tier) || strings.ContainsFunc(tier, unicode.IsControl) {
		return &InputError{"tier", "use 1 to 255 bytes of UTF-8 without control characters"}
	}
	return nil
}

var planStatuses = []PlanStatus{PlanActive, PlanPending, PlanPastDue, PlanPaymentFailed, PlanCancelled, PlanExpired}

func (s PlanStatus) check() error {
	if !slices.Contains(planStatuses, s) {
		return &InputError{"status", fmt.Sprintf("%q is none of %q", s, planStatuses)}
	}
	return nil
}
