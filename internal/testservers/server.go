package testservers

// Servers of one test.

import (
	"context"
	"net"
	"testing"

	"github.com/trackpilots/apikey/internal/localserver"
)

// A Server belongs to one test, which may break it.
type Server struct {
	URL    string
	server *localserver.Server
}

// own lets a server end with the test.
func own(tb testing.TB, s *localserver.Server, url string, err error) *Server {
	tb.Helper()
	if err != nil {
		tb.Fatalf("testservers: %v: 'make servers' installs what the tests need", err)
	}
	tb.Cleanup(s.Stop)
	return &Server{url, s}
}

// start starts a server that ends with the test, and is killed when it crashes.
func start(tb testing.TB, url, dir string, ready func(context.Context) error, command ...string) *Server {
	tb.Helper()
	s, err := localserver.Start(dir, "KILL", ready, command...)
	return own(tb, s, url, err)
}

// Crash ends the server without a shutdown.
func (s *Server) Crash(tb testing.TB) { tb.Helper(); must(tb, s.server.Crash()) }

// Start starts the server again after a Crash, with what it has written to disk.
func (s *Server) Start(tb testing.TB) { tb.Helper(); must(tb, s.server.Restart()) }

// Freeze stops the process of the server; its connections stay open.
func (s *Server) Freeze(tb testing.TB) { tb.Helper(); must(tb, s.server.Freeze()) }

// Thaw ends a Freeze.
func (s *Server) Thaw(tb testing.TB) { tb.Helper(); must(tb, s.server.Thaw()) }

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// dial is ready when somebody listens at the address.
func dial(network, address string) func(context.Context) error {
	return func(context.Context) error {
		conn, err := net.Dial(network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}
