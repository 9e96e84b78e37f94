package bearer

import (
	"regexp"
	"strings"
	"testing"
)

// FuzzKey compares the parser with its grammar.
func FuzzKey(f *testing.F) {
	for _, values := range []string{
		"", "  \t ", "Token k", "k", "Bearerk", "Bearer:k", "Bearer\tk", "Bearer", "Bearer ", "Bearer \t ", "bearer k", "BEARER   k=", " Bearer k\t",
		"Bearer \tk", "Bearer k k", "Bearer k,", `Bearer "k"`, "Bearer ====", "Bearer ключ", "Bearer \xff", "Bearer k\nBearer k", "Bearer\nk", "\nBearer k",
		"Bearer, Bearer k", "BeArer,", "Basic dTpw\nBearer k", "Bearer k\n", "Bearer " + strings.Repeat("a", MaxKeyLen), "Bearer " + strings.Repeat("a", MaxKeyLen+1),
	} {
		f.Add(values, true)
	}
	f.Add("", false)
	blanks := regexp.MustCompile(`^[ \t]*|[ \t]*$`)
	grammar := regexp.MustCompile(`^(?i:bearer) +([0-9A-Za-z._~+/-]+=*)$`)
	noKey := regexp.MustCompile(`^(?i:bearer)$`)
	scheme := regexp.MustCompile(`^(?i:bearer),? `)
	f.Fuzz(func(t *testing.T, text string, present bool) {
		var values []string
		if present {
			values = strings.Split(text, "\n")
		}
		joined := blanks.ReplaceAllString(strings.Join(values, ", "), "")
		got, fault := Key(values)

		var wantKey string
		want := Scheme
		match := grammar.FindStringSubmatch(joined)
		switch {
		case !present:
			want = Missing
		case match != nil && len(match[1]) <= MaxKeyLen:
			wantKey, want = match[1], None
		case noKey.MatchString(joined):
			want = NoKey
		case scheme.MatchString(joined):
			want = Invalid
		}
		if fault != want || got != wantKey {
			t.Errorf("Key(%q) = %q, %v, want %q, %v", values, got, fault, wantKey, want)
		}
		if len(values) > 1 && fault == None {
			t.Errorf("a repeated header holds a key: %q", values)
		}
	})
}
