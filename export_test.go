package apikey

import (
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/pg"
)

// What the tests look at that users do not.
var (
	KeySQL        = both(keySQL)
	KeyAndPlanSQL = both(keyAndPlanSQL)
	PlanSQL       = both(planSQL)
)

// both are the statements for one subject, and for many.
func both(l pg.Lookup) [2]string { return [2]string{l.One, l.Many} }

// Log is what the cache knows of changes.
func (c *Cache) Log() *feed.Log { return c.shared.Log }

// Defaults are *o with the defaults of what is zero.
func Defaults(o *CacheOptions) CacheOptions { return o.withDefaults() }
