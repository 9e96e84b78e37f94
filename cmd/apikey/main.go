// Command apikey sets up, manages and demonstrates API-key authentication. 'apikey -h'
// lists its commands.
//
// PostgreSQL is at --database-url or $DATABASE_URL, Redis at --redis-url or $REDIS_URL.
// Keys are read from standard input and never from arguments, which other users of the
// machine can see.
//
// The exit status is 0 if the command succeeded, 1 if it failed or doctor found a fault, 2
// if its arguments are wrong, and 3 if what it looked for was not found.
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
	"slices"
	"strings"
	"syscall"
)

// A command is a word or two, and what they do.
type command struct {
	name, about string
	run         func(ctx context.Context, a *app, args []string) error
}

var commands = []command{
	{"demo", "serve the API and a page that shows it, without any set-up or on real servers", runDemo},
	{"migrate", "create or update the tables", migrate},
	{"keys create", "create a key for an organisation, and show it once", keysCreate},
	{"keys list", "list the keys of an organisation", keysList},
	{"keys deactivate", "deactivate a key", keysDeactivate},
	{"keys activate", "activate a key again", keysActivate},
	{"keys deactivate-all", "deactivate all keys of an organisation", keysDeactivateAll},
	{"keys delete", "delete a key", keysDelete},
	{"keys prune", "delete keys that expired long ago", keysPrune},
	{"keys rotate", "replace a key by a new one; the old one works for a while longer", keysRotate},
	{"keys import", "import keys that were issued elsewhere, from standard input", keysImport},
	{"plan define", "define a tier, and whether it includes the API", planDefine},
	{"plan set", "set the tier, status or end of an organisation's plan", planSet},
	{"plan show", "show an organisation's plan", planShow},
	{"explain", "explain why a key is admitted or refused", explain},
	{"doctor", "check the database and Redis", doctor},
	{"version", "print the version", version},
}

// usage is the help of the program as a whole.
func usage() string {
	var b strings.Builder
	b.WriteString("usage: apikey command [flags]\n\n")
	for _, c := range commands {
		fmt.Fprintf(&b, "  %-20s %s\n", c.name, c.about)
	}
	b.WriteString("\n'apikey command -h' lists the flags of a command. Exit status: 0 done, 1 failed\n" +
		"(doctor: a fault was found), 2 wrong usage, 3 not found.\n")
	return b.String()
}

// An app is the environment of a command.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	json           bool // print errors as JSON
}

// errUsage means that the arguments are wrong and that this has been printed.
var errUsage = errors.New("usage")

// errNotThere is wrapped by errors for something that was not found.
var errNotThere = errors.New("")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends at once
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	err := run(ctx, a, os.Args[1:])
	stop()
	os.Exit(a.report(err))
}

// report prints err in one line, and returns the exit status.
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

// version prints the version of the module.
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
		name := strings.Join(args[:words], " ")
		if i := slices.IndexFunc(commands, func(c command) bool { return c.name == name }); i >= 0 {
			return commands[i].run(ctx, a, args[words:])
		}
	}
	if len(args) > 0 {
		switch args[0] {
		case "-h", "-help", "--help", "help":
			fmt.Fprint(a.stdout, usage())
			return nil
		}
		fmt.Fprintf(a.stderr, "apikey: there is no such command\n") // not which: it may be a key
	}
	fmt.Fprint(a.stderr, usage())
	return errUsage
}
