// Package contract gives tests the customers' documentation of errors, which the envelope
// must match byte for byte.
package contract

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"regexp"
	"testing"
)

//go:embed trackpilots-errors.txt
var text []byte

var block = regexp.MustCompile(`(?ms)^\{\n  "success".*?^\}`)

// Bodies returns the documented bodies by code, as compact JSON.
func Bodies(tb testing.TB) map[string]string {
	tb.Helper()
	bodies := map[string]string{}
	for _, example := range block.FindAll(text, -1) {
		var compact bytes.Buffer
		var body struct{ Error struct{ Code string } }
		if err := errors.Join(json.Compact(&compact, example), json.Unmarshal(example, &body)); err != nil {
			tb.Fatal(err)
		}
		if earlier, ok := bodies[body.Error.Code]; ok && earlier != compact.String() {
			tb.Fatalf("the documentation contradicts itself on %s", body.Error.Code)
		}
		bodies[body.Error.Code] = compact.String()
	}
	if len(bodies) != 5 {
		tb.Fatalf("found %d codes in the documentation, want 5", len(bodies))
	}
	return bodies
}

// BodiesAndOutage returns Bodies, and the body of the sixth code: an outage, which the
// documentation does not know.
func BodiesAndOutage(tb testing.TB) map[string]string {
	tb.Helper()
	bodies := Bodies(tb)
	bodies["SERVICE_UNAVAILABLE"] = `{"success":false,"statusCode":503,"statusMessage":"Service unavailable","data":null,` +
		`"error":{"message":"Authentication is temporarily unavailable","code":"SERVICE_UNAVAILABLE"}}`
	return bodies
}
