package sealed_test

import (
	"bytes"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

var secret = []byte("0123456789abcdef0123456789abcdef")

func TestOpen(t *testing.T) {
	s := sealed.NewSealer(secret)
	for _, body := range [][]byte{nil, {0}, []byte("body"), bytes.Repeat([]byte{7}, 10_000)} {
		value := s.Seal("name", body)
		if got, ok := sealed.NewSealer(secret).Open("name", value); !ok || !bytes.Equal(got, body) {
			t.Errorf("Open = %q, %v, want %q", got, ok, body)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	s := sealed.NewSealer(secret)
	value := s.Seal("name", []byte("body"))
	for i := range value {
		for bit := range 8 {
			flipped := bytes.Clone(value)
			flipped[i] ^= 1 << bit
			if _, ok := s.Open("name", flipped); ok {
				t.Errorf("opens with bit %d of byte %d flipped", bit, i)
			}
		}
		if _, ok := s.Open("name", value[:i]); ok {
			t.Errorf("opens cut off after %d bytes", i)
		}
	}
	for _, name := range []string{"", "nam", "name ", "eman", "Name"} {
		if _, ok := s.Open(name, value); ok {
			t.Errorf("opens under the name %q", name)
		}
	}
	if _, ok := s.Open("name", append(bytes.Clone(value), 0)); ok {
		t.Error("opens with a byte more")
	}
	other := sealed.NewSealer([]byte("another secret of thirty-two chars"))
	if _, ok := other.Open("name", value); ok {
		t.Error("opens under another secret")
	}

	// A byte moved from the name to the body, or back.
	for name, body := range map[string]string{"nameb": "ody", "nam": "ebody"} {
		if bytes.Equal(s.Seal(name, []byte(body))[:32], value[:32]) {
			t.Errorf("%q, %q has the MAC of %q, %q", name, body, "name", "body")
		}
	}
}

func TestFields(t *testing.T) {
	strs := []string{"", "a", "ü\xff\x00", strings.Repeat("x", 300)}
	times := []time.Time{
		{},
		time.Unix(0, 0),
		time.Unix(0, -1),
		time.Unix(1<<40, 999_999_999),
		time.Date(-4713, 1, 1, 0, 0, 0, 1, time.UTC),
		time.Date(294276, 12, 31, 23, 59, 59, 999_999_000, time.FixedZone("", 7200)),
		time.Unix(math.MinInt64, 0),
		time.Now(),
	}
	var b []byte
	for _, s := range strs {
		b = sealed.AppendString(b, s)
	}
	for _, tm := range times {
		b = sealed.AppendTime(b, tm)
	}
	b = sealed.AppendBool(sealed.AppendBool(b, true), false)

	read := func(b []byte) bool {
		d := sealed.NewDecoder(b)
		for _, want := range strs {
			if got := d.String(); got != want && d.Done() {
				t.Errorf("String = %q, want %q", got, want)
			}
		}
		for _, want := range times {
			if got := d.Time(); !got.Equal(want) && d.Done() {
				t.Errorf("Time = %v, want %v", got, want)
			}
		}
		if d.Bool() != true && d.Done() || d.Bool() != false && d.Done() {
			t.Error("Bool differs")
		}
		return d.Done()
	}
	if !read(b) {
		t.Error("what was appended does not read")
	}
	for i := range b {
		if read(b[:i]) {
			t.Errorf("reads when cut off after %d of %d bytes", i, len(b))
		}
	}
	if read(append(b, 0)) {
		t.Error("reads with a byte left over")
	}
	if d := sealed.NewDecoder(sealed.AppendTime(nil, time.Time{})); !d.Time().IsZero() {
		t.Error("the zero time does not stay zero")
	}
}

// FuzzDecoder: no input makes the decoder panic, or read on after a fault.
func FuzzDecoder(f *testing.F) {
	f.Add(sealed.AppendBool(sealed.AppendTime(sealed.AppendString(nil, "s"), time.Unix(1, 2)), true))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{5, 'a'})
	f.Fuzz(func(t *testing.T, body []byte) {
		d := sealed.NewDecoder(body)
		s, tm, b := d.String(), d.Time(), d.Bool()
		if !d.Done() {
			return
		}
		d = sealed.NewDecoder(sealed.AppendBool(sealed.AppendTime(sealed.AppendString(nil, s), tm), b))
		if d.String() != s || !d.Time().Equal(tm) || d.Bool() != b || !d.Done() {
			t.Errorf("%q, %v, %v do not survive", s, tm, b)
		}
	})
}
