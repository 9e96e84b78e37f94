package apikey

// The error values, and the one place that writes them. The texts are a contract
// with customers' programs: they change in a new version of the API, or not at all.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
)

// An Error is an answer to the customer, in the envelope that all errors of the
// API share. Services may declare their own and answer with [WriteError].
// Errors are matched by Code:
//
//	errors.Is(err, apikey.ErrPlanExpired)
type Error struct {
	StatusCode    int    // HTTP status, 400 to 599
	StatusMessage string // short label
	Message       string // what is wrong, for people
	Code          string // what is wrong, for programs
}

// Error returns the code and the message.
func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Is reports whether target is an *Error of the same Code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t != nil && t.Code == e.Code
}

// The refusals of [Middleware]. They must not be modified.
var (
	// ErrAuthorizationHeaderMissing: the request has no Authorization field.
	ErrAuthorizationHeaderMissing = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Authentication token header is missing",
		Message: "Authorization header is missing", Code: "AUTHORIZATION_HEADER_MISSING",
	}
	// ErrInvalidAPIKeySchema: the Authorization field is not of the Bearer scheme.
	ErrInvalidAPIKeySchema = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Invalid authentication token schema",
		Message: "Authorization header must start with 'Bearer'", Code: "INVALID_API_KEY_SCHEMA",
	}
	// ErrAPIKeyMissing: nothing follows Bearer.
	ErrAPIKeyMissing = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Authentication token is missing",
		Message: "API key value is missing", Code: "API_KEY_MISSING",
	}
	// ErrInvalidAPIKey: the key is malformed, unknown, deactivated, deleted or
	// expired. Which of these is not told.
	ErrInvalidAPIKey = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Authentication failed",
		Message: "Provided API key is invalid or inactive", Code: "INVALID_API_KEY",
	}
	// ErrPlanExpired: the key is live, but the organisation's plan does not pass
	// [Plan.AllowsAPI].
	ErrPlanExpired = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Upgrade required",
		Message: "Upgrade required to use Trackpilots APIs", Code: "PLAN_EXPIRED",
	}
	// ErrUnavailable: whether the key is good could not be found out. It says
	// nothing about the key; clients should try again.
	ErrUnavailable = &Error{
		StatusCode: http.StatusServiceUnavailable, StatusMessage: "Service unavailable",
		Message: "Authentication is temporarily unavailable", Code: "SERVICE_UNAVAILABLE",
	}
)

// errInternal stands in for errors that have no envelope of their own. Their
// texts are for the log and never reach the customer.
var errInternal = &Error{
	StatusCode: http.StatusInternalServerError, StatusMessage: "Internal server error",
	Message: "An unexpected error occurred", Code: "INTERNAL_SERVER_ERROR",
}

// bodies holds the replies that never change.
var bodies = map[*Error]string{}

func init() {
	for _, e := range []*Error{
		ErrAuthorizationHeaderMissing, ErrInvalidAPIKeySchema, ErrAPIKeyMissing,
		ErrInvalidAPIKey, ErrPlanExpired, ErrUnavailable, errInternal,
	} {
		bodies[e] = e.body()
	}
}

// An envelope is the body of an error.
type envelope struct {
	Success       bool      `json:"success"`
	StatusCode    int       `json:"statusCode"`
	StatusMessage string    `json:"statusMessage"`
	Data          *struct{} `json:"data"`
	Error         struct {
		Message string `json:"message"`
		Code    string `json:"code"`
	} `json:"error"`
}

// body is the envelope as compact JSON.
func (e *Error) body() string {
	v := envelope{StatusCode: e.StatusCode, StatusMessage: e.StatusMessage}
	v.Error.Message, v.Error.Code = e.Message, e.Code
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // cannot fail: nothing but strings and an int
	return string(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
}

// WriteError answers r with the envelope of the [*Error] that err is or wraps.
// Any other error, nil, and a StatusCode that is no error status are answered
// with status 500 and a fixed text: err itself is never shown.
//
// Headers that describe some other body (ETag, Last-Modified) are removed.
// Content-Encoding stays: a compressor outside has set it for what it is about to do
// (https://go.dev/issue/66343). A 401 carries the challenge of RFC 6750, section 3, in
// the realm of the Middleware that r passed, or "api".
func WriteError(w http.ResponseWriter, r *http.Request, err error) {
	e, ok := errors.AsType[*Error](err)
	if !ok || e == nil || e.StatusCode < 400 || e.StatusCode > 599 {
		e = errInternal
	}
	body, ok := bodies[e]
	if !ok {
		body = e.body()
	}

	h := w.Header()
	for _, name := range []string{"Content-Length", "Etag", "Last-Modified"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/json; charset=utf-8")
	if h.Get("Content-Encoding") == "" { // else it is not for us to know
		h.Set("Content-Length", strconv.Itoa(len(body)))
	}
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Add("Vary", "Authorization")
	if e.StatusCode == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", challenge(e, realmFromContext(r.Context())))
	}
	if e.Code == ErrUnavailable.Code {
		h.Set("Retry-After", "1")
	}
	w.WriteHeader(e.StatusCode)
	_, _ = io.WriteString(w, body) // a server leaves it out for HEAD; a client that has gone needs no answer
}

// challenge is the WWW-Authenticate value of a 401. RFC 6750, section 3.1, has
// no code for a missing or foreign scheme, nor for an unpaid plan.
func challenge(e *Error, realm string) string {
	c := `Bearer realm="` + realm + `"`
	switch e.Code {
	case ErrAPIKeyMissing.Code:
		c += `, error="invalid_request"`
	case ErrInvalidAPIKey.Code:
		c += `, error="invalid_token"`
	}
	return c
}

const defaultRealm = "api"

type realmKey struct{}

func realmFromContext(ctx context.Context) string {
	if realm, ok := ctx.Value(realmKey{}).(string); ok {
		return realm
	}
	return defaultRealm
}
