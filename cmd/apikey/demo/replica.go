package demo

// A replica of the service, which is asked for the chosen key many times a second.

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
)

const (
	probeEvery  = 40 * time.Millisecond
	probeSoon   = time.Millisecond // while a change is about to take effect
	samplesKept = 300
)

// A replica is one process of a service, as far as authentication is concerned: a cache of
// its own, and connections of its own.
type replica struct {
	demo   *demo
	index  int
	rdb    redis.UniversalClient
	secret []byte

	running atomic.Pointer[instance]

	mu      sync.Mutex
	samples []sample // the latest last
	latest  answer
}

// An answer is what a replica says about a key, since when.
type answer struct {
	apiKey, code string
	source       apikey.Source
	since        time.Time
}

// An instance is a replica from one start to the next.
type instance struct {
	auth  *apikey.Middleware
	cache *apikey.Cache
	api   http.Handler
	stop  func()
}

// A sample is one answer.
type sample struct {
	N      uint64        `json:"n"`
	Code   string        `json:"code"` // "": admitted
	Source apikey.Source `json:"source"`
	Micros float64       `json:"micros"`
}

type probeKey struct{} // of the context of a probe: where to put its decision

// start begins a new instance, with an empty memory.
func (r *replica) start(ctx context.Context) error {
	stores, err := r.demo.store.open(ctx, r.demo.links)
	if err != nil {
		return err
	}
	i := &instance{cache: apikey.NewCache(r.rdb, r.secret, &apikey.CacheOptions{MaxStaleness: r.demo.setting.MaxStaleness})}
	i.auth = apikey.New(stores.keys, stores.plans, &apikey.Options{
		Cache: i.cache,
		Observe: func(ctx context.Context, d apikey.Decision) {
			if to, ok := ctx.Value(probeKey{}).(*apikey.Decision); ok {
				*to = d
			}
		},
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/whoami", whoami)
	i.api = i.auth.Handler(mux)
	watching, cancel := context.WithCancel(ctx)
	var watch sync.WaitGroup
	if stores.watch != nil {
		watch.Go(func() { stores.watch(watching, i.cache) })
	}
	i.stop = func() {
		cancel()
		watch.Wait()
		stores.close()
	}
	r.running.Store(i)
	return nil
}

// restart starts the replica anew, with an empty memory, as a deployment does.
func (r *replica) restart(ctx context.Context) error {
	old := r.running.Load()
	if err := r.start(ctx); err != nil {
		return err
	}
	old.stop()
	return nil
}

func (r *replica) stop() { r.running.Load().stop() }

// probe asks for the chosen key until ctx ends.
func (r *replica) probe(ctx context.Context) {
	var kept time.Time // when the last sample was
	wait := time.Duration(0)
	for n := uint64(1); ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		now := answer{apiKey: r.demo.chosenKey()}
		var d apikey.Decision
		_, _ = r.running.Load().auth.AuthenticateHeader(context.WithValue(ctx, probeKey{}, &d), []string{"Bearer " + now.apiKey})
		now.code, now.source, now.since = d.Code, d.Source, time.Now()
		r.mu.Lock()
		if changed := now.code != r.latest.code || now.source != r.latest.source; changed || time.Since(kept) >= probeEvery {
			kept = now.since
			r.samples = append(r.samples, sample{n, d.Code, d.Source, float64(d.Duration.Nanoseconds()) / 1000})
			r.samples = r.samples[max(0, len(r.samples)-samplesKept):]
			n++
		}
		if now.apiKey == r.latest.apiKey && now.code == r.latest.code {
			now.since = r.latest.since
		}
		r.latest = now
		r.mu.Unlock()
		wait = probeEvery
		if r.demo.answered(r.index, now) {
			wait = probeSoon
		}
	}
}

// since returns the samples after the nth.
func (r *replica) since(n uint64) []sample {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, s := range r.samples {
		if s.N > n {
			return append([]sample(nil), r.samples[i:]...)
		}
	}
	return []sample{}
}
