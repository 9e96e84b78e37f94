package breaker_test

import (
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trackpilots/apikey/internal/breaker"
)

var errBroken, errExcluded = errors.New("broken"), errors.New("excluded")

// TestWhoTriesEnds: whatever ends the one who tries whether all is well again, another one
// may try.
func TestWhoTriesEnds(t *testing.T) {
	for name, end := range map[string]func() (int, error){
		"panic":    func() (int, error) { panic("no") },
		"Goexit":   func() (int, error) { runtime.Goexit(); return 0, nil },
		"excluded": func() (int, error) { return 0, errExcluded },
		"broken":   func() (int, error) { return 0, errBroken },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opened, closed := 0, 0
				b := breaker.New(2, func(err error) bool { return errors.Is(err, errExcluded) }, func() { opened++ }, func() { closed++ })
				do := func(f func() (int, error)) (value int, err error) {
					done := make(chan struct{})
					go func() {
						defer close(done)
						defer func() { _ = recover() }()
						value, err = breaker.Do(b, f)
					}()
					<-done
					return value, err
				}
				for _, f := range []func() (int, error){
					func() (int, error) { return 0, errBroken },
					func() (int, error) { return 0, errExcluded }, // no success in between
					func() (int, error) { return 0, errBroken },
				} {
					if _, err := do(f); breaker.Skipped(err) {
						t.Error("the breaker is open already")
					}
				}
				if _, err := do(end); !breaker.Skipped(err) || breaker.Trying(err) || opened != 1 {
					t.Errorf("%v, want it skipped", err)
				}
				time.Sleep(breaker.For + time.Millisecond)
				release := make(chan struct{})
				go func() { _, _ = do(func() (int, error) { <-release; return end() }) }()
				synctest.Wait()
				if _, err := do(end); !breaker.Skipped(err) || !breaker.Trying(err) {
					t.Errorf("%v, want it skipped while another one tries", err)
				}
				close(release)
				synctest.Wait()
				if closed > 0 {
					t.Error("who did not succeed has closed the breaker")
				}
				time.Sleep(breaker.For + time.Millisecond)
				if v, err := do(func() (int, error) { return 7, nil }); v != 7 || err != nil || closed != 1 {
					t.Errorf("%d, %v, closed %d times", v, err, closed)
				}
			})
		})
	}
}
