package bench

// The memory of the cache beside others that it could have been: how much of a load
// each of them answers, and how long a look takes.

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/maypok86/otter/v2"

	"github.com/trackpilots/apikey/internal/table"
)

type hash = [32]byte

type record [128]byte

// A memory holds records by the hash of a key.
type memory interface {
	Get(hash) *record
	Put(hash, *record)
}

type otterMemory struct{ *otter.Cache[hash, *record] }

func (m otterMemory) Get(h hash) *record {
	r, _ := m.GetIfPresent(h)
	return r
}

func (m otterMemory) Put(h hash, r *record) { m.Set(h, r) }

// An unbounded memory is sync.Map, which forgets nothing: for its time only.
type unbounded struct{ sync.Map }

func (m *unbounded) Get(h hash) *record {
	r, ok := m.Load(h)
	if !ok {
		return nil
	}
	return r.(*record)
}

func (m *unbounded) Put(h hash, r *record) { m.Store(h, r) }

// A locked memory is a map behind a lock, which forgets nothing.
type locked struct {
	mu sync.RWMutex
	m  map[hash]*record
}

func (m *locked) Get(h hash) *record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.m[h]
}

func (m *locked) Put(h hash, r *record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.m[h] = r
}

var memories = []struct {
	name    string
	bounded bool
	make    func(size int) memory
}{
	{"internal/table (SIEVE)", true, func(size int) memory {
		return table.New[hash, record](size, func(h hash) uint64 { return binary.BigEndian.Uint64(h[:]) })
	}},
	{"otter (W-TinyLFU)", true, func(size int) memory {
		return otterMemory{otter.Must(&otter.Options[hash, *record]{MaximumSize: size})}
	}},
	{"sync.Map, unbounded", false, func(int) memory { return new(unbounded) }},
	{"RWMutex and map, unbounded", false, func(int) memory { return &locked{m: map[hash]*record{}} }},
}

// hashes are those of n keys, in no order.
func hashes(n int) []hash {
	list := make([]hash, n)
	for i := range list {
		list[i] = sha256.Sum256(fmt.Append(nil, i))
	}
	return list
}

// TestHitRatio: the share of requests that each memory of 32,768 entries answers.
// Ours must not be more than a point behind, and must lose nothing while there is room.
func TestHitRatio(t *testing.T) {
	const size = 32_768
	for _, load := range []struct {
		name   string
		skew   float64 // of Zipf; 0: uniform
		keys   int
		behind float64 // points that ours may be behind
	}{
		{"uniform, 10,000 keys", 0, 10_000, 0},
		{"uniform, 24,000 keys", 0, 24_000, 0},
		{"uniform, 32,000 keys", 0, 32_000, 0},
		{"uniform, 64,000 keys", 0, 64_000, 1},
		{"Zipf 1.05, 100,000 keys", 1.05, 100_000, 1},
		{"Zipf 0.9, 100,000 keys", 0.9, 100_000, 1},
		{"Zipf 0.9, 1,000,000 keys", 0.9, 1_000_000, 1},
	} {
		keys, choose := hashes(load.keys), newChoice(load.skew, load.keys)
		ratios := map[string]float64{}
		line := ""
		for _, m := range memories {
			if !m.bounded {
				continue
			}
			mem, r := m.make(size), rand.New(rand.NewPCG(1, 2))
			hits, asked := 0, 60_000
			if *write {
				asked = min(10*load.keys, 1_000_000)
			}
			if load.keys <= size {
				for _, h := range keys {
					mem.Put(h, new(record))
				}
			}
			for n := range 2 * asked { // the first half fills it
				h := keys[choose.next(r)]
				switch {
				case mem.Get(h) == nil:
					mem.Put(h, new(record))
				case n >= asked:
					hits++
				}
			}
			ratios[m.name] = 100 * float64(hits) / float64(asked)
			line += fmt.Sprintf("  %s %.2f %%", m.name, ratios[m.name])
		}
		t.Logf("%-26s%s", load.name, line)
		if ours, other := ratios[memories[0].name], ratios[memories[1].name]; ours < other-load.behind {
			t.Errorf("%s: %.2f %%, otter %.2f %%", load.name, ours, other)
		}
	}
}

// BenchmarkMemory is one look for a key that is there.
func BenchmarkMemory(b *testing.B) {
	for _, n := range []int{1, 1000, 100_000} {
		keys, choose := hashes(n), newChoice(1.05, n)
		order := make([]hash, 1<<18)
		r := rand.New(rand.NewPCG(1, 2))
		for i := range order {
			order[i] = keys[choose.next(r)]
		}
		for _, m := range memories {
			mem := m.make(131_072)
			for _, h := range keys {
				mem.Put(h, new(record))
			}
			b.Run(fmt.Sprintf("%d keys/%s", n, m.name), func(b *testing.B) {
				for i := 0; b.Loop(); i++ {
					if mem.Get(order[i%len(order)]) == nil {
						b.Fatal("lost")
					}
				}
			})
			b.Run(fmt.Sprintf("%d keys/%s, all cores", n, m.name), func(b *testing.B) {
				var workers atomic.Int64
				b.RunParallel(func(pb *testing.PB) {
					for i := int(workers.Add(1)) * len(order) / (2 * runtime.GOMAXPROCS(0)); pb.Next(); i++ {
						if mem.Get(order[i%len(order)]) == nil {
							b.Error("lost")
							return
						}
					}
				})
			})
		}
	}
}
