// Package world is what tests of the whole request path run in: organisations in every
// state that the customers' documentation knows, in memory and in PostgreSQL, and replicas
// of a service before them.
package world

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
)

// A KeyState is what has become of a key.
type KeyState string

// Admits reports whether such a key is live.
func (s KeyState) Admits() bool { return s == Live || s == Unexpired }

// The states of a key.
const (
	Live        KeyState = "live"
	Unexpired   KeyState = "expires tomorrow"
	Expired     KeyState = "expired"
	Deactivated KeyState = "deactivated"
	Deleted     KeyState = "deleted"
	OrgDeleted  KeyState = "organisation deleted"
	Unknown     KeyState = "unknown"
)

// KeyStates are all of them.
var KeyStates = []KeyState{Live, Unexpired, Expired, Deactivated, Deleted, OrgDeleted, Unknown}

// A PlanState is why an organisation is, or is not, let in. The refused ones are
// the reasons of the contract, "Why this happens", and what it leaves open.
type PlanState string

// The states of a plan.
const (
	Paid           PlanState = "paid"
	EndsTomorrow   PlanState = "ends tomorrow"
	Ended          PlanState = "ended, still marked active"
	StatusExpired  PlanState = "expired"
	FreeTier       PlanState = "free tier"
	PaymentFailed  PlanState = "payment failed"
	Pending        PlanState = "pending"
	PastDue        PlanState = "past due"
	Downgraded     PlanState = "downgraded"
	Cancelled      PlanState = "cancelled"
	NoSubscription PlanState = "no subscription"
	UnknownStatus  PlanState = "unknown status"
)

// The tiers.
const (
	Starter = "starter" // includes the API
	Basic   = "basic"   // does not
)

// PlanFacts is what a store knows in each state. NoSubscription has no entry.
func PlanFacts() map[PlanState]apikey.Plan {
	yesterday := time.Now().Add(-24 * time.Hour).UTC().Truncate(time.Microsecond)
	tomorrow := yesterday.Add(48 * time.Hour)
	return map[PlanState]apikey.Plan{
		Paid:          {Name: Starter, Status: apikey.PlanActive, APIAccess: true},
		EndsTomorrow:  {Name: Starter, Status: apikey.PlanActive, APIAccess: true, EndsAt: tomorrow},
		Ended:         {Name: Starter, Status: apikey.PlanActive, APIAccess: true, EndsAt: yesterday},
		StatusExpired: {Name: Starter, Status: apikey.PlanExpired, APIAccess: true, EndsAt: yesterday},
		FreeTier:      {Name: Basic, Status: apikey.PlanActive},
		PaymentFailed: {Name: Starter, Status: apikey.PlanPaymentFailed, APIAccess: true},
		Pending:       {Name: Starter, Status: apikey.PlanPending, APIAccess: true},
		PastDue:       {Name: Starter, Status: apikey.PlanPastDue, APIAccess: true, EndsAt: tomorrow},
		Downgraded:    {Name: Basic, Status: apikey.PlanActive, EndsAt: tomorrow},
		Cancelled:     {Name: Starter, Status: apikey.PlanCancelled, APIAccess: true, EndsAt: tomorrow},
		UnknownStatus: {Name: Starter, Status: "ACTIVE", APIAccess: true},
	}
}

// PlanStates are all of them.
var PlanStates = []PlanState{
	Paid, EndsTomorrow, Ended, StatusExpired, FreeTier, PaymentFailed, Pending, PastDue,
	Downgraded, Cancelled, NoSubscription, UnknownStatus,
}

// Admits reports whether such a plan includes the API.
func (s PlanState) Admits() bool { return s == Paid || s == EndsTomorrow }

// The codes of answers.
const (
	HeaderMissing = "AUTHORIZATION_HEADER_MISSING"
	Schema        = "INVALID_API_KEY_SCHEMA"
	KeyMissing    = "API_KEY_MISSING"
	Invalid       = "INVALID_API_KEY"
	PlanExpired   = "PLAN_EXPIRED"
	Unavailable   = "SERVICE_UNAVAILABLE"
	Admitted      = ""
)

// WantCode is the answer to a well-formed request, "" for admitted.
func WantCode(k KeyState, p PlanState) string {
	switch {
	case !k.Admits():
		return Invalid
	case !p.Admits():
		return PlanExpired
	}
	return Admitted
}

// PartOf returns eight characters of the random part of one of the keys that are in text;
// "" if there are none.
func PartOf(text string, keys ...string) string {
	for _, key := range keys {
		body := key[strings.LastIndex(key, "_")+1:]
		for i := range len(body) - 7 {
			if strings.Contains(text, body[i:i+8]) {
				return body[i : i+8]
			}
		}
	}
	return ""
}

// A World has a key and an organisation in any state.
type World interface {
	apikey.KeyStore
	apikey.PlanStore
	// Enrol makes a new organisation with one key, and returns the key, and the Org
	// that a handler is to see if the two states admit.
	Enrol(t testing.TB, k KeyState, p PlanState) (string, apikey.Org)
}

// ErrStore is a store's "could not look".
var ErrStore = errors.New("connection refused")
