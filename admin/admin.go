// Package admin creates API keys and manages keys and plans. It is for the dashboard's
// service, billing and the apikey command, whose database role may write. A service that
// only authenticates does not need it.
//
// [Keys] and [Plans] on a pgx.Tx work within that transaction. The errors
// [apikey.ErrNotFound], [ErrKeyExists], [ErrKeyLimit], [ErrKeyDead] and [*InputError] do not
// abort it.
//
// Two calls at once return and leave what they would one after the other, in either order,
// except for what [MaxKeysPerOrg] and [Keys.Prune] say. In a transaction that is REPEATABLE
// READ or SERIALIZABLE, a call may fail instead, with SQLSTATE 40001: begin the transaction
// again.
package admin

import (
	"errors"
	"fmt"
)

// Errors of [Keys], besides [apikey.ErrNotFound] and [*InputError].
var (
	ErrKeyExists = errors.New("apikey: this key exists already")
	ErrKeyLimit  = fmt.Errorf("apikey: the organisation has %d keys already: delete some", MaxKeysPerOrg)
	ErrKeyDead   = errors.New("apikey: the key is deactivated or expired: create a new one")
)

// An InputError is an invalid argument. Problem says what to use instead.
type InputError struct{ Field, Problem string }

// Error returns the field and the problem.
func (e *InputError) Error() string { return "apikey: " + e.Field + ": " + e.Problem }
