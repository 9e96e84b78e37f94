// Package snapshot is the stamp on every record that is read from PostgreSQL: the snapshot
// of the reading statement, as pg_current_snapshot() prints it. The stamp tells which
// transactions a record has seen, however the record came here and however late.
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

// A Snapshot is a parsed pg_snapshot with its server. The zero value means "no stamp" and
// has seen no transaction. Snapshots are immutable.
type Snapshot struct {
	server     Server
	xmin, xmax uint64    // all transactions before xmin have ended, and none from xmax on
	xip        *[]uint64 // transactions in progress, xmin <= x < xmax, ascending; nil: none, which is common
}

// A Server identifies tables, their database, and the run of the server that they are on.
// Transaction ids of two runs are not compared. 0 means unknown.
type Server int64

// On returns s with another server.
func (s Snapshot) On(server Server) Snapshot {
	s.server = server
	return s
}

// Server returns the server of s.
func (s Snapshot) Server() Server { return s.server }

// XMax returns the first transaction id that was not assigned when s was taken.
func (s Snapshot) XMax() uint64 { return s.xmax }

// Includes reports whether s has seen every transaction that other has seen. A later snapshot
// of a server includes an earlier one.
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

// ParseOptional is like Parse, and returns the zero Snapshot for "".
func ParseOptional(s string) (Snapshot, error) {
	if s == "" {
		return Snapshot{}, nil
	}
	return Parse(s)
}

// parseXID reads a decimal xid8 only as PostgreSQL prints it, so that String is the inverse
// of Parse.
func parseXID(s string) (uint64, error) {
	x, err := strconv.ParseUint(s, 10, 64)
	if err == nil && s[0] == '0' && s != "0" {
		return 0, strconv.ErrSyntax
	}
	return x, err
}

// String returns what Parse reads; "" for the zero Snapshot.
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

// IsZero reports whether s is the zero Snapshot.
func (s Snapshot) IsZero() bool { return s.xmin == 0 }

// Sees reports whether s has seen transaction x, if x was committed.
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

// A Collector receives the stamp of a read. It is in the context of the read and not in its
// result, so that the stamps of decorated stores arrive, and "absent" has a stamp, too.
type Collector struct {
	mu      sync.Mutex
	reads   int
	snap    Snapshot
	standby bool
	origin  Origin
}

// An Origin identifies tables as a Server does, also on a standby. 0 means unknown.
type Origin int64

type collectorKey struct{}

// Collect returns a context for one read, and the Collector that receives its stamp.
func Collect(ctx context.Context) (context.Context, *Collector) {
	c := new(Collector)
	return context.WithValue(ctx, collectorKey{}, c), c
}

// ReportStandby reports that a standby was read. There is no stamp: a standby lags behind,
// and its snapshots do not have running transactions.
func ReportStandby(ctx context.Context) {
	if c, ok := ctx.Value(collectorKey{}).(*Collector); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.standby = true
	}
}

// ReportOrigin reports which tables were read.
func ReportOrigin(ctx context.Context, origin Origin) {
	if c, ok := ctx.Value(collectorKey{}).(*Collector); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.origin = origin
	}
}

// Report reports the pg_current_snapshot() of the reading statement and the server. It does
// nothing if ctx has no Collector.
func Report(ctx context.Context, text string, server Server) {
	c, ok := ctx.Value(collectorKey{}).(*Collector)
	if !ok {
		return
	}
	snap, err := Parse(text)
	if err != nil {
		snap = Snapshot{} // no stamp
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	c.snap = snap.On(server)
}

// Snapshot returns the stamp. It is zero unless exactly one statement has reported: a result
// of several statements has no single snapshot.
func (c *Collector) Snapshot() Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reads != 1 || c.standby {
		return Snapshot{}
	}
	return c.snap
}

// Origin returns which tables were read, or 0.
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
