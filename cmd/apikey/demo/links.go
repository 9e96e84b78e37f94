package demo

// The network between replicas and servers, which the page can break.

import (
	"context"
	"errors"
	"maps"
	"net"
	"sync"

	"github.com/trackpilots/apikey/internal/faultproxy"
)

// The parts that can be broken, and the states that they can be in.
const (
	redisPart        = "redis"
	databasePart     = "database"
	announcementPart = "announcements"

	working = "working"
)

var states = map[string]map[string]faultproxy.Fault{
	redisPart:        {working: faultproxy.Healthy, "down": faultproxy.Down, "slow": faultproxy.Slow},
	databasePart:     {working: faultproxy.Healthy, "down": faultproxy.Down, "slow": faultproxy.Slow},
	announcementPart: {working: faultproxy.Healthy, "lost": faultproxy.Frozen},
}

// links are the ways from the replicas to what they need.
type links struct {
	redis, database, announcements *link

	mu    sync.Mutex
	state map[string]string // by part
}

func newLinks() *links {
	return &links{
		redis: new(link), database: new(link), announcements: new(link),
		state: map[string]string{redisPart: working, databasePart: working, announcementPart: working},
	}
}

// set breaks or mends a part.
func (l *links) set(part, state string) error {
	if _, ok := states[part][state]; !ok {
		return errors.New("there is no such part, or it cannot be in such a state")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.state[announcementPart]
	l.state[part] = state
	fault := func(part string) faultproxy.Fault { return states[part][l.state[part]] }
	announcements := fault(announcementPart)
	if announcements == faultproxy.Healthy {
		announcements = fault(databasePart) // the same server announces
	}
	var lost error
	if part == announcementPart && before != working && state == working { // what was held back stays lost
		lost = l.announcements.set(faultproxy.Reset)
	}
	return errors.Join(lost, l.redis.set(fault(redisPart)), l.database.set(fault(databasePart)), l.announcements.set(announcements))
}

// states returns the state of each part.
func (l *links) states() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.state)
}

func (l *links) close() {
	for _, one := range []*link{l.redis, l.database, l.announcements} {
		one.close()
	}
}

// A link leads to one kind of server, at any address.
type link struct {
	mu      sync.Mutex
	fault   faultproxy.Fault
	proxies map[[2]string]*faultproxy.Proxy // by network and address
}

// dial is a [Dialer].
func (l *link) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	proxy, err := l.proxy(network, addr)
	if err != nil {
		return nil, err
	}
	return new(net.Dialer).DialContext(ctx, "tcp", proxy.Addr)
}

func (l *link) proxy(network, addr string) (*faultproxy.Proxy, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := [2]string{network, addr}
	if proxy := l.proxies[at]; proxy != nil {
		return proxy, nil
	}
	proxy, err := faultproxy.New(network, addr)
	if err != nil {
		return nil, err
	}
	if l.proxies == nil {
		l.proxies = map[[2]string]*faultproxy.Proxy{}
	}
	l.proxies[at] = proxy
	return proxy, proxy.Set(l.fault)
}

func (l *link) set(fault faultproxy.Fault) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fault == fault {
		return nil
	}
	l.fault = fault
	var errs []error
	for _, proxy := range l.proxies {
		errs = append(errs, proxy.Set(fault))
	}
	return errors.Join(errs...)
}

// present returns the present fault.
func (l *link) present() faultproxy.Fault {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fault
}

func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, proxy := range l.proxies {
		proxy.Close()
	}
}
