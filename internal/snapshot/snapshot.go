// Package snapshot is the stamp on every record that is read from Postgres: the
// snapshot that the reading statement ran in, as pg_current_snapshot() prints
// it. The stamp tells which transactions a record has seen, whatever way and
// however late the record arrived.
//
// https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
package snapshot

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// A Snapshot is a parsed pg_snapshot, and the server that it is of. The zero value is
// "no stamp": it has seen no transaction. Snapshots are immutable.
type Snapshot struct {
	server     Server
	xmin, xmax uint64    // all before xmin have ended; none from xmax on has
	xip        *[]uint64 // in progress, xmin <= x < xmax, ascending; nil: none, which is the rule and takes less memory
}

// A Server tells databases, and the runs of servers that they are on, apart. Transaction
// ids of two runs have to do with each other only if their histories are the same. 0 is
// not known.
type Server int64

// On returns s as a snapshot of a server.
func (s Snapshot) On(server Server) Snapshot {
	s.server = server
	return s
}

// Server returns the server that s is of.
func (s Snapshot) Server() Server { return s.server }

// XMax returns the first transaction id that no transaction had when s was taken.
func (s Snapshot) XMax() uint64 { return s.xmax }

// Includes reports whether s has seen all that other has seen. Of two snapshots of a
// server, the later one includes the earlier one.
func (s Snapshot) Includes(other Snapshot) bool {
	if s.server != other.server || s.xmax < other.xmax {
		return false
	}
	for _, x := range s.running() {
		if x < other.xmax && other.Sees(x) {
			return false
		}
	}
	return true
}

// Parse reads the text form "xmin:xmax:xip,xip,...".
func Parse(s string) (Snapshot, error) {
	minText, rest, ok1 := strings.Cut(s, ":")
	maxText, list, ok2 := strings.Cut(rest, ":")
	xmin, err1 := parseXID(minText)
	xmax, err2 := parseXID(maxText)
	if !ok1 || !ok2 || err1 != nil || err2 != nil || xmin == 0 || xmin > xmax {
		return Snapshot{}, fmt.Errorf("snapshot: %q is not xmin:xmax:xip_list", s)
	}
	snap := Snapshot{xmin: xmin, xmax: xmax}
	if list == "" {
		return snap, nil
	}
	xip := make([]uint64, 0, strings.Count(list, ",")+1)
	for item := range strings.SplitSeq(list, ",") {
		x, err := parseXID(item)
		if err != nil || x < xmin || x >= xmax || len(xip) > 0 && x <= xip[len(xip)-1] {
			return Snapshot{}, fmt.Errorf("snapshot: bad transaction %q in %q", item, s)
		}
		xip = append(xip, x)
	}
	snap.xip = &xip
	return snap, nil
}

// ParseOptional is Parse, but takes "" for the zero Snapshot, as String prints it.
func ParseOptional(s string) (Snapshot, error) {
	if s == "" {
		return Snapshot{}, nil
	}
	return Parse(s)
}

// parseXID reads a decimal xid8 in the one form that Postgres prints, so that
// Parse and String are each other's inverse.
func parseXID(s string) (uint64, error) {
	x, err := strconv.ParseUint(s, 10, 64)
	if err == nil && s[0] == '0' && s != "0" {
		return 0, strconv.ErrSyntax
	}
	return x, err
}

// String is the form that Parse reads; empty for the zero Snapshot.
func (s Snapshot) String() string {
	if s.IsZero() {
		return ""
	}
	b := strconv.AppendUint(nil, s.xmin, 10)
	b = append(b, ':')
	b = strconv.AppendUint(b, s.xmax, 10)
	b = append(b, ':')
	for i, x := range s.running() {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, x, 10)
	}
	return string(b)
}

// IsZero reports whether s is "no stamp".
func (s Snapshot) IsZero() bool { return s.xmin == 0 }

// Sees reports whether the effects of transaction x, once it has committed, are
// visible in s.
func (s Snapshot) Sees(x uint64) bool {
	if x < s.xmin {
		return true
	}
	if x >= s.xmax {
		return false
	}
	_, inProgress := slices.BinarySearch(s.running(), x)
	return !inProgress
}

func (s Snapshot) running() []uint64 {
	if s.xip == nil {
		return nil
	}
	return *s.xip
}

// A Collector receives the stamp of the read that is made under its context. It
// travels in the context, and not in the answer, so that stores wrapped in a
// caller's own decorators keep their stamps, and so that "absent" has one too.
type Collector struct {
	mu      sync.Mutex
	reads   int
	snap    Snapshot
	standby bool
	origin  Origin
}

// An Origin tells tables apart: those of one run of a server, in one database, found by
// one search_path. 0 is not known.
type Origin int64

type collectorKey struct{}

// Collect returns a context for one read, and the Collector of its stamp.
func Collect(ctx context.Context) (context.Context, *Collector) {
	c := new(Collector)
	return context.WithValue(ctx, collectorKey{}, c), c
}

// ReportStandby notes that the read under way is of a standby. It has no stamp: a
// standby lags, and its snapshots leave out running transactions.
func ReportStandby(ctx context.Context) {
	if c, ok := ctx.Value(collectorKey{}).(*Collector); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.standby = true
	}
}

// ReportOrigin notes which tables the read under way is of.
func ReportOrigin(ctx context.Context, origin Origin) {
	if c, ok := ctx.Value(collectorKey{}).(*Collector); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.origin = origin
	}
}

// Report stamps the read under way with text, the pg_current_snapshot() of the
// statement that read, and the server. Without a Collector in ctx it does nothing.
func Report(ctx context.Context, text string, server Server) {
	c, ok := ctx.Value(collectorKey{}).(*Collector)
	if !ok {
		return
	}
	snap, err := Parse(text)
	if err != nil {
		snap = Snapshot{} // an unreadable stamp is no stamp
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	c.snap = snap.On(server)
}

// Snapshot returns the collected stamp. It is zero unless exactly one read
// reported: an answer put together from several reads has no one snapshot.
func (c *Collector) Snapshot() Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reads != 1 || c.standby {
		return Snapshot{}
	}
	return c.snap
}

// Origin returns which tables were read; 0 if that was not reported.
func (c *Collector) Origin() Origin {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.origin
}

// Standby reports whether a standby was read.
func (c *Collector) Standby() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.standby
}
