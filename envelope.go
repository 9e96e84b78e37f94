package apikey

// The errors, and the one place that writes them. Customers' programs depend on the texts:
// they do not change within a version of the API.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"

	"github.com/trackpilots/apikey/apikeyclient"
)

// An Error is an error response of the API. All of them share one JSON envelope. Services
// may declare errors of their own and send them with [WriteError]. Errors with the same
// Code match:
//
//	errors.Is(err, apikey.ErrPlanExpired)
//
// It is the Error of package apikeyclient, so that those that a client reads from responses
// match, too.
type Error = apikeyclient.Error

// The errors of [Middleware]. They must not be modified.
var (
	// ErrAuthorizationHeaderMissing: the request has no Authorization header.
	ErrAuthorizationHeaderMissing = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Authentication token header is missing",
		Message: "Authorization header is missing", Code: "AUTHORIZATION_HEADER_MISSING",
	}
	// ErrInvalidAPIKeySchema: the scheme of the Authorization header is not Bearer.
	ErrInvalidAPIKeySchema = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Invalid authentication token schema",
		Message: "Authorization header must start with 'Bearer'", Code: "INVALID_API_KEY_SCHEMA",
	}
	// ErrAPIKeyMissing: nothing follows Bearer.
	ErrAPIKeyMissing = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Authentication token is missing",
		Message: "API key value is missing", Code: "API_KEY_MISSING",
	}
	// ErrInvalidAPIKey: the key is malformed, unknown, deactivated, deleted or expired. The
	// response does not say which.
	ErrInvalidAPIKey = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Authentication failed",
		Message: "Provided API key is invalid or inactive", Code: "INVALID_API_KEY",
	}
	// ErrPlanExpired: the key is live, but the plan of its organisation does not pass
	// [Plan.AllowsAPI].
	ErrPlanExpired = &Error{
		StatusCode: http.StatusUnauthorized, StatusMessage: "Upgrade required",
		Message: "Upgrade required to use Trackpilots APIs", Code: "PLAN_EXPIRED",
	}
	// ErrUnavailable: the key or the plan could not be looked up. This says nothing about
	// the key; clients should try again.
	ErrUnavailable = &Error{
		StatusCode: http.StatusServiceUnavailable, StatusMessage: "Service unavailable",
		Message: "Authentication is temporarily unavailable", Code: "SERVICE_UNAVAILABLE",
	}
)

// errInternal is sent in place of errors that are not an *Error. Their texts may be
// confidential.
var errInternal = &Error{
	StatusCode: http.StatusInternalServerError, StatusMessage: "Internal server error",
	Message: "An unexpected error occurred", Code: "INTERNAL_SERVER_ERROR",
}

// bodies holds the bodies of the errors above.
var bodies = map[*Error]string{}

func init() {
	for _, e := range []*Error{
		ErrAuthorizationHeaderMissing, ErrInvalidAPIKeySchema, ErrAPIKeyMissing,
		ErrInvalidAPIKey, ErrPlanExpired, ErrUnavailable, errInternal,
	} {
		bodies[e] = bodyOf(e)
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

// bodyOf is the envelope of an error as compact JSON.
func bodyOf(e *Error) string {
	v := envelope{StatusCode: e.StatusCode, StatusMessage: e.StatusMessage}
	v.Error.Message, v.Error.Code = e.Message, e.Code
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // cannot fail: nothing but strings and an int
	return string(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
}

// WriteError answers r with the envelope of the [*Error] that err is or wraps. If err is
// nil or another error, or the StatusCode is not 400 to 599, it answers status 500 with a
// fixed text, and does not show err.
//
// It removes headers that describe another body (ETag, Last-Modified). It keeps
// Content-Encoding, which a compressor outside sets before it compresses
// (https://go.dev/issue/66343). A 401 carries the challenge of RFC 6750, section 3, with
// the realm of the Middleware, or "api".
func WriteError(w http.ResponseWriter, r *http.Request, err error) {
	e, ok := errors.AsType[*Error](err)
	if !ok || e == nil || e.StatusCode < 400 || e.StatusCode > 599 {
		e = errInternal
	}
	body, ok := bodies[e]
	if !ok {
		body = bodyOf(e)
	}

	h := w.Header()
	for _, name := range []string{"Content-Length", "Etag", "Last-Modified"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/json; charset=utf-8")
	if h.Get("Content-Encoding") == "" { // else a compressor changes the length
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
	_, _ = io.WriteString(w, body) // net/http drops it for HEAD; if the client has gone there is nothing to do
}

// challenge returns the WWW-Authenticate value of a 401. RFC 6750, section 3.1, has no
// error code for a missing header, another scheme, or an expired plan.
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
