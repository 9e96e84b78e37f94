package apikey_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/contract"
	"github.com/trackpilots/apikey/internal/world"
)

func write(method string, err error, header http.Header) *http.Response {
	w := httptest.NewRecorder()
	for name, values := range header {
		w.Header()[name] = values
	}
	apikey.WriteError(w, httptest.NewRequest(method, "/", nil), err)
	return w.Result()
}

// wantStatus is the status of a code.
func wantStatus(code string) int {
	switch code {
	case world.Admitted:
		return http.StatusOK
	case world.Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusUnauthorized
}

// wantHeaders are the headers of a refusal.
func wantHeaders(code, body string) http.Header {
	h := http.Header{
		"Content-Type":           {"application/json; charset=utf-8"},
		"Content-Length":         {fmt.Sprint(len(body))},
		"Cache-Control":          {"no-store"},
		"X-Content-Type-Options": {"nosniff"},
		"Vary":                   {"Authorization"},
	}
	switch code {
	case world.KeyMissing:
		h.Set("WWW-Authenticate", `Bearer realm="api", error="invalid_request"`)
	case world.Invalid:
		h.Set("WWW-Authenticate", `Bearer realm="api", error="invalid_token"`)
	case world.Unavailable:
		h.Set("Retry-After", "1")
	default:
		h.Set("WWW-Authenticate", `Bearer realm="api"`)
	}
	return h
}

func bodyOf(t *testing.T, resp *http.Response) string {
	t.Helper()
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

var refusals = []*apikey.Error{
	apikey.ErrAuthorizationHeaderMissing, apikey.ErrInvalidAPIKeySchema, apikey.ErrAPIKeyMissing,
	apikey.ErrInvalidAPIKey, apikey.ErrPlanExpired, apikey.ErrUnavailable,
}

func TestWriteError(t *testing.T) {
	bodies := contract.BodiesAndOutage(t)
	for _, e := range refusals {
		for name, err := range map[string]error{
			"itself":  e,
			"wrapped": fmt.Errorf("context: %w", e),
			"joined":  errors.Join(errors.New("first"), e),
		} {
			t.Run(e.Code+" "+name, func(t *testing.T) {
				resp := write("GET", err, nil)
				body := bodyOf(t, resp)
				if resp.StatusCode != wantStatus(e.Code) || body != bodies[e.Code] {
					t.Errorf("status %d\n%s, want %d\n%s", resp.StatusCode, body, wantStatus(e.Code), bodies[e.Code])
				}
				if got, want := fmt.Sprint(resp.Header), fmt.Sprint(wantHeaders(e.Code, body)); got != want {
					t.Errorf("headers\n%s, want\n%s", got, want)
				}
			})
		}
	}
}

// TestWriteErrorHeaders: what an outer handler has set for the body it expected
// goes, what belongs to it stays.
func TestWriteErrorHeaders(t *testing.T) {
	resp := write("GET", apikey.ErrPlanExpired, http.Header{
		"Etag": {`"1"`}, "Last-Modified": {"Thu, 01 Jan 1970 00:00:00 GMT"},
		"Content-Type": {"text/html"}, "Content-Length": {"7"}, "Cache-Control": {"max-age=60"},
		"Vary": {"Origin"}, "Access-Control-Allow-Origin": {"https://example.com"},
	})
	want := wantHeaders(world.PlanExpired, bodyOf(t, resp))
	want["Vary"] = []string{"Origin", "Authorization"}
	want["Access-Control-Allow-Origin"] = []string{"https://example.com"}
	if got, want := fmt.Sprint(resp.Header), fmt.Sprint(want); got != want {
		t.Errorf("headers\n%s, want\n%s", got, want)
	}
}

// TestWriteErrorShares: nobody can change later answers through an earlier one.
func TestWriteErrorShares(t *testing.T) {
	first := write("GET", apikey.ErrInvalidAPIKey, nil)
	want := fmt.Sprint(first.Header)
	for _, values := range first.Header {
		values[0] = "changed"
	}
	if got := fmt.Sprint(write("GET", apikey.ErrInvalidAPIKey, nil).Header); got != want {
		t.Errorf("the second answer has headers\n%s, want\n%s", got, want)
	}
	changed := *apikey.ErrInvalidAPIKey
	changed.Message = "changed"
	if body := bodyOf(t, write("GET", &changed, nil)); !strings.Contains(body, "changed") {
		t.Errorf("a copy with another message is answered with the old one: %s", body)
	}
}

// TestWriteErrorOfHandlers: services answer with errors of their own.
func TestWriteErrorOfHandlers(t *testing.T) {
	notFound := &apikey.Error{
		StatusCode: 404, StatusMessage: "Not found", Message: `No <thing> "x" & Co`, Code: "THING_NOT_FOUND",
	}
	resp := write("GET", notFound, nil)
	want := `{"success":false,"statusCode":404,"statusMessage":"Not found","data":null,` +
		`"error":{"message":"No <thing> \"x\" & Co","code":"THING_NOT_FOUND"}}`
	if body := bodyOf(t, resp); resp.StatusCode != 404 || body != want {
		t.Errorf("status %d\n%s, want 404\n%s", resp.StatusCode, body, want)
	}
	if challenge, ok := resp.Header["Www-Authenticate"]; ok {
		t.Errorf("a 404 carries the challenge %q", challenge)
	}

	limited := &apikey.Error{StatusCode: 401, StatusMessage: "Suspended", Message: "Suspended", Code: "SUSPENDED"}
	if got := write("GET", limited, nil).Header.Get("WWW-Authenticate"); got != `Bearer realm="api"` {
		t.Errorf("a 401 of a handler carries the challenge %q", got)
	}
}

// TestWriteErrorHidesOthers: whatever is not an Error for customers is a 500, and
// its text is not shown.
func TestWriteErrorHidesOthers(t *testing.T) {
	secret := errors.New("password authentication failed for user app at 10.0.0.7")
	for name, err := range map[string]error{
		"plain":     secret,
		"nil":       nil,
		"nil Error": (*apikey.Error)(nil),
		"status 0":  &apikey.Error{Message: secret.Error(), Code: "X"},
		"status 99": &apikey.Error{StatusCode: 99, Code: "X"},
		"success":   &apikey.Error{StatusCode: 200, Code: "X"},
		"too large": &apikey.Error{StatusCode: 1000, Code: "X"},
	} {
		t.Run(name, func(t *testing.T) {
			resp := write("GET", err, nil)
			body := bodyOf(t, resp)
			if resp.StatusCode != http.StatusInternalServerError || strings.Contains(body, "password") {
				t.Errorf("status %d, body %s", resp.StatusCode, body)
			}
			var envelope struct {
				StatusCode int
				Error      struct{ Code string }
			}
			if err := json.Unmarshal([]byte(body), &envelope); err != nil || envelope.StatusCode != 500 ||
				envelope.Error.Code != "INTERNAL_SERVER_ERROR" {
				t.Errorf("%v: %s", err, body)
			}
		})
	}
}

// TestWriteErrorHead: the server leaves the body out, and a compressor on the way knows
// from it how long it would be.
func TestWriteErrorHead(t *testing.T) {
	get, head := write("GET", apikey.ErrPlanExpired, nil), write("HEAD", apikey.ErrPlanExpired, nil)
	if got, want := bodyOf(t, head), bodyOf(t, get); got != want {
		t.Errorf("HEAD is written %q, GET %q", got, want)
	}
	if fmt.Sprint(get.Header) != fmt.Sprint(head.Header) {
		t.Errorf("HEAD has headers %v, GET %v", head.Header, get.Header)
	}
}

// TestWriteErrorCompressed: what a compressor has announced stays, and it knows the
// length.
func TestWriteErrorCompressed(t *testing.T) {
	resp := write("GET", apikey.ErrPlanExpired, http.Header{"Content-Encoding": {"gzip"}, "Content-Length": {"7"}})
	if got := resp.Header; got.Get("Content-Encoding") != "gzip" || got.Get("Content-Length") != "" {
		t.Errorf("headers %v", got)
	}
}

func TestErrorIs(t *testing.T) {
	for _, e := range refusals {
		for _, other := range refusals {
			if got := errors.Is(fmt.Errorf("wrapped: %w", e), other); got != (e == other) {
				t.Errorf("errors.Is(%s, %s) = %v", e.Code, other.Code, got)
			}
		}
		byCode := &apikey.Error{Code: e.Code}
		if !errors.Is(byCode, e) || !errors.Is(e, byCode) {
			t.Errorf("%s does not match by its code", e.Code)
		}
		if errors.Is(e, (*apikey.Error)(nil)) || errors.Is(e, apikey.ErrNotFound) {
			t.Errorf("%s matches too much", e.Code)
		}
		if want := e.Code + ": " + e.Message; e.Error() != want {
			t.Errorf("Error() = %q, want %q", e.Error(), want)
		}
	}
}
