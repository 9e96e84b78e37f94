// Package keyformat is the shape of the keys that apikey issues:
//
//	<prefix>_<live|test>_ + 43 base62 characters (256 random bits) + 6 base62 characters of CRC-32/IEEE
//
// The checksum covers all that stands before it. It catches typing errors and
// made-up keys without a lookup, and it lets secret scanners tell a real key
// from a look-alike; it proves nothing about who made the key.
package keyformat

import (
	"crypto/rand"
	"hash/crc32"
	"strings"
	"unsafe"
)

// Prefix is the prefix of every key that apikey issues.
const Prefix = "tpk"

// An Environment is the second part of a key. It is a label for people and
// scanners; authentication treats both alike.
type Environment string

// The two environments a key can name.
const (
	Live Environment = "live"
	Test Environment = "test"
)

const (
	alphabet     = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	bodyLen      = 43 // 62^43 > 2^256
	checksumLen  = 6  // 62^6 > 2^32
	hintLen      = 6
	unbiased     = 256 - 256%len(alphabet)
	liveKeyStart = Prefix + "_" + string(Live) + "_"
	testKeyStart = Prefix + "_" + string(Test) + "_"
)

// New returns a new random key.
func New(env Environment) string {
	var b strings.Builder
	b.WriteString(Prefix + "_" + string(env) + "_")
	for written := 0; written < bodyLen; {
		var random [64]byte
		_, _ = rand.Read(random[:]) // never fails: see crypto/rand.Read
		for _, c := range random {
			// Rejection sampling: a plain remainder would favour the first letters.
			if int(c) < unbiased && written < bodyLen {
				b.WriteByte(alphabet[int(c)%len(alphabet)])
				written++
			}
		}
	}
	sum := checksum(b.String())
	b.Write(sum[:])
	return b.String()
}

// Plausible reports whether a lookup of key can succeed. It is false only for a
// key that carries our prefix and has the wrong length or checksum; a key without
// the prefix was issued elsewhere, and nothing is known about its shape.
func Plausible(key string) bool {
	if !ours(key) {
		return true
	}
	if len(key) != len(liveKeyStart)+bodyLen+checksumLen {
		return false
	}
	sum := checksum(key[:len(key)-checksumLen])
	return key[len(key)-checksumLen:] == string(sum[:])
}

// Hint returns the characters of a key of ours that may be shown, to tell keys
// apart: 6 of the 43 random ones. For a key without our prefix it returns "".
func Hint(key string) string {
	if !ours(key) || len(key) != len(liveKeyStart)+bodyLen+checksumLen {
		return ""
	}
	return key[len(liveKeyStart) : len(liveKeyStart)+hintLen]
}

// EnvironmentOf returns what a key of ours says; "" for a key without our prefix.
func EnvironmentOf(key string) Environment {
	switch {
	case strings.HasPrefix(key, liveKeyStart):
		return Live
	case strings.HasPrefix(key, testKeyStart):
		return Test
	}
	return ""
}

// ours reports whether key carries our prefix.
func ours(key string) bool {
	return EnvironmentOf(key) != ""
}

// checksum is the CRC-32/IEEE of s in base62, most significant digit first.
func checksum(s string) (digits [checksumLen]byte) {
	// Read only, and not kept: a conversion would allocate on every request.
	sum := crc32.ChecksumIEEE(unsafe.Slice(unsafe.StringData(s), len(s)))
	for i := checksumLen - 1; i >= 0; i-- {
		digits[i] = alphabet[sum%uint32(len(alphabet))]
		sum /= uint32(len(alphabet))
	}
	return digits
}
