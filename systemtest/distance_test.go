package systemtest

// Redis far away, with and without TLS: it takes several round trips to connect, and so
// longer than a request waits.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/internal/localserver"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// selfSigned makes a certificate for the loopback. It returns the files of it and of its
// key, which anybody may read, and the certificates to trust.
func selfSigned(t testing.TB) (certFile, keyFile string, roots *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	world.MustNot(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	world.MustNot(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	world.MustNot(t, err)
	dir, err := localserver.TempDir() // the server runs as another user
	world.MustNot(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	write := func(name, kind string, bytes []byte) string {
		path := filepath.Join(dir, name)
		world.MustNot(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}), 0o644))
		return path
	}
	certFile, keyFile = write("cert", "CERTIFICATE", cert), write("key", "PRIVATE KEY", der)
	roots = x509.NewCertPool()
	parsed, err := x509.ParseCertificate(cert)
	world.MustNot(t, err)
	roots.AddCert(parsed)
	return certFile, keyFile, roots
}

// far returns a dialer to whom every round trip takes d, including that of connecting.
func far(proxy *testservers.Proxy, d time.Duration, config *tls.Config) func(context.Context, string, string) (net.Conn, error) {
	proxy.Delay(d)
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil && config != nil {
			conn = tls.Client(conn, config)
		}
		return conn, err
	}
}

// TestRedisByDistance: whatever it takes to connect, nearly all GETs are hits soon, one by
// one and in batches, if one GET takes less than RedisTimeout.
func TestRedisByDistance(t *testing.T) {
	certFile, keyFile, roots := selfSigned(t)
	_, secure := testservers.StartRedisTLS(t, certFile, keyFile)
	server := testservers.StartRedis(t, "--requirepass", "p")
	for _, ms := range []int{5, 10, 15, 25, 40} {
		for _, encrypted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d ms, TLS %v", ms, encrypted), func(t *testing.T) {
				opts := &redis.Options{Password: "p", ContextTimeoutEnabled: true}
				var proxy *testservers.Proxy
				var config *tls.Config
				if encrypted {
					proxy, opts.Addr = testservers.NewProxy(t, "tcp", secure)
					config = &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}
				} else {
					if ms != 25 {
						testservers.Long(t)
					}
					near, err := redis.ParseURL(server.URL)
					world.MustNot(t, err)
					proxy, opts.Addr = testservers.NewProxy(t, near.Network, near.Addr)
				}
				opts.Dialer = far(proxy, time.Duration(ms)*time.Millisecond, config)
				rdb := redis.NewClient(opts)
				defer rdb.Close()
				w := world.NewPostgres(t)
				r := world.NewPostgresReplica(w, rdb, world.NewSecret(), world.NoMemory())
				keys := enrolMany(t, w, 8, world.Live)
				ask := func(n int) (hits uint64) {
					before := r.Cache.Stats().RedisHits
					for range n {
						r.WantCode(t, keys[0], world.Admitted)
					}
					return r.Cache.Stats().RedisHits - before
				}
				// Four batches go at once. Who waits for them needs two round trips.
				crowd := 8
				if ms >= 25 {
					crowd = 4
				}
				together := func() uint64 {
					before := r.Cache.Stats().RedisHits
					for range 40 / crowd {
						var all sync.WaitGroup
						for _, key := range keys[:crowd] {
							all.Go(func() { r.WantCode(t, key, world.Admitted) })
						}
						all.Wait()
					}
					return r.Cache.Stats().RedisHits - before
				}
				first, start := ask(51), time.Now()
				world.WaitFor(t, func() bool { return ask(40) >= 38 }) // on a busy machine some take too long
				world.WaitFor(t, func() bool { return together() >= 38 })
				t.Logf("%d hits of the first 51; %v later %d of 100, and of %d at once %d of 40",
					first, time.Since(start).Round(time.Millisecond), ask(100), crowd, together())
				if s := r.Cache.Stats(); crowd > 4 && s.RedisBatches == s.RedisGets {
					t.Errorf("%+v, want some to have gone together", s)
				}
			})
		}
	}
}

// TestDistantRedis: Redis is as far away as another region, and wants a password: it
// takes longer to connect than a request may wait. It is used all the same.
func TestDistantRedis(t *testing.T) {
	t.Parallel()
	server := testservers.StartRedis(t, "--requirepass", "p")
	address, proxy := testservers.ProxyRedis(t, server.URL)
	proxy.Delay(100 * time.Millisecond)
	opts, err := redis.ParseURL(address)
	if err != nil {
		t.Fatal(err)
	}
	opts.Password, opts.ContextTimeoutEnabled = "p", true
	rdb := redis.NewClient(opts)
	defer rdb.Close()
	w := world.NewPostgres(t)
	apiKey, _ := w.Enrol(t, world.Live, world.Paid)
	r := world.NewPostgresReplica(w, rdb, world.NewSecret(), &apikey.CacheOptions{MemoryEntries: -1, RedisTimeout: 400 * time.Millisecond})
	world.WaitFor(t, func() bool {
		r.WantCode(t, apiKey, world.Admitted)
		return r.Cache.Stats().RedisHits > 3
	})
	if err := r.Cache.Stats().RedisErr; err != nil {
		t.Errorf("RedisErr is %v", err)
	}

	hopeless := world.NewPostgresReplica(w, rdb, world.NewSecret(), &apikey.CacheOptions{MemoryEntries: -1, RedisTimeout: 5 * time.Millisecond})
	hopeless.WantCode(t, apiKey, world.Admitted)
	if err := hopeless.Cache.Stats().RedisErr; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with less time than it takes RedisErr is %v", err)
	}
}
