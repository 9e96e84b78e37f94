// Package sealed protects values that are stored where others can write. A value is a body
// of plain fields with a MAC over the body and the name under which it is stored. A value
// that somebody has made up, changed, truncated or copied to another name is rejected. An
// older value of the same name is not: the body must tell its age.
package sealed

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// version is part of every MAC. It changes with the encoding of the body.
const version = "apikey sealed value 1"

// A Sealer seals and opens values. It is safe for concurrent use.
type Sealer struct{ keys [][]byte } // the first one seals

// MinSecretLen is the minimum length of a secret in bytes.
const MinSecretLen = 32

// Overhead is how many bytes longer a value is than its body.
const Overhead = sha256.Size

// NewSealer returns a Sealer that seals under secret, and opens what was sealed under secret
// or one of accepted.
func NewSealer(secret []byte, accepted ...[]byte) *Sealer {
	s := new(Sealer)
	for _, secret := range append([][]byte{secret}, accepted...) {
		key, err := hkdf.Key(sha256.New, secret, nil, version, sha256.Size)
		if err != nil {
			panic(err) // not with this length
		}
		s.keys = append(s.keys, key)
	}
	return s
}

// Seal returns body, sealed for name.
func (s *Sealer) Seal(name string, body []byte) []byte {
	return append(mac(s.keys[0], name, body), body...)
}

// Open returns the body of value, and whether value was sealed for this name.
func (s *Sealer) Open(name string, value []byte) ([]byte, bool) {
	if len(value) < sha256.Size {
		return nil, false
	}
	seal, body := value[:sha256.Size], value[sha256.Size:]
	for _, key := range s.keys {
		if hmac.Equal(seal, mac(key, name, body)) {
			return body, true
		}
	}
	return nil, false
}

func mac(key []byte, name string, body []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(version))
	h.Write(AppendString(nil, name)) // with its length, so that bytes cannot move between name and body
	h.Write(body)
	return h.Sum(nil)
}

// AppendString appends s to b.
func AppendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// AppendBool appends v to b.
func AppendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// AppendInt appends n to b.
func AppendInt(b []byte, n int64) []byte { return binary.AppendVarint(b, n) }

// AppendTime appends t to b, with nanoseconds and any year. The zero time stays zero. The
// location is lost.
func AppendTime(b []byte, t time.Time) []byte {
	b = binary.AppendVarint(b, t.Unix())
	return binary.AppendUvarint(b, uint64(t.Nanosecond()))
}

// A Decoder reads fields in the order in which they were appended. After an error it returns
// zero values, and Done returns false.
type Decoder struct {
	rest   []byte
	failed bool
}

// NewDecoder returns a Decoder of body.
func NewDecoder(body []byte) *Decoder { return &Decoder{rest: body} }

// Done reports whether there was no error and nothing is left.
func (d *Decoder) Done() bool { return !d.failed && len(d.rest) == 0 }

// String reads a string.
func (d *Decoder) String() string {
	size := d.uvarint()
	if size > uint64(len(d.rest)) {
		d.failed = true
	}
	if d.failed {
		return ""
	}
	s := string(d.rest[:size])
	d.rest = d.rest[size:]
	return s
}

// Bool reads a bool.
func (d *Decoder) Bool() bool {
	if d.failed || len(d.rest) == 0 || d.rest[0] > 1 {
		d.failed = true
		return false
	}
	v := d.rest[0] == 1
	d.rest = d.rest[1:]
	return v
}

// Int reads an integer.
func (d *Decoder) Int() int64 {
	v, n := binary.Varint(d.rest)
	d.skip(n)
	if d.failed {
		return 0
	}
	return v
}

// Time reads a time, in UTC.
func (d *Decoder) Time() time.Time {
	seconds := d.Int()
	nanos := d.uvarint()
	if d.failed || nanos >= uint64(time.Second) {
		d.failed = true
		return time.Time{}
	}
	return time.Unix(seconds, int64(nanos)).UTC()
}

func (d *Decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.rest)
	d.skip(n)
	return v
}

// skip skips the n bytes of a varint; if n is not positive, the varint is truncated or too
// long.
func (d *Decoder) skip(n int) {
	if n <= 0 || d.failed {
		d.failed = true
		return
	}
	d.rest = d.rest[n:]
}
