// Package table is the cache's map in memory. It is bounded and safe for concurrent use. A
// hit takes no lock and writes at most one flag. When the table is full, SIEVE chooses what
// to evict: entries that were not used since its hand last passed (Zhang et al., NSDI 2024,
// https://cachemon.github.io/SIEVE-website/). Memory grows with the number of entries.
package table

import (
	"sync"
	"sync/atomic"
)

const minBuckets = 64 // a power of two

// A Table maps K to *V. Values are shared and must be treated as immutable.
type Table[K comparable, V any] struct {
	hash    func(K) uint64
	limit   int
	buckets atomic.Pointer[[]bucket[K, V]]

	mu             sync.Mutex // held to change the fields below, or a chain
	size           int
	newest, oldest *entry[K, V]
	hand           *entry[K, V] // the next candidate for eviction; nil: the oldest
}

// A bucket is a chain of entries whose hashes end in the same bits.
type bucket[K comparable, V any] struct{ first atomic.Pointer[entry[K, V]] }

type entry[K comparable, V any] struct {
	key          K
	value        atomic.Pointer[V]
	next         atomic.Pointer[entry[K, V]] // in the chain
	newer, older *entry[K, V]
	used         atomic.Bool // since the hand passed
}

// New returns a table of at most limit entries; if limit is zero or negative, it stays
// empty. The low bits of the hash must be evenly distributed.
func New[K comparable, V any](limit int, hash func(K) uint64) *Table[K, V] {
	t := &Table[K, V]{hash: hash, limit: limit}
	buckets := make([]bucket[K, V], minBuckets)
	t.buckets.Store(&buckets)
	return t
}

// Get returns the value of key, or nil.
func (t *Table[K, V]) Get(key K) *V {
	for e := t.bucket(key).first.Load(); e != nil; e = e.next.Load() {
		if e.key == key {
			if !e.used.Load() { // a write would take the cache line from all other cores
				e.used.Store(true)
			}
			return e.value.Load()
		}
	}
	return nil // grow may be moving the entry: that is a miss, too
}

// Put sets the value of key. If the table is full and key is new, it evicts an entry.
func (t *Table[K, V]) Put(key K, value *V) {
	if t.limit <= 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for e := t.bucket(key).first.Load(); e != nil; e = e.next.Load() {
		if e.key == key {
			e.value.Store(value)
			return
		}
	}
	if t.size >= t.limit {
		t.evict()
	}
	if t.size >= len(*t.buckets.Load()) {
		t.grow()
	}
	e := &entry[K, V]{key: key, older: t.newest}
	e.value.Store(value)
	b := t.bucket(key)
	e.next.Store(b.first.Load())
	b.first.Store(e)
	if t.newest != nil {
		t.newest.newer = e
	} else {
		t.oldest = e
	}
	t.newest = e
	t.size++
}

// Delete removes key.
func (t *Table[K, V]) Delete(key K) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for e := t.bucket(key).first.Load(); e != nil; e = e.next.Load() {
		if e.key == key {
			t.remove(e)
			return
		}
	}
}

// Len returns the number of entries.
func (t *Table[K, V]) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size
}

// evict removes one entry. The caller holds the lock, and the table is not empty.
func (t *Table[K, V]) evict() {
	e := t.hand
	for {
		if e == nil {
			e = t.oldest
		}
		if !e.used.Load() {
			break
		}
		e.used.Store(false)
		e = e.newer
	}
	t.hand = e // remove moves it on
	t.remove(e)
}

// remove removes e. The caller holds the lock. Readers that are at e can go on along its
// chain.
func (t *Table[K, V]) remove(e *entry[K, V]) {
	link := &t.bucket(e.key).first
	for link.Load() != e {
		link = &link.Load().next
	}
	link.Store(e.next.Load())

	if t.hand == e {
		t.hand = e.newer
	}
	if e.newer != nil {
		e.newer.older = e.older
	} else {
		t.newest = e.older
	}
	if e.older != nil {
		e.older.newer = e.newer
	} else {
		t.oldest = e.newer
	}
	t.size--
}

// grow doubles the number of buckets. The caller holds the lock. A reader that is at an
// entry while it is moved may follow it into another chain and miss. It does not go round
// in circles, since an entry leads only to entries that were moved before it.
func (t *Table[K, V]) grow() {
	buckets := make([]bucket[K, V], 2*len(*t.buckets.Load()))
	for e := t.newest; e != nil; e = e.older {
		b := &buckets[t.hash(e.key)&uint64(len(buckets)-1)]
		e.next.Store(b.first.Load())
		b.first.Store(e)
	}
	t.buckets.Store(&buckets)
}

func (t *Table[K, V]) bucket(key K) *bucket[K, V] {
	buckets := *t.buckets.Load()
	return &buckets[t.hash(key)&uint64(len(buckets)-1)]
}
