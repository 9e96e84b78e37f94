package testservers

// A server process: how it is found, started without the rights of root, broken, and stopped
// with the test process.

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// find returns the path of a server's binary.
func find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/lib/postgresql/*/bin/", "/usr/sbin/"} { // out of PATH on Debian
		if paths, _ := filepath.Glob(dir + name); len(paths) > 0 {
			return paths[len(paths)-1], nil
		}
	}
	return "", fmt.Errorf("testservers: %s is not installed: run 'make servers', or on Debian "+
		"'apt-get install postgresql redis-server pgbouncer'", name)
}

// tempDir returns a new directory that belongs to the user of as. Its path is
// short, since that of a Unix socket may have no more than 107 bytes.
func tempDir() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "apikey")
	if err != nil {
		return "", err
	}
	if id := servant(); id != nil {
		err = os.Chown(dir, int(id.Uid), int(id.Gid))
	}
	return dir, err
}

// servant returns the user that servers run as: nil for the present user, or another one if
// that is root, since PostgreSQL refuses to run as root.
func servant() *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	return nil
}

func as(dir, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: servant(), Setpgid: true}
	return cmd
}

// keeper is a shell script that runs a server and executes the words on its standard input.
// When that is closed, even because the test process was killed, it stops the server and
// removes the directory.
const keeper = `dir=$1 crash=$2; shift 2
run() { "$@" >>"$dir/log" 2>&1 & server=$!; }
run "$@"
while read -r word; do
	case $word in
	crash) kill "-$crash" $server; wait $server ;;
	start) run "$@" ;;
	freeze) kill -STOP $server ;;
	thaw) kill -CONT $server ;;
	esac
done
kill -CONT $server
kill -INT $server
wait
rm -rf "$dir"`

// A Server belongs to one test, which may break it.
type Server struct {
	URL string

	dir     string
	command string
	ready   func(context.Context) error
	words   io.WriteCloser // to the keeper
	keeper  *exec.Cmd
}

// start starts a server and waits until ready succeeds. The signal crash ends it
// without any tidying up.
func start(dir, crash string, ready func(context.Context) error, command ...string) (*Server, error) {
	s := &Server{dir: dir, command: command[0], ready: ready}
	s.keeper = as(dir, "/bin/sh", append([]string{"-c", keeper, "keeper", dir, crash}, command...)...)
	var err error
	if s.words, err = s.keeper.StdinPipe(); err != nil {
		return nil, err
	}
	if err := s.keeper.Start(); err != nil {
		return nil, err
	}
	if err := s.await(true); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

// startShared starts a server that Main stops.
func startShared(dir string, ready func(context.Context) error, command ...string) error {
	s, err := start(dir, "KILL", ready, command...)
	if err == nil {
		stops = append(stops, s.stop)
	}
	return err
}

// startOwn starts a server that ends with the test.
func startOwn(tb testing.TB, url, dir, crash string, ready func(context.Context) error, command ...string) *Server {
	tb.Helper()
	s, err := start(dir, crash, ready, command...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.stop)
	s.URL = url
	return s
}

func (s *Server) stop() {
	_ = s.words.Close()
	_ = s.keeper.Wait()
	_ = os.RemoveAll(s.dir)
}

// await waits until the server answers, or no longer does.
func (s *Server) await(up bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	for {
		err := s.ready(ctx)
		if (err == nil) == up {
			return nil
		}
		select {
		case <-ctx.Done():
			out, _ := fs.ReadFile(os.DirFS(s.dir), "log")
			return fmt.Errorf("testservers: %s answers: %v, want %v: %w\n%s", s.command, !up, up, err, out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *Server) tell(tb testing.TB, word string) {
	tb.Helper()
	if _, err := io.WriteString(s.words, word+"\n"); err != nil {
		tb.Fatal(err)
	}
}

// Crash ends the server without any tidying up.
func (s *Server) Crash(tb testing.TB) {
	tb.Helper()
	s.tell(tb, "crash")
	if err := s.await(false); err != nil {
		tb.Fatal(err)
	}
}

// Start starts the server again after a Crash, on what it has written to disk.
func (s *Server) Start(tb testing.TB) {
	tb.Helper()
	s.tell(tb, "start")
	if err := s.await(true); err != nil {
		tb.Fatal(err)
	}
}

// Freeze stops the process of the server; its connections stay open.
func (s *Server) Freeze(tb testing.TB) { tb.Helper(); s.tell(tb, "freeze") }

// Thaw ends a Freeze.
func (s *Server) Thaw(tb testing.TB) { tb.Helper(); s.tell(tb, "thaw") }

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
