// Package admin makes API keys and looks after them and after plans: what the dashboard's
// service, billing and the apikey command do, by a role that may write. A service that only
// authenticates needs package apikey alone.
//
// On a pgx.Tx, all that [Keys] and [Plans] do is part of that transaction. None of the
// refusals [apikey.ErrNotFound], [ErrKeyExists], [ErrKeyLimit], [ErrKeyDead] and
// [*InputError] ends the transaction.
package admin

import (
	"errors"
	"fmt"
)

// What can be wrong with a request to a store, beside [apikey.ErrNotFound] and
// [*InputError].
var (
	ErrKeyExists = errors.New("apikey: this key is on record already")
	ErrKeyLimit  = fmt.Errorf("apikey: the organisation has %d keys already: delete some", MaxKeysPerOrg)
	ErrKeyDead   = errors.New("apikey: the key is deactivated or expired: create a new one")
)

// An InputError is a value that cannot be stored, and what to use instead.
type InputError struct{ Field, Problem string }

// Error returns the field and the problem.
func (e *InputError) Error() string { return "apikey: " + e.Field + ": " + e.Problem }
