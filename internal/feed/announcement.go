package feed

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/trackpilots/apikey/internal/clock"
)

// Channel is the NOTIFY channel of the migrations.
const Channel = "apikey_changes"

// kindBeat is an announcement of no change. Kinds that begin with "?" may be ignored by those
// who do not know them.
const kindBeat = "?beat"

// An announcement is words: its kind, a transaction, a subject if the kind has one. Later
// versions may add words, and kinds.
type announcement struct {
	kind    string
	xid     uint64
	subject uint64
	unknown bool // of a kind or form that this version does not know
}

// form is what the announcements of a kind say: that one topic has changed, or that everything
// of some kinds may have.
type form struct {
	one  bool
	what []Kind
}

// forms are those of the migrations.
var forms = map[string]form{
	"key":       {true, []Kind{Key}},
	"keys-of":   {true, []Kind{KeysOf}},
	"keys-new":  {false, []Kind{NewKeys}},
	"keys":      {false, []Kind{Key}},
	"plan":      {true, []Kind{Plan}},
	"plans-new": {false, []Kind{NewPlans}},
	"tier":      {true, []Kind{Tier}},
	"plans":     {false, []Kind{Plan}},
	"all":       {false, everything},
}

// everything has a topic of every record.
var everything = []Kind{Key, Plan}

// parse reads an announcement. Only one without a transaction is an error: nobody knows what
// it announces, or that it was heard.
func parse(payload string) (a announcement, err error) {
	words := strings.Split(payload, " ")
	if len(words) > 1 {
		a.xid, err = strconv.ParseUint(words[1], 10, 64)
	}
	if a.xid == 0 || err != nil {
		return announcement{}, fmt.Errorf("an announcement without a transaction: %q", payload)
	}
	a.kind = words[0]
	f, known := forms[a.kind]
	switch {
	case !known:
		a.unknown = !strings.HasPrefix(a.kind, "?")
	case f.one && len(words) > 2 && len(words[2]) == 16:
		a.subject, err = strconv.ParseUint(words[2], 16, 64)
		a.unknown = err != nil
	case f.one:
		a.unknown = true
	}
	return a, nil
}

// enter adds the announcement to log. What is unknown may concern everything.
func (a announcement) enter(log *Log, now clock.Instant) {
	f := forms[a.kind]
	if a.unknown {
		log.unknown.Add(1)
		f = form{what: everything}
	}
	for _, kind := range f.what {
		if f.one {
			log.Announce(Topic{kind, a.subject}, a.xid, now)
		} else {
			log.AnnounceAll(kind, a.xid, now)
		}
	}
}
