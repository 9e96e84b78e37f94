package snapshot_test

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/trackpilots/apikey/internal/snapshot"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

func TestSees(t *testing.T) {
	for _, c := range []struct {
		text string
		sees []uint64
		not  []uint64
	}{
		{"10:10:", []uint64{0, 1, 9}, []uint64{10, 11}},
		{"10:20:", []uint64{9, 10, 15, 19}, []uint64{20, 1 << 63}},
		{"10:20:10,14,15", []uint64{9, 11, 13, 16, 19}, []uint64{10, 14, 15, 20, 21}},
		{"10:20:19", []uint64{10, 18}, []uint64{19, 20}},
		{"18446744073709551614:18446744073709551615:", []uint64{18446744073709551614}, []uint64{18446744073709551615}},
	} {
		s, err := snapshot.Parse(c.text)
		if err != nil {
			t.Fatal(err)
		}
		if s.String() != c.text || s.IsZero() {
			t.Errorf("%s becomes %s", c.text, s)
		}
		for _, x := range c.sees {
			if !s.Sees(x) {
				t.Errorf("%s does not see %d", c.text, x)
			}
		}
		for _, x := range c.not {
			if s.Sees(x) {
				t.Errorf("%s sees %d", c.text, x)
			}
		}
	}
}

func TestZero(t *testing.T) {
	var s snapshot.Snapshot
	if !s.IsZero() || s.String() != "" || s.Sees(1) {
		t.Errorf("the zero Snapshot: IsZero %v, String %q, Sees(1) %v", s.IsZero(), s, s.Sees(1))
	}
}

func TestParseRefuses(t *testing.T) {
	for _, text := range []string{
		"", ":", "::", "10", "10:20", "10:20:30:", "0:0:", "20:10:", "-1:10:", "+1:10:", "01:10:", " 10:20:", "10:20: ", "a:b:",
		"10:20:9", "10:20:20", "10:20:12,11", "10:20:11,11", "10:20:11,", "10:20:,11", "10:20:x",
		"18446744073709551616:18446744073709551617:",
	} {
		if s, err := snapshot.Parse(text); err == nil || !s.IsZero() {
			t.Errorf("Parse(%q) = %v, %v", text, s, err)
		}
	}
}

// FuzzParse: what is accepted prints as it was written, and sees what the
// definition says.
func FuzzParse(f *testing.F) {
	for _, text := range []string{"10:10:", "10:20:10,14,15", "1:2:1", "x", "18446744073709551614:18446744073709551615:"} {
		f.Add(text, uint64(14))
	}
	f.Fuzz(func(t *testing.T, text string, x uint64) {
		s, err := snapshot.Parse(text)
		if err != nil {
			return
		}
		if s.String() != text {
			t.Fatalf("Parse(%q) prints %q", text, s)
		}
		parts := strings.Split(text, ":")
		xmin, _ := strconv.ParseUint(parts[0], 10, 64)
		xmax, _ := strconv.ParseUint(parts[1], 10, 64)
		running := slices.Contains(strings.Split(parts[2], ","), strconv.FormatUint(x, 10))
		if want := x < xmin || x < xmax && !running; s.Sees(x) != want {
			t.Errorf("%s sees %d: %v, want %v", text, x, s.Sees(x), want)
		}
	})
}

func TestCollect(t *testing.T) {
	snapshot.Report(t.Context(), "10:20:", 0) // nobody collects: nothing happens

	ctx, c := snapshot.Collect(t.Context())
	if !c.Snapshot().IsZero() {
		t.Error("a stamp before the read")
	}
	type key struct{}
	snapshot.Report(context.WithValue(ctx, key{}, 1), "10:20:", 0) // as through decorators
	if got := c.Snapshot().String(); got != "10:20:" {
		t.Errorf("collected %q", got)
	}

	// An answer made of two reads has no snapshot, even if they agree.
	snapshot.Report(ctx, "10:20:", 0)
	if got := c.Snapshot(); !got.IsZero() {
		t.Errorf("two reads are stamped %s", got)
	}

	ctx, c = snapshot.Collect(t.Context())
	snapshot.Report(ctx, "nonsense", 0)
	if got := c.Snapshot(); !got.IsZero() {
		t.Errorf("nonsense is the stamp %s", got)
	}

	ctx, c = snapshot.Collect(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { snapshot.Report(ctx, "10:20:", 0); c.Snapshot() })
	}
	wg.Wait()
}

func TestIncludes(t *testing.T) {
	parse := func(text string, server snapshot.Server) snapshot.Snapshot {
		s, err := snapshot.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return s.On(server)
	}
	for _, c := range []struct {
		later, earlier string
		want           bool
	}{
		{"10:10:", "10:10:", true},
		{"11:11:", "10:10:", true},
		{"10:10:", "11:11:", false},
		{"10:20:10,15", "10:20:10,15", true},
		{"10:20:10", "10:20:10,15", true},
		{"10:20:10,15", "10:20:10", false}, // 15 was still running
		{"10:30:10,25", "10:20:10", true},  // 25 began after the earlier one
		{"15:30:15", "10:20:10,15", true},
		{"15:30:16", "10:20:10,15", false},
	} {
		if got := parse(c.later, 1).Includes(parse(c.earlier, 1)); got != c.want {
			t.Errorf("%s includes %s: %v", c.later, c.earlier, got)
		}
		if parse(c.later, 2).Includes(parse(c.earlier, 1)) {
			t.Errorf("%s includes %s of another server", c.later, c.earlier)
		}
	}
}

// TestStandby: a read of a standby has no stamp.
func TestStandby(t *testing.T) {
	ctx, c := snapshot.Collect(t.Context())
	snapshot.Report(ctx, "10:20:", 7)
	if c.Standby() || c.Snapshot().Server() != 7 {
		t.Errorf("%v, server %d", c.Standby(), c.Snapshot().Server())
	}
	snapshot.ReportStandby(ctx)
	if !c.Standby() || !c.Snapshot().IsZero() {
		t.Errorf("a standby has the stamp %s", c.Snapshot())
	}
}
