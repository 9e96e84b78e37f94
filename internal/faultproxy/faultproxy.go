// Package faultproxy is a network with faults, for tests and for the demo. The library for
// this would add twenty modules for four faults.
package faultproxy

import (
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A Fault is a fault of a Proxy.
type Fault string

// The faults of a Proxy.
const (
	Healthy Fault = ""
	Down    Fault = "down"             // nobody listens, and connections are closed
	Frozen  Fault = "frozen"           // connections are taken and stay open, and nothing passes
	Slow    Fault = "slow"             // every answer takes SlowBy
	Reset   Fault = "connection reset" // connections are reset, as is each new one
)

// SlowBy is the delay of Slow: longer than any budget.
const SlowBy = 2 * time.Second

// A Proxy forwards connections to a server, unless it has a fault.
type Proxy struct {
	Addr  string       // where it listens
	delay atomic.Int64 // of every answer, in nanoseconds

	mu       sync.Mutex
	network  string
	server   string
	listener net.Listener // nil while down
	fault    Fault
	changed  chan struct{} // closed when the fault changes
	conns    map[net.Conn]bool
	running  sync.WaitGroup
}

// New returns a healthy proxy in front of a server, on a port of the loopback.
func New(network, server string) (*Proxy, error) {
	p := &Proxy{Addr: "127.0.0.1:0", network: network, server: server, changed: make(chan struct{}), conns: map[net.Conn]bool{}}
	if err := p.listen(); err != nil {
		return nil, err
	}
	p.Addr = p.listener.Addr().String()
	return p, nil
}

// Close closes all connections, and waits until nothing is left.
func (p *Proxy) Close() {
	_ = p.Set(Down) // it fails only when it begins to listen
	p.running.Wait()
}

// Delay adds d to every round trip, on connections that are opened from now on.
func (p *Proxy) Delay(d time.Duration) { p.delay.Store(int64(d)) }

// Redirect puts the proxy in front of another server, and closes the open connections.
func (p *Proxy) Redirect(network, server string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.network, p.server = network, server
	for conn := range p.conns {
		_ = conn.Close()
	}
}

// Set replaces the fault. What was frozen goes on after that.
func (p *Proxy) Set(fault Fault) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = fault
	close(p.changed)
	p.changed = make(chan struct{})
	if fault == Down || fault == Reset {
		for conn := range p.conns {
			hangUp(conn, fault)
		}
	}
	switch {
	case fault == Down && p.listener != nil:
		_ = p.listener.Close()
		p.listener = nil
	case fault != Down && p.listener == nil:
		return p.listen()
	}
	return nil
}

func hangUp(conn net.Conn, fault Fault) {
	if tcp, ok := conn.(*net.TCPConn); ok && fault == Reset {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// listen starts to take connections. The caller holds the lock, or is alone.
func (p *Proxy) listen() error {
	listener, err := net.Listen("tcp", p.Addr)
	if err != nil {
		return err
	}
	p.listener = listener
	p.running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			p.running.Go(func() { p.pass(client) })
		}
	})
	return nil
}

// pass passes on one connection.
func (p *Proxy) pass(client net.Conn) {
	if !p.add(client) {
		return
	}
	defer p.remove(client)
	p.mu.Lock()
	network, address := p.network, p.server
	p.mu.Unlock()
	server, err := net.Dial(network, address)
	if err != nil || !p.add(server) {
		return
	}
	defer p.remove(server)
	var up sync.WaitGroup
	up.Go(func() { p.copy(server, client, false) })
	p.copy(client, server, true)
	_ = client.Close()
	up.Wait()
}

// add notes an open connection, unless connections are not to be open now.
func (p *Proxy) add(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == Down || p.fault == Reset {
		hangUp(conn, p.fault)
		return false
	}
	p.conns[conn] = true
	return true
}

func (p *Proxy) remove(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, conn)
	_ = conn.Close()
}

// copy copies one direction until either end is closed.
func (p *Proxy) copy(to io.WriteCloser, from io.Reader, answers bool) {
	defer to.Close()
	if delay := time.Duration(p.delay.Load()); answers && delay > 0 {
		late := newLateWriter(to, delay)
		defer late.Close()
		to = late
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.hold(answers)
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// A lateWriter writes everything some time later.
type lateWriter struct {
	delay  time.Duration
	queue  chan lateBytes
	closed sync.WaitGroup
}

type lateBytes struct {
	due   time.Time
	bytes []byte
}

func newLateWriter(to io.Writer, delay time.Duration) *lateWriter {
	w := &lateWriter{delay: delay, queue: make(chan lateBytes, 10_000)}
	w.closed.Go(func() {
		for b := range w.queue {
			time.Sleep(time.Until(b.due))
			_, _ = to.Write(b.bytes) // the reader finds out when it is closed
		}
	})
	return w
}

func (w *lateWriter) Write(b []byte) (int, error) {
	w.queue <- lateBytes{time.Now().Add(w.delay), bytes.Clone(b)}
	return len(b), nil
}

func (w *lateWriter) Close() error {
	close(w.queue)
	w.closed.Wait()
	return nil
}

// hold waits as long as the fault says.
func (p *Proxy) hold(answers bool) {
	for {
		p.mu.Lock()
		fault, changed := p.fault, p.changed
		p.mu.Unlock()
		switch {
		case fault == Frozen:
			<-changed
		case fault == Slow && answers:
			select {
			case <-changed:
			case <-time.After(SlowBy):
			}
			return
		default:
			return
		}
	}
}
