//go:build !unix

package localserver

import "errors"

// A Server is a running server.
type Server struct{}

// StartPostgres returns an error: servers are started on Unix only.
func StartPostgres(...string) (s *Server, address string, err error) {
	return nil, "", errors.New("servers are started on Unix only")
}

// Stop does nothing.
func (*Server) Stop() {}
