// Command apikey runs and looks after API-key authentication.
//
//	apikey demo       serve the main job on embedded defaults, or on real servers
//	apikey migrate    create or update the tables
//	apikey keys       create, list, deactivate, activate, delete, rotate, import, prune
//	apikey plan       set, show, define
//	apikey explain    why a key is admitted or refused
//	apikey doctor     whether the database and Redis are as they should be
//	apikey version    which version this is
//
// PostgreSQL is at --database-url or $DATABASE_URL, Redis at --redis-url or
// $REDIS_URL. Keys are read from standard input, and never from an argument, which
// other users of the machine could see.
//
// The exit status is 0 when it did what it was asked to, 1 when it could not, or when
// doctor found a fault, 2 when it did not understand, and 3 when what it was asked for is
// not there.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
)

const usage = `usage: apikey command [flags]

  demo               serve the main job on embedded defaults, or on real servers
  migrate            create or update the tables
  keys create        make a key for an organisation, and show it once
  keys list          list the keys of an organisation
  keys deactivate    make a key dead
  keys activate      take that back
  keys deactivate-all  make all keys of an organisation dead
  keys delete        forget a key
  keys prune         forget keys that expired long ago
  keys rotate        make a new key in the place of one that lives on for a while
  keys import        take in keys issued elsewhere, from standard input
  plan define        say whether a tier includes the API
  plan set           set an organisation's tier, status or end
  plan show          show an organisation's plan
  explain            say why a key, by its id or from standard input, is refused
  doctor             check the database and Redis
  version            print the version

'apikey command -h' lists the flags of a command. Exit status: 0 done, 1 could not
be done (doctor: a fault was found), 2 not understood, 3 not there.
`

// A command is a word or two, and what they do.
type command func(ctx context.Context, a *app, args []string) error

var commands = map[string]command{
	"demo": demo, "migrate": migrate,
	"keys create": keysCreate, "keys list": keysList, "keys deactivate": keysDeactivate, "keys activate": keysActivate,
	"keys deactivate-all": keysRevoke, "keys prune": keysPrune, "keys delete": keysDelete, "keys rotate": keysRotate, "keys import": keysImport,
	"plan define": planDefine, "plan set": planSet, "plan show": planShow,
	"explain": explain, "doctor": doctor, "version": version,
}

// An app is the process as a command sees it.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	json           bool // errors, too, are for programs
}

// errUsage is a command line that was not understood, and has been explained.
var errUsage = errors.New("usage")

// errNotThere is what a command wraps that looked for something which is not there.
var errNotThere = errors.New("")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends at once
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	err := run(ctx, a, os.Args[1:])
	stop()
	os.Exit(a.report(err))
}

// report says what went wrong, in one line, and returns the exit status.
func (a *app) report(err error) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	}
	status := 1
	if errors.Is(err, errNotThere) {
		status = 3
	}
	text := strings.TrimPrefix(strings.Join(strings.Fields(err.Error()), " "), "apikey: ")
	if more := advice(err); more != "" {
		text += ": " + more
	}
	if a.json {
		_ = json.NewEncoder(a.stderr).Encode(map[string]string{"error": text})
		return status
	}
	fmt.Fprintf(a.stderr, "apikey: %s\n", text)
	return status
}

// version prints what go install has built.
func version(_ context.Context, a *app, args []string) error {
	if err := newFlags(a, "version").parse(args); err != nil {
		return err
	}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("this binary does not say how it was built")
	}
	fmt.Fprintln(a.stdout, build.Main.Version, build.GoVersion)
	return nil
}

func run(ctx context.Context, a *app, args []string) error {
	for words := min(2, len(args)); words > 0; words-- {
		if c, ok := commands[strings.Join(args[:words], " ")]; ok {
			return c(ctx, a, args[words:])
		}
	}
	if len(args) > 0 {
		switch args[0] {
		case "-h", "-help", "--help", "help":
			fmt.Fprint(a.stdout, usage)
			return nil
		}
		fmt.Fprintf(a.stderr, "apikey: there is no such command\n") // not which: it may be a key
	}
	fmt.Fprint(a.stderr, usage)
	return errUsage
}
