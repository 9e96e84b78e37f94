package main

// What the commands share: flags, connections, and output for people or programs.

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
)

const connectTimeout = 5 * time.Second

// flagSet is the flags of one command.
type flagSet struct {
	*flag.FlagSet
	app      *app
	required []string
	json     *bool
}

func newFlags(a *app, command string) *flagSet {
	f := &flagSet{FlagSet: flag.NewFlagSet(command, flag.ContinueOnError), app: a}
	f.SetOutput(a.stderr)
	return f
}

// must is a string flag that has to be given.
func (f *flagSet) must(name, usage string) *string {
	f.required = append(f.required, name)
	return f.String(name, "", usage+" (required)")
}

func (f *flagSet) databaseURL(usage string) *string {
	return f.String("database-url", os.Getenv("DATABASE_URL"), usage+" (default $DATABASE_URL)")
}

func (f *flagSet) redisURL(usage string) *string {
	return f.String("redis-url", os.Getenv("REDIS_URL"), usage+" (default $REDIS_URL)")
}

func (f *flagSet) jsonOutput() {
	f.json = f.Bool("json", false, "print JSON for programs, not text for people")
}

// parse parses a command's arguments, of which none may be left over.
func (f *flagSet) parse(args []string) error {
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return errUsage
	}
	if f.NArg() > 0 {
		return f.misused("unexpected argument %q", f.Arg(0))
	}
	for _, name := range f.required {
		if f.Lookup(name).Value.String() == "" {
			return f.misused("--%s is missing", name)
		}
	}
	return nil
}

// misused says what is wrong with the arguments.
func (f *flagSet) misused(format string, args ...any) error {
	fmt.Fprintf(f.app.stderr, "apikey %s: %s\n", f.Name(), fmt.Sprintf(format, args...))
	f.Usage()
	return errUsage
}

// given reports whether a flag was set.
func (f *flagSet) given(name string) (given bool) {
	f.Visit(func(g *flag.Flag) { given = given || g.Name == name })
	return given
}

// instant reads the value of a flag that is a time: RFC 3339, a duration from now
// such as 720h, or never.
func (f *flagSet) instant(name string) (time.Time, error) {
	text := f.Lookup(name).Value.String()
	if text == "" || text == "never" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil {
		return time.Now().Add(d), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, f.misused("--%s %q: use a time such as 2027-01-31T00:00:00Z, a duration from now such as 720h, or never", name, text)
	}
	return at, nil
}

// openPostgres connects to databaseURL.
func openPostgres(ctx context.Context, databaseURL string) (*pgxpool.Pool, error) {
	if databaseURL == "" {
		return nil, errors.New("no database: set DATABASE_URL, or --database-url")
	}
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return nil, fmt.Errorf("the PostgreSQL URL is not one: %w", err)
	}
	config.ConnConfig.ConnectTimeout = connectTimeout
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

// openRedis connects to redisURL.
func openRedis(ctx context.Context, redisURL string) (*redis.Client, error) {
	opts, err := redis.ParseURL(redisURL)
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // without the URL, which has the password in it
	}
	if err != nil {
		return nil, fmt.Errorf("the Redis URL is not one: %w", err)
	}
	logging.Disable() // what matters comes back as an error
	opts.ContextTimeoutEnabled = true
	rdb := redis.NewClient(opts)
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := rdb.Ping(ctx).Err(); err != nil {
		_ = rdb.Close()
		return nil, fmt.Errorf("no answer from Redis: %w", err)
	}
	return rdb, nil
}

// withPostgres runs a command on the database that its flags name.
func withPostgres(ctx context.Context, databaseURL string, do func(*pgxpool.Pool) error) error {
	pool, err := openPostgres(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	return do(pool)
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

// row prints the cells of a table's row, or of its head.
func row(w io.Writer, cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		if at, ok := cell.(time.Time); ok {
			cell = at.Format(time.RFC3339)
			if at.IsZero() {
				cell = "never"
			}
		}
		texts[i] = fmt.Sprint(cell)
	}
	fmt.Fprintln(w, strings.Join(texts, "\t"))
}
