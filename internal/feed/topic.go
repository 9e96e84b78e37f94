package feed

import "hash/maphash"

// A Kind is a kind of topics.
type Kind uint8

// The kinds of topics: one key, the plan of one organisation, the plans of one tier.
const (
	Key Kind = iota
	Plan
	Tier
	kinds
)

// A Topic is what an announcement is about. Two subjects may share one, which costs
// a needless read and nothing else.
type Topic struct {
	kind Kind
	id   uint64
}

var seed = maphash.MakeSeed()

// KeyTopic returns the topic of a key by the first 8 bytes of its hash, big-endian.
func KeyTopic(id uint64) Topic { return Topic{Key, id} }

// PlanTopic returns the topic of an organisation's plan.
func PlanTopic(orgID string) Topic { return Topic{Plan, maphash.String(seed, orgID)} }

// TierTopic returns the topic of all plans of a tier.
func TierTopic(name string) Topic { return Topic{Tier, maphash.String(seed, name)} }

// A Cell is one of some thousand groups of topics.
type Cell uint16

const cells = 4096

// Cell returns the cell that a topic is in: see [Log.Epoch].
func (t Topic) Cell() Cell { return Cell(t.id % cells) }
