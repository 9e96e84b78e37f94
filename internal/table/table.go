// Package table is the in-process table of the cache: of a fixed size, safe for
// concurrent use, and without locks, so that a hit costs a few loads however
// many cores ask at once. It forgets when it is full. What an entry is worth is
// for the caller to judge.
package table

import (
	"math/bits"
	"math/rand/v2"
	"sync/atomic"
)

const ways = 4

// A Table maps K to *V. Values are shared and must be treated as immutable.
type Table[K comparable, V any] struct {
	hash func(K) uint64
	sets [][ways]atomic.Pointer[entry[K, V]]
}

type entry[K comparable, V any] struct {
	key   K
	value *V
}

// New returns a table of at least size slots, rounded up to a power of two; with
// a size of zero or less it holds nothing. The hash must spread its low bits.
func New[K comparable, V any](size int, hash func(K) uint64) *Table[K, V] {
	t := &Table[K, V]{hash: hash}
	if size > 0 {
		sets := (size + ways - 1) / ways
		t.sets = make([][ways]atomic.Pointer[entry[K, V]], 1<<bits.Len(uint(sets-1)))
	}
	return t
}

// Get returns what Put last stored under key, or nil.
func (t *Table[K, V]) Get(key K) *V {
	if len(t.sets) == 0 {
		return nil
	}
	set := t.set(key)
	for i := range set {
		if e := set[i].Load(); e != nil && e.key == key {
			return e.value
		}
	}
	return nil
}

// Put stores value under key: in the place of an older value, else in a free
// slot, else in the place of some other entry. Two concurrent calls for one key
// may leave either value.
func (t *Table[K, V]) Put(key K, value *V) {
	if len(t.sets) == 0 {
		return
	}
	set := t.set(key)
	free := -1
	for i := range set {
		e := set[i].Load()
		if e != nil && e.key == key {
			free = i
			break
		}
		if e == nil && free < 0 {
			free = i
		}
	}
	if free < 0 {
		free = rand.IntN(ways)
	}
	set[free].Store(&entry[K, V]{key, value})
}

// Delete forgets key.
func (t *Table[K, V]) Delete(key K) {
	if len(t.sets) == 0 {
		return
	}
	set := t.set(key)
	for i := range set {
		if e := set[i].Load(); e != nil && e.key == key {
			set[i].CompareAndSwap(e, nil)
		}
	}
}

func (t *Table[K, V]) set(key K) *[ways]atomic.Pointer[entry[K, V]] {
	return &t.sets[t.hash(key)&uint64(len(t.sets)-1)]
}
