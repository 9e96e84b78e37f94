package table_test

import (
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/trackpilots/apikey/internal/table"
	"github.com/trackpilots/apikey/internal/testservers"
)

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

func identity(k uint64) uint64 { return k }

// colliding puts every key in one chain.
func colliding(uint64) uint64 { return 0 }

func TestTable(t *testing.T) {
	for name, hash := range map[string]func(uint64) uint64{"spread": identity, "colliding": colliding} {
		t.Run(name, func(t *testing.T) {
			tbl := table.New[uint64, int](16, hash)
			values := make([]int, 100)
			if tbl.Get(1) != nil {
				t.Error("an empty table answers")
			}
			for i := range uint64(16) {
				tbl.Put(i, &values[i])
			}
			tbl.Put(5, &values[50])
			for i := range uint64(16) {
				want := &values[i]
				if i == 5 {
					want = &values[50]
				}
				if tbl.Get(i) != want {
					t.Errorf("%d is lost, or not the last value", i)
				}
			}
			for _, k := range []uint64{5, 5, 77, 0, 15} {
				tbl.Delete(k)
			}
			for i := range uint64(16) {
				if gone := i == 0 || i == 5 || i == 15; (tbl.Get(i) == nil) != gone {
					t.Errorf("Delete removes too little or too much: %d", i)
				}
			}
			if tbl.Len() != 13 {
				t.Errorf("%d entries, want 13", tbl.Len())
			}
		})
	}
}

// TestNothingLost: whatever the order and however often the buckets have grown,
// nothing goes while there is room.
func TestNothingLost(t *testing.T) {
	const limit = 100_000
	tbl := table.New[uint64, uint64](limit, func(k uint64) uint64 { return k * 0x9e3779b97f4a7c15 >> 32 })
	keys := make([]uint64, limit)
	for i := range keys {
		keys[i] = rand.Uint64()
		tbl.Put(keys[i], &keys[i])
	}
	for i, k := range keys {
		if tbl.Get(k) != &keys[i] {
			t.Fatalf("entry %d of %d is lost", i, limit)
		}
	}
	more := rand.Uint64()
	tbl.Put(more, &more)
	if tbl.Len() != limit || tbl.Get(more) == nil {
		t.Errorf("%d entries after one too many, want %d and the new one among them", tbl.Len(), limit)
	}
}

// TestSieve: what has been used since the hand passed stays, what has not goes,
// oldest first.
func TestSieve(t *testing.T) {
	tbl := table.New[uint64, int](4, identity)
	value := 0
	put := func(k uint64) { tbl.Put(k, &value) }
	want := func(keys ...uint64) {
		t.Helper()
		held := map[uint64]bool{}
		for k := range uint64(10) { // Len, and not Get: a look would count as a use
			before := tbl.Len()
			tbl.Delete(k)
			held[k] = tbl.Len() < before
		}
		for k := range uint64(10) {
			wanted := false
			for _, w := range keys {
				wanted = wanted || w == k
			}
			if held[k] != wanted {
				t.Errorf("%d is there: %v", k, held[k])
			}
		}
	}
	for k := range uint64(4) {
		put(k)
	}
	tbl.Get(0)
	tbl.Get(2)
	put(4) // the hand passes 0 and takes 1
	put(5) // it passes 2 and takes 3
	tbl.Get(4)
	put(6) // it passes 4 and takes 5
	want(0, 2, 4, 6)

	for k := range uint64(4) { // all used: the hand goes round, and takes the oldest
		put(k)
		tbl.Get(k)
	}
	put(9)
	want(1, 2, 3, 9)
}

func TestLimits(t *testing.T) {
	for _, limit := range []int{-1, 0, 1, 5, 63, 64, 65, 1000} {
		tbl := table.New[uint64, int](limit, identity)
		value := 0
		for i := range uint64(3000) {
			tbl.Put(i, &value)
			if (tbl.Get(i) == nil) != (limit <= 0) {
				t.Fatalf("limit %d: %d is not there right after Put", limit, i)
			}
		}
		if tbl.Len() != max(limit, 0) {
			t.Errorf("a table of %d holds %d", limit, tbl.Len())
		}
	}
}

func TestConcurrent(t *testing.T) {
	tbl := table.New[uint64, uint64](300, identity)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50_000 {
				k := rand.Uint64N(1000)
				switch rand.IntN(4) {
				case 0:
					tbl.Put(k, &k)
				case 1:
					tbl.Delete(k)
				default:
					if v := tbl.Get(k); v != nil && *v != k {
						t.Errorf("Get(%d) = %d", k, *v)
					}
				}
			}
		})
	}
	wg.Wait()
	for k := range uint64(1000) {
		tbl.Delete(k)
	}
	if tbl.Len() != 0 {
		t.Errorf("%d entries are left", tbl.Len())
	}
}

func TestGetDoesNotAllocate(t *testing.T) {
	tbl := table.New[uint64, int](64, identity)
	tbl.Put(1, new(int))
	if n := testing.AllocsPerRun(100, func() { tbl.Get(1); tbl.Get(2) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
