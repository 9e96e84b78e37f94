package apikey

// What an organisation may do: Plan, PlanStore, and the Postgres plan store.
// A store answers with facts; AllowsAPI reaches the verdict, with the clock.

import (
	"context"
	"fmt"
	"time"

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
// of the migrations. It is safe for concurrent use if its DB is.
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
