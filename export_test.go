package apikey

import (
	"github.com/trackpilots/apikey/internal/feed"
)

// What the tests look at that users do not.
var (
	KeySQL        = keySQL.both()
	KeyAndPlanSQL = keyAndPlanSQL.both()
	PlanSQL       = planSQL.both()
)

// both are the statements for one subject, and for many.
func (s lookupSQL) both() [2]string { return [2]string{s.one, s.many} }

// Log is what the cache knows of changes.
func (c *Cache) Log() *feed.Log { return c.shared.Log }
