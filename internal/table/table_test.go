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

func TestTable(t *testing.T) {
	tbl := table.New[uint64, int](16, identity)
	values := make([]int, 100)
	if tbl.Get(1) != nil {
		t.Error("an empty table answers")
	}
	for i := range 16 { // 4 sets of 4: all fit
		tbl.Put(uint64(i), &values[i])
	}
	for i := range 16 {
		if tbl.Get(uint64(i)) != &values[i] {
			t.Errorf("%d is lost although there was room", i)
		}
	}
	tbl.Put(5, &values[50])
	if tbl.Get(5) != &values[50] {
		t.Error("a newer value does not take the older one's place")
	}
	for _, other := range []uint64{1, 9, 13} { // the same set
		if tbl.Get(other) != &values[other] {
			t.Errorf("a newer value for 5 pushed out %d", other)
		}
	}
	tbl.Delete(5)
	tbl.Delete(5)
	tbl.Delete(77)
	if tbl.Get(5) != nil || tbl.Get(9) != &values[9] {
		t.Error("Delete removes too little or too much")
	}
}

// TestFull: a full set forgets something, and only as much as it must.
func TestFull(t *testing.T) {
	tbl := table.New[uint64, int](4, func(uint64) uint64 { return 0 })
	values := make([]int, 1000)
	for i := range values {
		tbl.Put(uint64(i), &values[i])
		if tbl.Get(uint64(i)) != &values[i] {
			t.Fatalf("%d is not there right after Put", i)
		}
		held := 0
		for j := range i + 1 {
			if tbl.Get(uint64(j)) != nil {
				held++
			}
		}
		if held != min(i+1, 4) {
			t.Fatalf("%d entries after %d Puts", held, i+1)
		}
	}
}

func TestSize(t *testing.T) {
	for size, want := range map[int]int{-1: 0, 0: 0, 1: 4, 4: 4, 5: 8, 8: 8, 9: 16, 100: 128} {
		tbl := table.New[uint64, int](size, identity)
		value, held := 0, 0
		for i := range uint64(1000) {
			tbl.Put(i, &value)
		}
		for i := range uint64(1000) {
			if tbl.Get(i) != nil {
				held++
			}
		}
		tbl.Delete(1)
		if held != want {
			t.Errorf("a table of %d holds %d, want %d", size, held, want)
		}
	}
}

func TestConcurrent(t *testing.T) {
	tbl := table.New[uint64, uint64](64, identity)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20_000 {
				k := rand.Uint64N(200)
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
}

func TestGetDoesNotAllocate(t *testing.T) {
	tbl := table.New[uint64, int](64, identity)
	tbl.Put(1, new(int))
	if n := testing.AllocsPerRun(100, func() { tbl.Get(1); tbl.Get(2) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
