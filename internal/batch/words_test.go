package batch_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trackpilots/apikey/internal/batch"
	"github.com/trackpilots/apikey/internal/outage"
)

// TestWords: who was never sent takes the word of all whom he has waited for: an outage only
// if each of them was away, and at least one said so.
func TestWords(t *testing.T) {
	const late, never = budget / 4, time.Hour
	away, busy := errors.New("refused"), outage.New(outage.Busy, "no place")
	type word struct {
		after time.Duration
		err   error // nil: answered
	}
	for name, c := range map[string]struct {
		words [2]word // of the batches that are running
		want  error
		took  time.Duration
	}{
		"away and away":               {[2]word{{budget, away}, {budget, away}}, batch.ErrSilent, budget},
		"away and busy":               {[2]word{{budget, away}, {budget, busy}}, batch.ErrWaited, budget},
		"away at once, busy late":     {[2]word{{budget, away}, {budget + late, busy}}, batch.ErrWaited, budget + late},
		"away and answered":           {[2]word{{budget, away}, {budget, nil}}, batch.ErrWaited, budget},
		"away, and answered late":     {[2]word{{budget, away}, {budget + late, nil}}, batch.ErrWaited, budget + late},
		"busy and busy":               {[2]word{{budget, busy}, {budget, busy}}, batch.ErrWaited, budget},
		"answered and answered":       {[2]word{{budget, nil}, {budget, nil}}, batch.ErrWaited, budget},
		"away a little late":          {[2]word{{budget + late, away}, {budget + late, away}}, batch.ErrSilent, budget + late},
		"busy a little late":          {[2]word{{budget + late, busy}, {budget + late, busy}}, batch.ErrWaited, budget + late},
		"no word":                     {[2]word{{never, away}, {never, away}}, batch.ErrWaited, budget + budget/2},
		"one is away, no other word":  {[2]word{{budget, away}, {never, away}}, batch.ErrSilent, budget + budget/2},
		"one is busy, no other word":  {[2]word{{budget, busy}, {never, away}}, batch.ErrWaited, budget},
		"ours, which a panic must be": {[2]word{{budget, away}, {budget, outage.New(outage.Ours, "no")}}, batch.ErrWaited, budget},
	} {
		for _, n := range []int{1, 5, 20, 300} {
			t.Run(fmt.Sprintf("%s, %d wait", name, n), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var stats batch.Stats
					b := batch.New(batch.Limits{AtOnce: 2, Size: 1000, Queue: 1000, Budget: budget}, &stats,
						func(_ context.Context, keys []int) ([]int, error) {
							if keys[0] >= 2 { // those who wait, and are late
								time.Sleep(never)
								return keys, nil
							}
							time.Sleep(c.words[keys[0]].after)
							return keys, c.words[keys[0]].err
						})
					for key := range 2 {
						go func() { _, _ = b.Do(key, true) }()
						synctest.Wait()
					}
					answers := make(chan answer, n)
					for i := range n {
						go func() {
							start := time.Now()
							v, err := b.Do(2+i, i%2 == 0)
							answers <- answer{v, v, err, time.Since(start)}
						}()
					}
					for range n {
						if a := <-answers; !errors.Is(a.err, c.want) || a.took != c.took {
							t.Errorf("%v after %v, want %v after %v", a.err, a.took, c.want, c.took)
						}
					}
					want := uint64(n)
					if errors.Is(c.want, batch.ErrSilent) {
						want = 0
					}
					if got := stats.Waited.Load(); got != want {
						t.Errorf("%d are counted as having waited, want %d", got, want)
					}
					time.Sleep(2 * never) // for those that never end
				})
			})
		}
	}
}

// TestLateLeaveTheQueue: who has waited for too long is not asked for any longer, and takes
// no place in the queue.
func TestLateLeaveTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var batches [][]int
		var stats batch.Stats
		b := batch.New(batch.Limits{AtOnce: 1, Size: 100, Queue: 5, Budget: budget}, &stats,
			func(_ context.Context, keys []int) ([]int, error) { // does not heed its context
				batches = append(batches, slices.Clone(keys))
				<-release
				return keys, nil
			})
		errs := make(chan error, 100)
		ask := func(keys ...int) {
			for _, key := range keys {
				go func() {
					_, err := b.Do(key, false)
					errs <- err
				}()
				synctest.Wait()
			}
		}
		ask(0, 1, 2, 3, 4, 5)
		for range 5 {
			if err := <-errs; !errors.Is(err, batch.ErrWaited) {
				t.Errorf("%v, want ErrWaited", err)
			}
		}
		ask(11, 12, 13, 14, 15)
		close(release)
		for range 6 {
			if err := <-errs; err != nil {
				t.Errorf("there was room in the queue: %v", err)
			}
		}
		if got := fmt.Sprint(batches); got != "[[0] [11 12 13 14 15]]" {
			t.Errorf("asked for %s", got)
		}
	})
}

// TestGoexit: what ends the goroutine of a batch is an error, and no outage. Nobody waits for
// ever, and the place is given back.
func TestGoexit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var stats batch.Stats
		well := false
		b := batch.New(batch.Limits{AtOnce: 1, Size: 2, Queue: 100, Budget: budget}, &stats,
			func(_ context.Context, keys []int) ([]int, error) {
				time.Sleep(time.Millisecond)
				if !well {
					runtime.Goexit()
				}
				return keys, nil
			})
		errs := make(chan error, 20)
		for i := range cap(errs) {
			go func() { _, err := b.Do(i, false); errs <- err }()
		}
		for range cap(errs) {
			err := <-errs
			if err == nil || !strings.Contains(err.Error(), "Goexit") || outage.Of(err) != outage.Ours {
				t.Errorf("%v, want the error of what did not return", err)
			}
		}
		well = true
		if v, err := b.Do(7, false); v != 7 || err != nil {
			t.Errorf("afterwards: %v, %v", v, err)
		}
	})
	_, err := batch.Run(func() (int, error) { panic("no") })
	if err == nil || err.Error() != "panic: no" || outage.Of(err) != outage.Ours {
		t.Errorf("a panic is %v", err)
	}
}
