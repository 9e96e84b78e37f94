package testservers

// Proxies between a test and its servers.

import (
	"fmt"
	neturl "net/url"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/redis/go-redis/v9"

	"github.com/trackpilots/apikey/internal/faultproxy"
)

// A Fault is a fault of a Proxy.
type Fault = faultproxy.Fault

// The faults of a Proxy: see package faultproxy.
const (
	Healthy = faultproxy.Healthy
	Down    = faultproxy.Down
	Frozen  = faultproxy.Frozen
	Slow    = faultproxy.Slow
	Reset   = faultproxy.Reset
)

// A Proxy forwards connections to a server, unless it has a fault. It ends with the test.
type Proxy struct{ proxy *faultproxy.Proxy }

// NewProxy returns a healthy proxy in front of a server, and its address.
func NewProxy(tb testing.TB, network, server string) (*Proxy, string) {
	tb.Helper()
	p, err := faultproxy.New(network, server)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.Close)
	return &Proxy{p}, p.Addr
}

// Set replaces the fault. What was frozen goes on after that.
func (p *Proxy) Set(tb testing.TB, fault Fault) { tb.Helper(); must(tb, p.proxy.Set(fault)) }

// Delay adds d to every round trip, on connections that are opened from now on.
func (p *Proxy) Delay(d time.Duration) { p.proxy.Delay(d) }

// Redirect puts the proxy in front of another PostgreSQL server, and closes the open
// connections.
func (p *Proxy) Redirect(tb testing.TB, url string) {
	tb.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		tb.Fatal(err)
	}
	p.proxy.Redirect(pgconn.NetworkAddress(config.Host, config.Port))
}

// ProxyPostgres puts a Proxy in front of the server at url, and returns the URL of
// the same database behind it. Connecting gives up after a second.
func ProxyPostgres(tb testing.TB, url string) (string, *Proxy) {
	tb.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		tb.Fatal(err)
	}
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	p, listening := NewProxy(tb, network, address)
	return fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable&connect_timeout=1",
		neturl.UserPassword(config.User, config.Password), listening, config.Database), p
}

// ProxyRedis puts a Proxy in front of the server at url, and returns its URL
// behind it.
func ProxyRedis(tb testing.TB, url string) (string, *Proxy) {
	tb.Helper()
	opts, err := redis.ParseURL(url)
	if err != nil {
		tb.Fatal(err)
	}
	p, listening := NewProxy(tb, opts.Network, opts.Addr)
	return (&neturl.URL{Scheme: "redis", User: neturl.UserPassword(opts.Username, opts.Password), Host: listening}).String(), p
}
