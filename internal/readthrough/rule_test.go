package readthrough

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/trackpilots/apikey/internal/clock"
	"github.com/trackpilots/apikey/internal/feed"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/snapshot"
)

// facts are a kind of facts with a word about each number. One is good.
var facts = Kind[uint64, string]{
	Name: func(subject uint64) string { return fmt.Sprint("fact ", subject) },
	Hash: func(subject uint64) uint64 { return subject },
	Topics: func(subject uint64, _ *string) [3]feed.Topic {
		own := feed.KeyTopic(subject)
		return [3]feed.Topic{own, own, own}
	},
	Admits: func(word *string, _ time.Time) bool { return *word == "good" },
	Same:   func(a, b *string) bool { return *a == *b },
	Append: func(b []byte, word *string) []byte { return sealed.AppendString(b, *word) },
	Decode: func(d *sealed.Decoder, rec *Record[string]) { rec.Value = d.String() },
}

func parseSnapshot(t testing.TB, text string) snapshot.Snapshot {
	t.Helper()
	if text == "" {
		return snapshot.Snapshot{}
	}
	s, err := snapshot.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRule: when a record may decide a request. The feed's session began when
// transaction 50 had ended, and a second ago all changes were known.
func TestRule(t *testing.T) {
	const (
		refusalLimit = time.Second
		maxStaleness = 10 * time.Second
		refreshAfter = 5 * time.Minute
	)
	now := time.Now()
	topic := feed.KeyTopic(1)
	ago := func(d time.Duration) clock.Instant { return clock.At(now.Add(-d)) }
	begin := func(l *feed.Log) { l.Begin("history", parseSnapshot(t, "51:51:"), ago(100*time.Second)) }
	renew := func(d time.Duration) func(*feed.Log) { return func(l *feed.Log) { l.Renew(ago(d)) } }
	live := func(l *feed.Log) { begin(l); l.Renew(ago(time.Second)) }
	then := func(steps ...func(*feed.Log)) func(*feed.Log) {
		return func(l *feed.Log) {
			for _, step := range steps {
				step(l)
			}
		}
	}
	announce := func(xid uint64) func(*feed.Log) {
		return func(l *feed.Log) { l.Announce(topic, xid, clock.At(time.Now())) }
	}
	announceAll := func(xid uint64) func(*feed.Log) {
		return func(l *feed.Log) { l.AnnounceAll(feed.Key, xid, clock.At(time.Now())) }
	}
	end := func(l *feed.Log) { l.End(errors.New("gone")) }
	nothing := func(*feed.Log) {}

	type limits struct{ admits, refuses time.Duration } // the record is usable below this age
	never := limits{}
	byAge := limits{maxStaleness, refusalLimit}
	vouched := limits{refreshAfter, refreshAfter}
	for name, c := range map[string]struct {
		feed func(*feed.Log)
		snap string
		want limits
	}{
		"no feed":                           {nothing, "60:60:", byAge},
		"no feed, no stamp":                 {nothing, "", byAge},
		"no feed, announced, seen":          {announce(55), "60:60:", byAge},
		"no feed, announced, not seen":      {announce(60), "60:60:", never},
		"live":                              {live, "60:60:", vouched},
		"live, no stamp":                    {live, "", byAge},
		"live, no stamp, announced":         {then(live, announce(55)), "", byAge},
		"nothing heard yet":                 {begin, "60:60:", byAge},
		"live, one not seen from before":    {live, "40:60:50", byAge},
		"live, read before the session":     {live, "50:50:", byAge},
		"live, read as it began":            {live, "51:51:", vouched},
		"announced, seen":                   {then(live, announce(59)), "60:60:", vouched},
		"announced, in progress at read":    {then(live, announce(57)), "55:60:57", never},
		"announced, later at read":          {then(live, announce(60)), "55:60:57", never},
		"announced, ended at read":          {then(live, announce(58)), "55:60:57", vouched},
		"two, the later one seen only":      {then(live, announce(58), announce(57)), "55:60:57", never},
		"two, the earlier one seen only":    {then(live, announce(57), announce(58)), "55:59:57", never},
		"a larger one before":               {then(live, announce(70), announce(58)), "55:60:57", never},
		"another subject":                   {then(live, func(l *feed.Log) { l.Announce(feed.KeyTopic(2), 70, clock.At(time.Now())) }), "60:60:", vouched},
		"a plan":                            {then(live, func(l *feed.Log) { l.Announce(feed.PlanTopic("org_1"), 70, clock.At(time.Now())) }), "60:60:", vouched},
		"a tier":                            {then(live, func(l *feed.Log) { l.Announce(feed.TierTopic(""), 70, clock.At(time.Now())) }), "60:60:", vouched},
		"all plans":                         {then(live, func(l *feed.Log) { l.AnnounceAll(feed.Plan, 70, clock.At(time.Now())) }), "60:60:", vouched},
		"everything, seen":                  {then(live, announceAll(59)), "60:60:", vouched},
		"everything, not seen":              {then(live, announceAll(60)), "60:60:", never},
		"session ended":                     {then(live, end), "60:60:", vouched}, // until the lease runs out
		"session ended long ago":            {then(begin, renew(11*time.Second), end), "60:60:", byAge},
		"session ended, announced before":   {then(live, announce(60), end), "60:60:", never},
		"session ended, read before it":     {then(live, end), "50:50:", byAge},
		"new session, seen by the old only": {then(begin, renew(11*time.Second), end, func(l *feed.Log) { l.Begin("history", parseSnapshot(t, "70:70:"), ago(0)) }, renew(0)), "60:60:", byAge},
		"another server":                    {func(l *feed.Log) { l.Begin("history", parseSnapshot(t, "51:51:").On(7), ago(0)); l.Renew(ago(0)) }, "60:60:", byAge},
		"another history, announced":        {then(func(l *feed.Log) { l.Begin("other", parseSnapshot(t, "51:51:").On(7), ago(0)) }, renew(0), announce(70)), "60:60:", byAge},
		"lease run out":                     {then(begin, renew(10*time.Second)), "60:60:", byAge},
		"lease about to run out":            {then(begin, renew(10*time.Second-1)), "60:60:", limits{refreshAfter, refusalLimit}},
		"half of the lease gone":            {then(begin, renew(5*time.Second)), "60:60:", limits{refreshAfter, refusalLimit}},
		"almost half of the lease gone":     {then(begin, renew(5*time.Second-1)), "60:60:", vouched},
	} {
		t.Run(name, func(t *testing.T) {
			s := &Shared{
				Log: feed.NewLog(maxStaleness, time.Hour, slog.New(slog.DiscardHandler)),
				Limits: Limits{
					MaxRefusalStaleness: refusalLimit, MaxStaleness: maxStaleness, RefreshAfter: refreshAfter,
				},
			}
			layer := NewLayer(s, facts, 0, 0)
			c.feed(s.Log)
			stamp := Stamp{Snapshot: parseSnapshot(t, c.snap)}
			for what, record := range map[string]struct {
				value string
				found bool
				limit time.Duration
			}{
				"admits":  {"good", true, c.want.admits},
				"refuses": {"bad", true, c.want.refuses},
				"absent":  {"", false, c.want.refuses},
			} {
				for _, age := range []time.Duration{
					0, 1, refusalLimit - 1, refusalLimit, maxStaleness - 1, maxStaleness, 100 * time.Second, refreshAfter - 1, refreshAfter, time.Hour,
				} {
					stamp.ReadAt = clock.At(now.Add(-age))
					rec := layer.NewRecord(1, stamp)
					rec.Value, rec.Found = record.value, record.found
					want := age < record.limit
					if got := layer.Usable(1, rec, clock.At(now)); got != want {
						t.Errorf("%s, %v old: usable %v, want %v", what, age, got, want)
					}
				}
			}
		})
	}
}
