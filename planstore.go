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

func (p Plan) equal(other Plan) bool {
	same := p.EndsAt.Equal(other.EndsAt)
	p.EndsAt, other.EndsAt = time.Time{}, time.Time{}
	return same && p == other
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

// A BatchPlanStore is a PlanStore that finds many plans at once. A [Cache] asks it for
// all that are asked for at the same time: by Plans, and never by Plan. So a type that
// embeds one, and has a Plan of its own, needs a Plans of its own too.
type BatchPlanStore interface {
	PlanStore

	// Plans returns the plans of those organisations that have one; the others are
	// "looked, and there is none". The error means "could not look" for all of them.
	Plans(ctx context.Context, orgIDs []string) (map[string]Plan, error)
}

// A PlanStoreFunc is a function that is a PlanStore.
type PlanStoreFunc func(ctx context.Context, orgID string) (Plan, error)

// Plan calls f.
func (f PlanStoreFunc) Plan(ctx context.Context, orgID string) (Plan, error) { return f(ctx, orgID) }

// A PostgresPlanStore is a PlanStore on the tables org_plans and plan_catalogue
// of the migrations, and sets what is in them. It is safe for concurrent use if its
// DB is. On a pgx.Tx, all it does is part of that transaction, which [ErrNotFound]
// and [*InputError] do not end.
type PostgresPlanStore struct{ db oneTrip }

// NewPostgresPlanStore returns the plan store on db. It panics if db is nil.
func NewPostgresPlanStore(db DB) *PostgresPlanStore {
	if isNil(db) {
		panic("apikey: NewPostgresPlanStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresPlanStore{oneTrip{db}}
}

var planSQL = newLookupSQL(`
SELECT ` + stampSQL + `, o.org_id, o.plan, o.status, c.api_access, o.ends_at
FROM (VALUES (1)) AS one
LEFT JOIN (org_plans o JOIN plan_catalogue c ON c.name = o.plan) ON o.org_id = $1`)

// Plan returns the plan of orgID, or ErrNotFound if org_plans has no row for it.
func (s *PostgresPlanStore) Plan(ctx context.Context, orgID string) (Plan, error) {
	plans, err := s.Plans(ctx, []string{orgID})
	if err != nil {
		return Plan{}, err
	}
	plan, ok := plans[orgID]
	if !ok {
		return Plan{}, ErrNotFound
	}
	return plan, nil
}

// Plans implements [BatchPlanStore], in one statement.
func (s *PostgresPlanStore) Plans(ctx context.Context, orgIDs []string) (map[string]Plan, error) {
	plans := make(map[string]Plan, len(orgIDs))
	var orgID *string
	var r planRow
	err := lookUp(ctx, s.db, planSQL, orgIDs, append([]any{&orgID}, r.columns()...), func() {
		if plan := r.plan(); plan != nil {
			plans[*orgID] = *plan
		}
	})
	if err != nil {
		return nil, fmt.Errorf("apikey: reading org_plans: %w", err)
	}
	return plans, nil
}

// A planRow is what a lookup reads of org_plans and plan_catalogue; all NULL if the
// organisation has no row.
type planRow struct {
	name, status *string
	apiAccess    *bool
	endsAt       *time.Time
}

func (r *planRow) columns() []any { return []any{&r.name, &r.status, &r.apiAccess, &r.endsAt} }

func (r *planRow) plan() *Plan {
	if r.name == nil {
		return nil
	}
	return &Plan{Name: *r.name, Status: PlanStatus(*r.status), APIAccess: *r.apiAccess, EndsAt: timeOrZero(r.endsAt)}
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
