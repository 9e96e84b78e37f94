package feed

import (
	"crypto/sha256"
	"encoding/binary"
)

// A Kind is a kind of topics.
type Kind uint8

// The kinds of topics.
const (
	Key      Kind = iota // a key
	KeysOf               // the keys of an organisation
	NewKeys              // keys that were not there: a single topic
	Plan                 // the plan of an organisation
	NewPlans             // plans that were not there: a single topic
	Tier                 // the plans of a tier
	kinds
)

// A Topic is what an announcement is about. Two subjects may share a topic by chance; then one
// of them is read again without need.
type Topic struct {
	kind Kind
	id   uint64
}

// KeyTopic returns the topic of a key by the first 8 bytes of its hash, big-endian.
func KeyTopic(id uint64) Topic { return Topic{Key, id} }

// KeysOfTopic returns the topic of all keys of an organisation.
func KeysOfTopic(orgID string) Topic { return Topic{KeysOf, word(orgID)} }

// NewKeysTopic returns the topic of all keys that were not there.
func NewKeysTopic() Topic { return Topic{kind: NewKeys} }

// PlanTopic returns the topic of an organisation's plan.
func PlanTopic(orgID string) Topic { return Topic{Plan, word(orgID)} }

// NewPlansTopic returns the topic of all plans that were not there.
func NewPlansTopic() Topic { return Topic{kind: NewPlans} }

// TierTopic returns the topic of all plans of a tier.
func TierTopic(name string) Topic { return Topic{Tier, word(name)} }

// word returns what announcements say in place of a name: the first 8 bytes of its SHA-256.
// The triggers of the migrations do the same.
func word(name string) uint64 {
	var buf [64]byte // a conversion would allocate
	sum := sha256.Sum256(append(buf[:0], name...))
	return binary.BigEndian.Uint64(sum[:])
}

// A Cell is one of 4,096 groups of topics.
type Cell uint16

const cells = 4096

// Cell returns the cell of a topic: see [Log.Epoch].
func (t Topic) Cell() Cell { return Cell(t.id % cells) }
