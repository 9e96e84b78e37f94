// Package apikeyclient reads the errors of the API, for its clients in Go. It needs the
// standard library alone; package apikey, for servers, brings the clients of PostgreSQL and
// Redis with it.
package apikeyclient

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
)

// The codes of the errors that authentication answers with. Others are those of the
// endpoint.
const (
	CodeAuthorizationHeaderMissing = "AUTHORIZATION_HEADER_MISSING" // the request has no Authorization header
	CodeInvalidAPIKeySchema        = "INVALID_API_KEY_SCHEMA"       // the scheme of the header is not Bearer
	CodeAPIKeyMissing              = "API_KEY_MISSING"              // nothing follows Bearer
	CodeInvalidAPIKey              = "INVALID_API_KEY"              // the key is malformed, unknown, deactivated, deleted or expired
	CodePlanExpired                = "PLAN_EXPIRED"                 // the plan of the organisation does not include the API
	CodeServiceUnavailable         = "SERVICE_UNAVAILABLE"          // nothing is wrong with the key: try again
)

// An Error is an error of the API. Errors with the same Code match by [errors.Is].
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

// maxBody is how much of a response FromResponse reads, in bytes.
const maxBody = 64 << 10

// FromResponse returns the error that resp holds: nil for a status below 400, an [*Error]
// if the body is the error envelope of the API, and some other error if it is not, as from
// a proxy on the way. It reads up to 64 KiB of the body, and leaves it to the caller to
// close.
func FromResponse(resp *http.Response) error {
	if resp.StatusCode < 400 {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("apikeyclient: reading a response with status %d: %w", resp.StatusCode, err)
	}
	var envelope struct {
		Success       bool   `json:"success"`
		StatusMessage string `json:"statusMessage"`
		Error         struct {
			Message string `json:"message"`
			Code    string `json:"code"`
		} `json:"error"`
	}
	if err := json.Unmarshal(body, &envelope); err != nil || envelope.Success || envelope.Error.Code == "" {
		return fmt.Errorf("apikeyclient: a response with status %d that is not the error envelope", resp.StatusCode)
	}
	return &Error{
		StatusCode: resp.StatusCode, StatusMessage: envelope.StatusMessage,
		Message: envelope.Error.Message, Code: envelope.Error.Code,
	}
}
