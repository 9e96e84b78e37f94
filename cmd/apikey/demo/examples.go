package demo

// A request for each answer that a customer can get, and the organisations behind these.

import (
	"cmp"
	"fmt"
	"net"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/keyformat"
)

// An example is a request that shows one answer.
type example struct {
	about  string
	header string // the value of the Authorization header; "": none
	want   string // the code, or "200"
}

func exampleRows() (rows []*row) {
	add := func(about, orgID string, plan *apikey.Plan) *row {
		apiKey := keyformat.New(keyformat.Test)
		r := &row{
			about: about, apiKey: apiKey, hash: apikey.HashKey(apiKey), orgID: "demo-" + orgID,
			key: apikey.Key{OrgID: "demo-" + orgID, Active: true}, plan: plan,
		}
		rows = append(rows, r)
		r.n = len(rows)
		return r
	}
	with := func(status apikey.PlanStatus) *apikey.Plan {
		return &apikey.Plan{Name: starter, Status: status, APIAccess: true}
	}
	ended := with(apikey.PlanActive)
	ended.EndsAt = time.Now().Add(-24 * time.Hour)
	add("a live key of a paying organisation", "paying", with(apikey.PlanActive))
	add("a deactivated key", "deactivated", with(apikey.PlanActive)).key.Active = false
	add("a key past its expiry", "key-expired", with(apikey.PlanActive)).key.ExpiresAt = time.Now().Add(-24 * time.Hour)
	add("the subscription has expired", "expired", with(apikey.PlanExpired))
	add("the subscription has ended and was not renewed", "ended", ended)
	add("the Free (Basic) plan, or a downgrade to it", "basic", &apikey.Plan{Name: basic, Status: apikey.PlanActive})
	add("the payment has failed", "payment-failed", with(apikey.PlanPaymentFailed))
	add("the payment is pending", "pending", with(apikey.PlanPending))
	add("the plan was cancelled", "cancelled", with(apikey.PlanCancelled))
	add("there is no subscription", "none", nil)
	return rows
}

// examples returns the examples for rows as a store holds them.
func examples(rows []*row, known facts) []example {
	var list []example
	for _, r := range rows {
		list = append(list, example{about: r.about, want: cmp.Or(known.code(r, time.Now()), "200"), header: "Bearer " + r.apiKey})
	}
	return append(list,
		example{about: "no Authorization header", want: apikey.ErrAuthorizationHeaderMissing.Code},
		example{about: "another scheme than Bearer", want: apikey.ErrInvalidAPIKeySchema.Code, header: "Token " + keyformat.New(keyformat.Test)},
		example{about: "no key after Bearer", want: apikey.ErrAPIKeyMissing.Code, header: "Bearer "},
		example{about: "a key that was never valid, or has been deleted", want: apikey.ErrInvalidAPIKey.Code, header: "Bearer " + keyformat.New(keyformat.Test)},
	)
}

// print tells how to use the demo.
func (d *demo) print() {
	_, port, _ := net.SplitHostPort(d.setting.Listening)
	site := "http://localhost:" + port
	reach := "on this machine only"
	if !d.setting.Loopback {
		reach = "for the whole network: everybody who reaches " + d.setting.Listening + " may use it"
	}
	out := d.config.Out
	fmt.Fprintf(out, "open %s/ in a browser: keys, plans, outages, and what three replicas answer\n", site)
	fmt.Fprintf(out, "listening on %s/v1/whoami, %s; Ctrl-C ends\n", site, reach)
	fmt.Fprintf(out, "keys and plans are in %s\n", d.setting.Store)
	for _, what := range d.setting.Simulated {
		fmt.Fprintf(out, "simulated: %s\n", what)
	}
	d.mu.Lock()
	list := examples(d.rows, d.known)
	d.mu.Unlock()
	for _, e := range list {
		fmt.Fprintf(out, "\n# %s: %s\n", e.about, e.want)
		if e.header == "" {
			fmt.Fprintf(out, "curl -i %s/v1/whoami\n", site)
			continue
		}
		fmt.Fprintf(out, "curl -i -H 'Authorization: %s' %s/v1/whoami\n", e.header, site)
	}
	fmt.Fprintln(out)
}
