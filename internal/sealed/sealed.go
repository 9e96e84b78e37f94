// Package sealed is the form of a value that is kept where others can write: a
// body of plain fields, bound by a MAC to the name that it is kept under. A
// value that somebody made up, changed, cut off or copied to another name does
// not open. A value that was sealed earlier for the same name does: its age is
// for the body to tell.
package sealed

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// version is part of every MAC and changes with the form of the body.
const version = "apikey sealed value 1"

// A Sealer seals and opens values. It is safe for concurrent use.
type Sealer struct{ keys [][]byte } // the first one seals

// MinSecretLen is the length in bytes that a secret must have at least.
const MinSecretLen = 32

// NewSealer returns a Sealer under a key derived from secret, which also opens what was
// sealed under the secrets of accepted.
func NewSealer(secret []byte, accepted ...[]byte) *Sealer {
	s := new(Sealer)
	for _, secret := range append([][]byte{secret}, accepted...) {
		key, err := hkdf.Key(sha256.New, secret, nil, version, sha256.Size)
		if err != nil {
			panic(err) // only for lengths beyond 255 hashes
		}
		s.keys = append(s.keys, key)
	}
	return s
}

// Seal returns body, sealed for name.
func (s *Sealer) Seal(name string, body []byte) []byte {
	return append(mac(s.keys[0], name, body), body...)
}

// Open returns the body of value, and whether Seal made value for this name.
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
	h.Write(AppendString(nil, name)) // with its length, so that name and body cannot shift
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

// AppendTime appends t to b, to the nanosecond and of any year. The zero time
// stays the zero time; the location is not kept.
func AppendTime(b []byte, t time.Time) []byte {
	b = binary.AppendVarint(b, t.Unix())
	return binary.AppendUvarint(b, uint64(t.Nanosecond()))
}

// A Decoder reads fields in the order in which they were appended. After the
// first fault it returns zero values, and Done reports false.
type Decoder struct {
	rest   []byte
	failed bool
}

// NewDecoder returns a Decoder of body.
func NewDecoder(body []byte) *Decoder { return &Decoder{rest: body} }

// Done reports whether all fields were well formed and nothing is left over.
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

// skip passes over the n bytes that a varint took; none or fewer: it was cut
// off or too long.
func (d *Decoder) skip(n int) {
	if n <= 0 || d.failed {
		d.failed = true
		return
	}
	d.rest = d.rest[n:]
}
