package feed

import "hash/maphash"

// A Kind is a kind of topics.
type Kind uint8

// The kinds of topics: a key, the plan of an organisation, all plans of a tier.
const (
	Key Kind = iota
	Plan
	Tier
	kinds
)

// A Topic is what an announcement is about. Two subjects may share a topic by chance; then one
// of them is read again without need.
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

// A Cell is one of 4,096 groups of topics.
type Cell uint16

const cells = 4096

// Cell returns the cell of a topic: see [Log.Epoch].
func (t Topic) Cell() Cell { return Cell(t.id % cells) }
