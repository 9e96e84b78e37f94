package systemtest

// More load than keeps all facts fresh.

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// TestRevokedUnderLoad: without the feed, with the store 5 ms away and more requests than
// keep all keys fresh, with made-up keys among them or not, a revoked key is admitted for
// MaxStaleness and no longer.
func TestRevokedUnderLoad(t *testing.T) {
	testservers.Long(t)
	const maxStaleness, slack = time.Second, time.Second
	for name, flooded := range map[string]bool{"many keys": false, "and a flood of made-up ones": true} {
		t.Run(name, func(t *testing.T) {
			w := world.NewPostgres(t)
			address, proxy := testservers.ProxyPostgres(t, w.Pool.Config().ConnString())
			proxy.Delay(5 * time.Millisecond)
			pool := testservers.Pool(t, address)
			testservers.Exec(t, w.Pool, `INSERT INTO organisations VALUES ('many')`)
			testservers.Exec(t, w.Pool, `INSERT INTO org_plans (org_id, plan, status) VALUES ('many', 'starter', 'active')`)
			testservers.Exec(t, w.Pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'many', sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(0, 2999) i`)
			cache := apikey.NewCache(testservers.Redis(t), world.NewSecret(), &apikey.CacheOptions{MaxStaleness: maxStaleness})
			r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
			var revokedAt, refused, late, longest atomic.Int64
			var wg sync.WaitGroup
			defer wg.Wait()
			ask := func(i int) {
				asked := time.Now()
				code := r.Ask(fmt.Sprintf("a-key-of-many-%d", i))
				at := revokedAt.Load()
				switch {
				case code == world.Unavailable:
					refused.Add(1)
				case code == world.Admitted && i < 500 && at > 0 && asked.UnixNano()-at > int64(maxStaleness):
					longest.Store(max(longest.Load(), asked.UnixNano()-at))
					if asked.UnixNano()-at > int64(maxStaleness+slack) {
						late.Add(1)
					}
				}
			}
			n := 0
			for start := time.Now(); time.Since(start) < 2*maxStaleness+2*slack; time.Sleep(time.Millisecond) {
				if revokedAt.Load() == 0 && time.Since(start) > maxStaleness {
					testservers.Exec(t, w.Pool, `UPDATE api_keys SET active = false WHERE key_hash IN (SELECT sha256(('a-key-of-many-' || i)::bytea) FROM generate_series(0, 499) i)`)
					revokedAt.Store(time.Now().UnixNano())
				}
				for range 2 {
					i := n
					n++
					wg.Go(func() { ask(i * 7919 % 3000) })
					if flooded {
						wg.Go(func() { r.Ask(fmt.Sprintf("made-up-made-up-%d", i)) })
					}
				}
			}
			wg.Wait()
			if late.Load() > 0 || refused.Load() > 0 {
				t.Errorf("%d revoked keys were admitted late, the longest %v after it was revoked; %d answers are 503", late.Load(), time.Duration(longest.Load()), refused.Load())
			}
		})
	}
}
