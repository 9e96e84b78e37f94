package systemtest

// What the logger of a cache is told.

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// lines is what was written, by whatever goroutine.
type lines struct {
	mu sync.Mutex
	bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(b)
}

// take returns what was written since the last take.
func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.String()
	l.Reset()
	return text
}

// TestLogger: it is told once when something is lost, and once when it is back.
func TestLogger(t *testing.T) {
	testservers.Long(t)
	t.Parallel()
	w := world.NewPostgres(t)
	address, postgres := testservers.ProxyPostgres(t, w.Pool.Config().ConnString())
	redisAddress, rdb := testservers.ProxyRedis(t, testservers.RedisURL(t))
	pool := testservers.Pool(t, address)
	var log lines
	cache := apikey.NewCache(testservers.RedisAt(t, redisAddress), world.NewSecret(), &apikey.CacheOptions{
		MemoryEntries: -1, MaxStaleness: 2 * time.Second, RedisTimeout: 500 * time.Millisecond, StoreTimeout: 2 * time.Second, // on a busy machine
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	world.Watch(t, cache, pool)
	r := world.ReplicaOn(apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool), cache)
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	says := func(texts ...string) {
		t.Helper()
		var told string
		world.WaitFor(t, func() bool {
			r.Ask(apiKey)
			told += log.take()
			return !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(told, text) })
		})
		for range 50 { // and does not go on saying so
			r.Ask(apiKey)
		}
		if told += log.take(); strings.Count(told, "\n") != len(texts) {
			t.Errorf("it is told\n%s", told)
		}
	}
	says("announcements are heard")
	postgres.Set(t, testservers.Reset)
	rdb.Set(t, testservers.Reset)
	says("announcements are not heard", "Redis is not used", "a store is not asked")
	postgres.Set(t, testservers.Healthy)
	rdb.Set(t, testservers.Healthy)
	says("announcements are heard", "Redis is used again", "a store is asked again")
}
