package apikeyclient_test

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/apikeyclient"
)

func Example() {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		apikey.WriteError(w, r, apikey.ErrPlanExpired)
	}))
	defer api.Close()

	resp, err := http.Get(api.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	e, ok := errors.AsType[*apikeyclient.Error](apikeyclient.FromResponse(resp))
	if ok && e.Code == apikeyclient.CodePlanExpired {
		fmt.Println(e.Message)
	}
	// Output: Upgrade required to use Trackpilots APIs
}

// TestFromResponse: what the server writes is what its clients read.
func TestFromResponse(t *testing.T) {
	for code, e := range map[string]*apikey.Error{
		apikeyclient.CodeAuthorizationHeaderMissing: apikey.ErrAuthorizationHeaderMissing,
		apikeyclient.CodeInvalidAPIKeySchema:        apikey.ErrInvalidAPIKeySchema,
		apikeyclient.CodeAPIKeyMissing:              apikey.ErrAPIKeyMissing,
		apikeyclient.CodeInvalidAPIKey:              apikey.ErrInvalidAPIKey,
		apikeyclient.CodePlanExpired:                apikey.ErrPlanExpired,
		apikeyclient.CodeServiceUnavailable:         apikey.ErrUnavailable,
		"THING_NOT_FOUND":                           {StatusCode: 404, StatusMessage: "Not found", Message: "No <thing>", Code: "THING_NOT_FOUND"},
	} {
		w := httptest.NewRecorder()
		apikey.WriteError(w, httptest.NewRequest("GET", "/", nil), e)
		got, ok := errors.AsType[*apikeyclient.Error](apikeyclient.FromResponse(w.Result()))
		if !ok || *got != *e || got.Code != code || got.Error() != e.Error() {
			t.Errorf("read %+v, want %+v with code %s", got, e, code)
		}
		if err := fmt.Errorf("asking: %w", error(got)); !errors.Is(err, e) || !errors.Is(err, &apikeyclient.Error{Code: code}) || errors.Is(err, &apikeyclient.Error{Code: "OTHER"}) {
			t.Errorf("%v does not match by its code", err)
		}
	}
}

func TestFromOtherResponses(t *testing.T) {
	response := func(status int, body string) *http.Response {
		return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(body))}
	}
	if err := apikeyclient.FromResponse(response(200, `{"error":{"code":"X"}}`)); err != nil {
		t.Errorf("a success is %v", err)
	}
	for name, resp := range map[string]*http.Response{
		"a proxy's page":  response(502, "<html>Bad Gateway</html>"),
		"nothing":         response(401, ""),
		"other JSON":      response(401, `{"error":"unauthorized"}`),
		"no code":         response(401, `{"success":false,"error":{"message":"m"}}`),
		"a success in it": response(401, `{"success":true,"error":{"message":"m","code":"X"}}`),
		"endless":         response(401, `{"success":false,"x":"`+strings.Repeat("x", 1<<20)+`"}`),
	} {
		err := apikeyclient.FromResponse(resp)
		if _, ok := errors.AsType[*apikeyclient.Error](err); err == nil || ok || !strings.Contains(err.Error(), fmt.Sprint(resp.StatusCode)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	gone := errors.New("connection reset")
	broken := &http.Response{StatusCode: 401, Body: io.NopCloser(iotest.ErrReader(gone))}
	if err := apikeyclient.FromResponse(broken); !errors.Is(err, gone) {
		t.Errorf("a connection that breaks: %v", err)
	}
}
