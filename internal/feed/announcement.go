package feed

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/trackpilots/apikey/internal/clock"
)

// Channel is the NOTIFY channel of the migrations.
const Channel = "apikey_changes"

// The forms of announcements: "key <xid> <first 8 bytes of the hash, in hex>",
// "plan <xid> <organisation>", "tier <xid> <name>", "keys <xid>", "plans <xid>",
// "all <xid>", "beat <xid>".
const (
	kindKey   = "key"
	kindPlan  = "plan"
	kindTier  = "tier"
	kindKeys  = "keys"
	kindPlans = "plans"
	kindAll   = "all"
	kindBeat  = "beat"
)

type announcement struct {
	kind    string
	xid     uint64
	subject string
	key     uint64 // the subject of kindKey as a number
}

func parse(payload string) (a announcement, err error) {
	kind, rest, _ := strings.Cut(payload, " ")
	xidText, subject, more := strings.Cut(rest, " ")
	a.kind, a.subject = kind, subject
	a.xid, err = strconv.ParseUint(xidText, 10, 64)
	known := a.xid != 0
	switch kind {
	case kindKey:
		if a.key, _ = strconv.ParseUint(subject, 16, 64); fmt.Sprintf("%016x", a.key) != subject {
			known = false
		}
	case kindPlan, kindTier:
		known = known && more
	case kindKeys, kindPlans, kindAll, kindBeat:
		known = known && !more
	default:
		known = false
	}
	if err != nil || !known {
		return announcement{}, fmt.Errorf("an announcement of unknown form: %q", payload)
	}
	return a, nil
}

// enter adds the announcement to log.
func (a announcement) enter(log *Log, now clock.Instant) {
	switch a.kind {
	case kindKey:
		log.Announce(KeyTopic(a.key), a.xid, now)
	case kindPlan:
		log.Announce(PlanTopic(a.subject), a.xid, now)
	case kindTier:
		log.Announce(TierTopic(a.subject), a.xid, now)
	case kindKeys:
		log.AnnounceAll(Key, a.xid, now)
	case kindPlans:
		log.AnnounceAll(Plan, a.xid, now)
	case kindAll:
		log.AnnounceAll(Key, a.xid, now)
		log.AnnounceAll(Plan, a.xid, now)
	}
}
