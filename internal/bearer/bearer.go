// Package bearer parses the Authorization header of a request (RFC 6750, section 2.1; RFC
// 9110, section 11.4).
package bearer

import "strings"

// MaxKeyLen is the maximum length of a key in bytes.
const MaxKeyLen = 512

// A Fault is the reason why a header has no key.
type Fault int

// The faults, in the order of the checks.
const (
	None    Fault = iota
	Missing       // there is no header
	Scheme        // the scheme is not Bearer
	NoKey         // nothing follows Bearer
	Invalid       // what follows is not one token68, or too long
)

// Key returns the key in the values of the header. It treats several values as one, as RFC
// 9110, section 5.3, says. So a repeated header never has a key.
func Key(values []string) (string, Fault) {
	if len(values) == 0 {
		return "", Missing
	}
	// Blanks around a value do not belong to it (RFC 9110, section 5.5). net/http trims
	// them for HTTP/1.1 and not for HTTP/2.
	scheme, key, more := strings.Cut(strings.Trim(strings.Join(values, ", "), " \t"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		if more && strings.EqualFold(scheme, "Bearer,") {
			return "", Invalid // a list whose first member is a bare Bearer
		}
		return "", Scheme
	}
	key = strings.TrimLeft(key, " ")
	switch {
	case len(key) <= MaxKeyLen && IsToken68(key):
		return key, None
	case key == "":
		return "", NoKey
	}
	return "", Invalid
}

// IsToken68 reports whether s is a token68 (RFC 9110, section 11.2).
func IsToken68(s string) bool {
	s = strings.TrimRight(s, "=")
	for _, c := range []byte(s) {
		if !token68[c] {
			return false
		}
	}
	return s != ""
}

var token68 = func() (set [256]bool) {
	for _, c := range []byte("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-._~+/") {
		set[c] = true
	}
	return set
}()
