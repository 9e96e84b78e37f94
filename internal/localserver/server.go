//go:build unix

package localserver

// A server process: how it is found, started without the rights of root, broken, and stopped
// with the process that has started it.

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Find returns the path of a server's binary.
func Find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/lib/postgresql/*/bin/", "/usr/sbin/"} { // out of PATH on Debian
		if paths, _ := filepath.Glob(dir + name); len(paths) > 0 {
			return paths[len(paths)-1], nil
		}
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// TempDir returns a new directory that belongs to the user of Command. Its path is
// short, since that of a Unix socket may have no more than 107 bytes.
func TempDir() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "apikey")
	if err != nil {
		return "", err
	}
	return dir, Own(dir)
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

// Command returns a command that runs in dir, as a user who is not root.
func Command(dir, name string, args ...string) *exec.Cmd {
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

// A Server is a running server.
type Server struct {
	dir     string
	command string
	ready   func(context.Context) error
	words   io.WriteCloser // to the keeper
	keeper  *exec.Cmd
}

// Start starts a server in dir and waits until ready succeeds. The signal crash ends it
// without a shutdown. Stop removes dir.
func Start(dir, crash string, ready func(context.Context) error, command ...string) (*Server, error) {
	s := &Server{dir: dir, command: command[0], ready: ready}
	s.keeper = Command(dir, "/bin/sh", append([]string{"-c", keeper, "keeper", dir, crash}, command...)...)
	var err error
	if s.words, err = s.keeper.StdinPipe(); err != nil {
		return nil, err
	}
	if err := s.keeper.Start(); err != nil {
		return nil, err
	}
	if err := s.await(true); err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

// Stop stops the server, and removes its directory.
func (s *Server) Stop() {
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
			return fmt.Errorf("%s answers: %v, want %v: %w\n%s", s.command, !up, up, err, out)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tell sends a word to the keeper.
func (s *Server) tell(word string) error {
	_, err := io.WriteString(s.words, word+"\n")
	return err
}

// Crash ends the server without a shutdown.
func (s *Server) Crash() error {
	if err := s.tell("crash"); err != nil {
		return err
	}
	return s.await(false)
}

// Restart starts the server again after a Crash.
func (s *Server) Restart() error {
	if err := s.tell("start"); err != nil {
		return err
	}
	return s.await(true)
}

// Freeze stops the process of the server; its connections stay open.
func (s *Server) Freeze() error { return s.tell("freeze") }

// Thaw ends a Freeze.
func (s *Server) Thaw() error { return s.tell("thaw") }

// Own gives a file to the user of Command.
func Own(path string) error {
	if id := servant(); id != nil {
		return os.Chown(path, int(id.Uid), int(id.Gid))
	}
	return nil
}

const startTimeout = 30 * time.Second
