//go:build unix

package localserver

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"github.com/jackc/pgx/v5"
)

// StartPostgres starts a server with a new data directory, on a Unix socket only. args are
// further arguments. It crashes by an immediate shutdown, since a postmaster that is killed
// leaves its children behind.
func StartPostgres(args ...string) (s *Server, address string, err error) {
	initdb, err := Find("initdb")
	if err != nil {
		return nil, "", err
	}
	dir, err := TempDir()
	if err != nil {
		return nil, "", err
	}
	out, err := Command(dir, initdb, "-D", filepath.Join(dir, "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N").CombinedOutput()
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, "", fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return StartPostgresIn(dir, args...)
}

// StartPostgresIn starts a server with the data directory that is in dir.
func StartPostgresIn(dir string, args ...string) (s *Server, address string, err error) {
	initdb, err := Find("initdb")
	if err == nil {
		initdb, err = filepath.EvalSymlinks(initdb) // the server is beside it
	}
	if err != nil {
		return nil, "", err
	}
	address = "postgres://postgres@/postgres?host=" + url.QueryEscape(dir)
	ready := func(ctx context.Context) error {
		conn, err := pgx.Connect(ctx, address)
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	}
	command := append([]string{
		filepath.Join(filepath.Dir(initdb), "postgres"), "-D", filepath.Join(dir, "data"), "-k", dir, "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "max_connections=200",
	}, args...)
	s, err = Start(dir, "QUIT", ready, command...)
	return s, address, err
}
