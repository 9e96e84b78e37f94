package examples

// The OpenAPI components for the errors: valid, and true of the middleware.

import (
	"encoding/json"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/schema_validation"
	"github.com/pb33f/libopenapi/datamodel/high/base"

	"github.com/trackpilots/apikey"
)

func TestOpenAPI(t *testing.T) {
	text, err := os.ReadFile("../openapi/errors.yaml")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := libopenapi.NewDocument(text)
	if err != nil {
		t.Fatal(err)
	}
	v, errs := validator.NewValidator(doc)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	if ok, faults := v.ValidateDocument(); !ok {
		for _, fault := range faults {
			t.Errorf("%s: %s", fault.Message, fault.Reason)
		}
	}
	model, err := doc.BuildV3Model()
	if err != nil {
		t.Fatal(err)
	}

	documented := 0
	for name, refusals := range map[string][]*apikey.Error{
		"Unauthorized": {
			apikey.ErrAuthorizationHeaderMissing, apikey.ErrInvalidAPIKeySchema, apikey.ErrAPIKeyMissing,
			apikey.ErrInvalidAPIKey, apikey.ErrPlanExpired,
		},
		"ServiceUnavailable": {apikey.ErrUnavailable},
	} {
		response := model.Model.Components.Responses.GetOrZero(name)
		for _, e := range refusals {
			w := httptest.NewRecorder()
			apikey.WriteError(w, httptest.NewRequest("GET", "/", nil), e)
			media := response.Content.GetOrZero(w.Header().Get("Content-Type"))
			if media == nil {
				t.Fatalf("%s does not describe %s", name, w.Header().Get("Content-Type"))
			}
			if problem := invalid(t, media.Schema.Schema(), w.Body.Bytes()); problem != "" {
				t.Errorf("%s is not as %s says: %s", e.Code, name, problem)
			}
			for broken, body := range map[string]string{
				"another status": strings.Replace(w.Body.String(), `"statusCode":`, `"statusCode":1`, 1),
				"a member more":  strings.Replace(w.Body.String(), `{`, `{"x":1,`, 1),
				"a success":      strings.Replace(w.Body.String(), `"success":false`, `"success":true`, 1),
			} {
				if invalid(t, media.Schema.Schema(), []byte(body)) == "" {
					t.Errorf("%s: %s passes for %s", e.Code, broken, name)
				}
			}
			for header := range response.Headers.FromOldest() {
				if w.Header().Get(header) == "" {
					t.Errorf("%s: the header %s is described, and not there", e.Code, header)
				}
			}

			example := media.Examples.GetOrZero(e.Code)
			if example == nil {
				t.Errorf("%s has no example of %s", name, e.Code)
				continue
			}
			documented++
			var want, got any
			if err := example.Value.Decode(&want); err != nil {
				t.Fatal(err)
			}
			text, err := json.Marshal(want)
			if err != nil {
				t.Fatal(err)
			}
			if json.Unmarshal(text, &want) != nil || json.Unmarshal(w.Body.Bytes(), &got) != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("the example of %s is %v, and the answer %v", e.Code, want, got)
			}
		}
	}
	if documented != 6 {
		t.Errorf("%d examples, want 6", documented)
	}
}

// invalid says why body is not as the schema says; "" if it is.
func invalid(t *testing.T, schema *base.Schema, body []byte) string {
	t.Helper()
	ok, faults := schema_validation.NewSchemaValidator().ValidateSchemaBytes(schema, body)
	if ok {
		return ""
	}
	text := "refused"
	for _, fault := range faults {
		text += "; " + fault.Reason
	}
	return text
}
