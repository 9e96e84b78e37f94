package main

// What the commands share: flags, connections, input and output.

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const connectTimeout = 5 * time.Second

// flagSet is the flags of one command.
type flagSet struct {
	*flag.FlagSet
	app      *app
	required []string
	fromEnv  map[string]string // the environment variable that a flag defaults to
	json     *bool
}

func newFlags(a *app, command string) *flagSet {
	f := &flagSet{FlagSet: flag.NewFlagSet(command, flag.ContinueOnError), app: a, fromEnv: map[string]string{}}
	f.SetOutput(a.stderr)
	return f
}

// must adds a required string flag.
func (f *flagSet) must(name, usage string) *string {
	f.required = append(f.required, name)
	return f.String(name, "", usage+" (required)")
}

// env adds a string flag whose default is an environment variable. Package flag does not know
// this default, since it would print it, and it may contain a password.
func (f *flagSet) env(name, variable, usage string) *string {
	f.fromEnv[name] = variable
	return f.String(name, "", usage+" (default $"+variable+")")
}

func (f *flagSet) databaseURL(usage string) *string {
	return f.env("database-url", "DATABASE_URL", usage)
}

func (f *flagSet) redisURL(usage string) *string {
	return f.env("redis-url", "REDIS_URL", usage)
}

func (f *flagSet) jsonOutput() {
	f.json = f.Bool("json", false, "print JSON; errors, too")
}

// parse parses the arguments of a command. None may be left over.
func (f *flagSet) parse(args []string) error {
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return errUsage
	}
	f.app.json = f.json != nil && *f.json
	if f.NArg() > 0 {
		return f.misused("unexpected argument after the flags: keys are read from standard input") // not which: it may be a key
	}
	for name, variable := range f.fromEnv {
		if !f.given(name) {
			if err := f.Lookup(name).Value.Set(os.Getenv(variable)); err != nil {
				return err
			}
		}
	}
	for _, name := range f.required {
		if f.Lookup(name).Value.String() == "" {
			return f.misused("--%s is missing", name)
		}
	}
	return nil
}

// misused prints what is wrong with the arguments.
func (f *flagSet) misused(format string, args ...any) error {
	fmt.Fprintf(f.app.stderr, "apikey %s: %s\n'apikey %s -h' lists the flags\n", f.Name(), fmt.Sprintf(format, args...), f.Name())
	return errUsage
}

// given reports whether a flag was set on the command line.
func (f *flagSet) given(name string) (given bool) {
	f.Visit(func(g *flag.Flag) { given = given || g.Name == name })
	return given
}

// never is the value of flags for no end.
const never = "never"

// instant returns the value of a flag that is a time: RFC 3339, a duration from now such as
// 720h or 30d, or never, which is the zero time.
func (f *flagSet) instant(name string) (time.Time, error) {
	text := f.Lookup(name).Value.String()
	if text == never {
		return time.Time{}, nil
	}
	if d, err := parseDuration(text); err == nil {
		return time.Now().Add(d), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, f.misused("--%s %q: use a time such as 2027-01-31T00:00:00Z, a time from now such as 720h or 30d, or never", name, text)
	}
	return at, nil
}

// parseDuration is like time.ParseDuration, and also accepts whole days (7d) and weeks (2w).
func parseDuration(text string) (time.Duration, error) {
	for unit, d := range map[string]time.Duration{"d": 24 * time.Hour, "w": 7 * 24 * time.Hour} {
		if n, ok := strings.CutSuffix(text, unit); ok {
			if count, err := strconv.Atoi(n); err == nil {
				return time.Duration(count) * d, nil
			}
		}
	}
	return time.ParseDuration(text)
}

// duration adds a flag that is a duration: see parseDuration.
func (f *flagSet) duration(name string, value time.Duration, usage string) *time.Duration {
	f.Func(name, usage, func(text string) (err error) {
		if value, err = parseDuration(text); err != nil {
			return errors.New("use a duration such as 90m, 24h or 7d")
		}
		return nil
	})
	return &value
}

// openPostgres connects to databaseURL.
func openPostgres(ctx context.Context, databaseURL string) (*pgxpool.Pool, error) {
	if databaseURL == "" {
		return nil, errors.New("no database: set DATABASE_URL, or --database-url")
	}
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		// The error may quote the password.
		return nil, errors.New("the PostgreSQL URL cannot be parsed: use postgres://user:password@host:5432/database, and write %40 for @, %2F for / and %25 for % in the password")
	}
	config.ConnConfig.ConnectTimeout = connectTimeout
	config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec // works through poolers
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("no answer from PostgreSQL: %w", err)
	}
	return pool, nil
}

// withPostgres runs do with a pool on a database.
func withPostgres(ctx context.Context, databaseURL string, do func(*pgxpool.Pool) error) error {
	pool, err := openPostgres(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	return do(pool)
}

// advice returns what to do about an error of PostgreSQL, or "".
func advice(err error) string {
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return ""
	}
	switch e.Code {
	case "42P01": // undefined_table
		return "the tables are missing, or not in the search_path: run 'apikey migrate'"
	case "42703", "42883": // undefined_column, undefined_function
		return "the tables are older than this program: run 'apikey migrate'"
	case "42501": // insufficient_privilege
		return "this role may not do that: docs/operations.md has the roles"
	case "3D000": // invalid_catalog_name
		return "create the database, or name another one in the URL"
	case "28P01", "28000": // invalid_password, invalid_authorization_specification
		return "look at the user, the password and sslmode in the URL, and at pg_hba.conf"
	case "08P01": // protocol_violation
		return "is a pooler in between that does not know the database or a parameter of the URL?"
	}
	return ""
}

// print prints value as JSON, or text as it is.
func (f *flagSet) print(value any, text func(w io.Writer)) error {
	if *f.json {
		enc := json.NewEncoder(f.app.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(value)
	}
	w := tabwriter.NewWriter(f.app.stdout, 0, 0, 2, ' ', 0)
	text(w)
	return w.Flush()
}

// row prints a row of a table.
func row(w io.Writer, cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		if at, ok := cell.(time.Time); ok {
			cell = at.Format(time.RFC3339)
			if at.IsZero() {
				cell = never
			}
		}
		texts[i] = fmt.Sprint(cell)
	}
	fmt.Fprintln(w, strings.Join(texts, "\t"))
}

// readLines returns the lines of standard input without blanks around them and without empty
// lines. It returns an error when ctx ends.
func (a *app) readLines(ctx context.Context) ([]line, error) {
	type answer struct {
		text []byte
		err  error
	}
	read := make(chan answer, 1)
	go func() {
		text, err := io.ReadAll(io.LimitReader(a.stdin, maxInput+1))
		read <- answer{text, err}
	}()
	var input answer
	select {
	case input = <-read:
	case <-ctx.Done():
		return nil, errors.New("interrupted while reading standard input: nothing was done")
	}
	switch {
	case input.err != nil:
		return nil, fmt.Errorf("reading standard input: %w", input.err)
	case len(input.text) > maxInput:
		return nil, fmt.Errorf("standard input has more than %d MiB: split it", maxInput>>20)
	}
	var lines []line
	n := 0
	for text := range strings.Lines(strings.TrimPrefix(string(input.text), "\ufeff")) { // a byte order mark
		n++
		if text = strings.TrimSpace(text); text != "" {
			lines = append(lines, line{n, text})
		}
	}
	return lines, nil
}

const maxInput = 64 << 20

// A line of standard input has a number.
type line struct {
	n    int
	text string
}
