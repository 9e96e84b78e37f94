package apikey

// Looking up a plan: PlanStatus, Plan, PlanStore, and the Postgres plan store. AllowsAPI
// decides whether a plan includes the API.

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/trackpilots/apikey/internal/pg"
)

// A PlanStatus is the status of a subscription, as billing sets it. Only [PlanActive]
// admits requests; any status that this package does not know refuses them.
type PlanStatus string

// The statuses of a subscription.
const (
	PlanActive        PlanStatus = "active"
	PlanPending       PlanStatus = "pending"
	PlanPastDue       PlanStatus = "past_due"
	PlanPaymentFailed PlanStatus = "payment_failed"
	PlanCancelled     PlanStatus = "cancelled"
	PlanExpired       PlanStatus = "expired"
)

// A Plan is what a store knows about an organisation's subscription.
type Plan struct {
	Name      string // the tier, such as "starter"
	Status    PlanStatus
	APIAccess bool      // whether the tier includes the API
	EndsAt    time.Time // from then on it admits nothing; zero: no end
}

func (p Plan) equal(other Plan) bool {
	same := p.EndsAt.Equal(other.EndsAt)
	p.EndsAt, other.EndsAt = time.Time{}, time.Time{}
	return same && p == other
}

// AllowsAPI reports whether the plan admits requests at now: it is active, includes the
// API, and has not ended.
func (p Plan) AllowsAPI(now time.Time) bool {
	return p.Status == PlanActive && p.APIAccess && (p.EndsAt.IsZero() || now.Before(p.EndsAt))
}

// A PlanStore looks up the plans of organisations. It must be safe for concurrent use and
// must return when ctx ends.
//
// [ErrNotFound], or an error that wraps it, means that the organisation has no plan: the
// request is refused with [ErrPlanExpired]. Every other error means that the store could
// not be read: the request is answered with [ErrUnavailable].
type PlanStore interface {
	Plan(ctx context.Context, orgID string) (Plan, error)
}

// A BatchPlanStore is a PlanStore that can look up many plans at once. A [Cache] calls
// Plans and never Plan, so a type that embeds a BatchPlanStore and overrides Plan must
// override Plans, too.
type BatchPlanStore interface {
	PlanStore

	// Plans returns the plans that exist, by organisation. An organisation without an entry
	// has no plan. An error means that the store could not be read.
	Plans(ctx context.Context, orgIDs []string) (map[string]Plan, error)
}

// PlanStoreFunc lets a function be a [PlanStore].
type PlanStoreFunc func(ctx context.Context, orgID string) (Plan, error)

// Plan calls f.
func (f PlanStoreFunc) Plan(ctx context.Context, orgID string) (Plan, error) { return f(ctx, orgID) }

// A PostgresPlanStore is a [BatchPlanStore] that reads the tables org_plans and
// plan_catalogue of the migrations. It is safe for concurrent use if its DB is. Package
// admin writes these tables.
type PostgresPlanStore struct{ db *pg.Reader }

// NewPostgresPlanStore returns a plan store that reads from db. It panics if db is nil.
func NewPostgresPlanStore(db DB) *PostgresPlanStore {
	if pg.IsNil(db) {
		panic("apikey: NewPostgresPlanStore: db is nil: pass a *pgxpool.Pool")
	}
	return &PostgresPlanStore{pg.NewReader(db)}
}

var planSQL = newLookup(`
SELECT ` + stampSQL + `, o.org_id, o.plan, o.status, c.api_access, o.ends_at
FROM (VALUES (1)) AS one
LEFT JOIN (org_plans o JOIN plan_catalogue c ON c.name = o.plan) ON o.org_id = $1`)

// Plan implements [PlanStore].
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

// Plans implements [BatchPlanStore] with one statement.
func (s *PostgresPlanStore) Plans(ctx context.Context, orgIDs []string) (map[string]Plan, error) {
	plans := make(map[string]Plan, len(orgIDs))
	var orgID *string
	var r planRow
	err := pg.LookUp(ctx, s.db, planSQL, orgIDs, append([]any{&orgID}, r.columns()...), func() {
		if plan := r.plan(); plan != nil {
			plans[*orgID] = *plan
		}
	})
	if err != nil {
		return nil, fmt.Errorf("apikey: reading org_plans: %w", err)
	}
	return plans, nil
}

// A planRow holds the columns of org_plans and plan_catalogue in a lookup; all NULL if the
// organisation has no plan.
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

// PlanStatuses returns all statuses that this package knows.
func PlanStatuses() []PlanStatus { return slices.Clone(planStatuses) }

var planStatuses = []PlanStatus{PlanActive, PlanPending, PlanPastDue, PlanPaymentFailed, PlanCancelled, PlanExpired}
