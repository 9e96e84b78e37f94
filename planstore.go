package apikey

// What an organisation may do: Plan, PlanStore, and the Postgres plan store.
// A store answers with facts; AllowsAPI reaches the verdict, with the clock.

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/trackpilots/apikey/internal/pg"
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

// A PostgresPlanStore is a PlanStore on the tables org_plans and plan_catalogue of the
// migrations. It is safe for concurrent use if its DB is. Plans are set by package admin.
type PostgresPlanStore struct{ db pg.OneTrip }

// NewPostgresPlanStore returns the plan store on db. It panics if db is nil.
func NewPostgresPlanStore(db DB) *PostgresPlanStore {
	if pg.IsNil(db) {
		panic("apikey: NewPostgresPlanStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresPlanStore{pg.OneTrip{DB: db}}
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
	return &Plan{Name: *r.name, Status: PlanStatus(*r.status), APIAccess: *r.apiAccess, EndsAt: pg.TimeOrZero(r.endsAt)}
}

// PlanStatuses returns the statuses that this package knows.
func PlanStatuses() []PlanStatus { return slices.Clone(planStatuses) }

var planStatuses = []PlanStatus{PlanActive, PlanPending, PlanPastDue, PlanPaymentFailed, PlanCancelled, PlanExpired}
