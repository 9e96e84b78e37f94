// Package bearer takes a key out of the Authorization field of a request (RFC 6750,
// section 2.1; RFC 9110, section 11.4).
package bearer

import "strings"

// MaxKeyLen is the length in bytes from which on a key is refused unread.
const MaxKeyLen = 512

// A Fault is why a field holds no key.
type Fault int

// The faults, in the order in which they are looked for.
const (
	None    Fault = iota
	Missing       // there is no field
	Scheme        // its scheme is not Bearer
	NoKey         // nothing follows the scheme
	Invalid       // what follows is no token68, too long, or more than one
)

// Key returns the key in the values of the field. Several values are judged as the one
// that RFC 9110, section 5.3, says they are equal to, and so never hold a key.
func Key(values []string) (string, Fault) {
	if len(values) == 0 {
		return "", Missing
	}
	// Blanks around the value are no part of it (RFC 9110, section 5.5). Servers trim
	// them on HTTP/1.1, but not on HTTP/2.
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
