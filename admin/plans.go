package admin

// Managing tiers, and the plans of organisations.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/pg"
)

// Plans manages the plans in the tables org_plans and plan_catalogue of the migrations. It is
// safe for concurrent use if its DB is.
type Plans struct{ db pg.OneTrip }

// NewPlans returns a Plans that uses db. It panics if db is nil.
func NewPlans(db apikey.DB) *Plans {
	if pg.IsNil(db) {
		panic("admin: NewPlans: db is nil: pass a *pgxpool.Pool or a pgx.Tx")
	}
	return &Plans{pg.OneTrip{DB: db}}
}

// DefineTier adds a tier to the catalogue, or changes it for all organisations: whether it
// includes the API. Errors: [*InputError].
func (s *Plans) DefineTier(ctx context.Context, tier string, apiAccess bool) error {
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

// Subscribe sets the tier, status and end of an organisation's plan, and creates the plan if
// there is none. A zero end means no end. Errors: [*InputError], also if the tier is not in
// the catalogue.
func (s *Plans) Subscribe(ctx context.Context, orgID, tier string, status apikey.PlanStatus, endsAt time.Time) error {
	if err := errors.Join(checkOrgID(orgID), checkTier(tier), checkStatus(status)); err != nil {
		return err
	}
	return s.changeTier(ctx, tier, `INSERT INTO org_plans (org_id, plan, status, ends_at)
		SELECT $1, name, $3, $4 FROM tier
		ON CONFLICT (org_id) DO UPDATE SET plan = excluded.plan, status = excluded.status, ends_at = excluded.ends_at`,
		orgID, tier, status, pg.NullTime(endsAt))
}

// SetTier changes the tier of an organisation's plan. Errors: [apikey.ErrNotFound] if there
// is no plan, [*InputError] if the tier is not in the catalogue.
func (s *Plans) SetTier(ctx context.Context, orgID, tier string) error {
	if err := checkTier(tier); err != nil {
		return err
	}
	return s.changeTier(ctx, tier, `UPDATE org_plans SET plan = name FROM tier WHERE org_id = $1`, orgID, tier)
}

// SetStatus changes the status of an organisation's plan. Errors: [apikey.ErrNotFound] if
// there is no plan, [*InputError] if [apikey.PlanStatuses] does not have the status.
func (s *Plans) SetStatus(ctx context.Context, orgID string, status apikey.PlanStatus) error {
	if err := checkStatus(status); err != nil {
		return err
	}
	return s.change(ctx, `UPDATE org_plans SET status = $2 WHERE org_id = $1`, orgID, status)
}

// SetEnd changes when an organisation's plan ends; zero means no end. Errors:
// [apikey.ErrNotFound] if there is no plan.
func (s *Plans) SetEnd(ctx context.Context, orgID string, endsAt time.Time) error {
	return s.change(ctx, `UPDATE org_plans SET ends_at = $2 WHERE org_id = $1`, orgID, pg.NullTime(endsAt))
}

func (s *Plans) change(ctx context.Context, sql string, args ...any) error {
	tag, err := s.db.Exec(ctx, sql, args...)
	switch {
	case err != nil:
		return fmt.Errorf("apikey: writing org_plans: %w", err)
	case tag.RowsAffected() == 0:
		return apikey.ErrNotFound
	}
	return nil
}

// changeTier runs a statement that takes the tier, which is $2, from the table tier. What is
// missing is found out in the same statement: a later one might know a tier that this one
// did not, and blame the plan.
func (s *Plans) changeTier(ctx context.Context, tier, sql string, args ...any) error {
	var known, changed bool
	err := s.db.QueryRow(ctx, `
		WITH tier AS (SELECT name FROM plan_catalogue WHERE name = $2), changed AS (`+sql+` RETURNING 1)
		SELECT EXISTS (SELECT FROM tier), EXISTS (SELECT FROM changed)`, args...).Scan(&known, &changed)
	switch {
	case err != nil:
		return fmt.Errorf("apikey: writing org_plans: %w", err)
	case !known:
		return &InputError{"tier", fmt.Sprintf("%q is not in plan_catalogue: define it first", tier)}
	case !changed:
		return apikey.ErrNotFound
	}
	return nil
}

func checkTier(tier string) error {
	if tier == "" || len(tier) > 255 || !utf8.ValidString(tier) || strings.ContainsFunc(tier, unicode.IsControl) {
		return &InputError{"tier", "use 1 to 255 bytes of UTF-8 without control characters"}
	}
	return nil
}

func checkStatus(s apikey.PlanStatus) error {
	if known := apikey.PlanStatuses(); !slices.Contains(known, s) {
		return &InputError{"status", fmt.Sprintf("%q is none of %q", s, known)}
	}
	return nil
}
