package apikey_test

import (
	"errors"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/world"
)

// TestPostgresPlanStore: every state of a subscription is read as it is.
func TestPostgresPlanStore(t *testing.T) {
	t.Parallel()
	w := world.NewPostgres(t)
	for _, state := range world.PlanStates {
		t.Run(string(state), func(t *testing.T) {
			_, org := w.Enrol(t, world.Live, state)
			got, err := w.Plan(t.Context(), org.ID)
			if state == world.NoSubscription {
				if !errors.Is(err, apikey.ErrNotFound) || got != (apikey.Plan{}) {
					t.Errorf("Plan = %+v, %v, want ErrNotFound", got, err)
				}
				return
			}
			if err != nil || got != org.Plan {
				t.Errorf("Plan = %+v, %v, want %+v", got, err, org.Plan)
			}
			if got.AllowsAPI(time.Now()) != state.Admits() {
				t.Errorf("AllowsAPI = %v", !state.Admits())
			}
		})
	}
}

func TestPlanAllowsAPI(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	good := apikey.Plan{Name: world.Starter, Status: apikey.PlanActive, APIAccess: true}
	with := func(change func(*apikey.Plan)) apikey.Plan {
		p := good
		change(&p)
		return p
	}
	endsAt := func(end time.Time) apikey.Plan { return with(func(p *apikey.Plan) { p.EndsAt = end }) }
	for name, c := range map[string]struct {
		plan apikey.Plan
		want bool
	}{
		"no end":                      {good, true},
		"nameless":                    {with(func(p *apikey.Plan) { p.Name = "" }), true},
		"ends in a nanosecond":        {endsAt(now.Add(1)), true},
		"ends now":                    {endsAt(now), false},
		"ended a nanosecond ago":      {endsAt(now.Add(-1)), false},
		"ends now, in another zone":   {endsAt(now.In(time.FixedZone("", -3600))), false},
		"no API access":               {with(func(p *apikey.Plan) { p.APIAccess = false }), false},
		"zero":                        {apikey.Plan{}, false},
		"no status":                   {with(func(p *apikey.Plan) { p.Status = "" }), false},
		"status in another case":      {with(func(p *apikey.Plan) { p.Status = "Active" }), false},
		"status with a blank":         {with(func(p *apikey.Plan) { p.Status = "active " }), false},
		"a status of tomorrow's":      {with(func(p *apikey.Plan) { p.Status = "trialing" }), false},
		"ended at the start of times": {endsAt(time.Unix(0, 0)), false},
	} {
		if got := c.plan.AllowsAPI(now); got != c.want {
			t.Errorf("%s: AllowsAPI = %v, want %v", name, got, c.want)
		}
	}
	for _, status := range []apikey.PlanStatus{
		apikey.PlanPending, apikey.PlanPastDue, apikey.PlanPaymentFailed, apikey.PlanCancelled, apikey.PlanExpired,
	} {
		if with(func(p *apikey.Plan) { p.Status = status }).AllowsAPI(now) {
			t.Errorf("status %s admits", status)
		}
	}
}

func TestStoreFuncs(t *testing.T) {
	w := world.NewMemory()
	apiKey, org := w.Enrol(t, world.Live, world.Paid)
	key, err := apikey.KeyStoreFunc(w.Key).Key(t.Context(), apikey.HashKey(apiKey))
	if err != nil || key.ID != org.KeyID {
		t.Errorf("Key = %+v, %v", key, err)
	}
	plan, err := apikey.PlanStoreFunc(w.Plan).Plan(t.Context(), org.ID)
	if err != nil || plan != org.Plan {
		t.Errorf("Plan = %+v, %v", plan, err)
	}
}
