package main

// The command explain: what happens to a request with a key, and why.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/bearer"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/internal/sealed"
	"github.com/trackpilots/apikey/internal/shared"
)

// An explanation has the facts of a key, and the decision.
type explanation struct {
	Header string       `json:"header"` // what is right or wrong with the Authorization header
	Key    *keyJSON     `json:"key"`
	Plan   *planJSON    `json:"plan"`
	Redis  []recordJSON `json:"redis"`

	RedisFault string `json:"redisFault,omitempty"` // why Redis could not be read

	Code    string `json:"code"` // "" is admitted
	Verdict string `json:"verdict"`

	hash *apikey.KeyHash // nil: the header has no key that could be looked up
}

// A recordJSON is a record in Redis.
type recordJSON struct {
	Name     string     `json:"name"`
	State    string     `json:"state"`
	ReadAt   *time.Time `json:"readAt"`
	Snapshot string     `json:"snapshot"`
}

func explain(ctx context.Context, a *app, args []string) error {
	f := newFlags(a, "explain")
	f.Usage = func() {
		fmt.Fprint(a.stderr, "usage: apikey explain [flags] < KEY\n       apikey explain [flags] --id ID\n\n"+
			"Standard input holds a key, or an Authorization header, or its value. To read records in\n"+
			"Redis it needs the secret of the caches in $APIKEY_CACHE_SECRET.\n\n")
		f.PrintDefaults()
	}
	databaseURL := f.databaseURL("PostgreSQL `URL`")
	redisURL := f.redisURL("Redis `URL`; empty: Redis is not looked at")
	namespace := f.String("namespace", "", "CacheOptions.Namespace of the caches")
	id := f.String("id", "", "the `id` of the key; empty: standard input holds the key")
	f.jsonOutput()
	if err := f.parse(args); err != nil {
		return err
	}
	var header string
	if *id == "" {
		lines, err := a.readLines(ctx)
		switch {
		case err != nil:
			return err
		case len(lines) == 0:
			return errors.New("standard input holds no key: write one to it, or give --id")
		case len(lines) > 1:
			return errors.New("standard input holds more than one line: write one key to it")
		}
		header = headerOf(lines[0].text)
	}
	return withPostgres(ctx, *databaseURL, func(pool *pgxpool.Pool) error {
		e, err := explainKey(ctx, pool, header, *id)
		if err != nil {
			return err
		}
		if *redisURL != "" {
			if err := e.addRedis(ctx, *redisURL, *namespace); err != nil {
				e.RedisFault = err.Error()
			}
		}
		return f.print(e, e.text)
	})
}

// headerOf returns the value of the Authorization header for a line of input, which is a key,
// the value itself, or the whole header.
func headerOf(line string) string {
	if name, value, ok := strings.Cut(line, ":"); ok && strings.EqualFold(strings.TrimSpace(name), "Authorization") {
		return strings.TrimSpace(value)
	}
	if strings.ContainsAny(line, " \t") || strings.EqualFold(line, "Bearer") {
		return line
	}
	return "Bearer " + line
}

// explainKey reads the facts from PostgreSQL, without a cache, and lets the middleware decide.
func explainKey(ctx context.Context, pool *pgxpool.Pool, header, id string) (*explanation, error) {
	keys, plans := apikey.NewPostgresKeyStore(pool), apikey.NewPostgresPlanStore(pool)
	e := new(explanation)
	var verdict error
	if id != "" {
		info, err := admin.NewKeys(pool).Find(ctx, id)
		if errors.Is(err, apikey.ErrNotFound) {
			return nil, fmt.Errorf("there is no key with this id; to look for a key itself, write it to standard input%w", errNotThere)
		}
		if err != nil {
			return nil, err
		}
		e.Header, e.hash = "not looked at: the key was given by its id", &info.Hash
		e.Key = new(toJSON(info, admin.Secret{}))
		verdict = authenticate(ctx, apikey.KeyStoreFunc(func(ctx context.Context, _ apikey.KeyHash) (apikey.Key, error) {
			return keys.Key(ctx, info.Hash)
		}), plans, "Bearer the-key-by-its-id")
	} else {
		// The middleware parses the header, and asks the store for the hash.
		verdict = authenticate(ctx, apikey.KeyStoreFunc(func(ctx context.Context, h apikey.KeyHash) (apikey.Key, error) {
			e.hash = &h
			return keys.Key(ctx, h)
		}), plans, header)
		e.Header = "a Bearer key, well-formed"
		if e.hash == nil {
			e.Header = "refused: " + reasonOfHeader(header, verdict)
		} else if info, err := admin.NewKeys(pool).FindHash(ctx, *e.hash); err == nil {
			e.Key = new(toJSON(info, admin.Secret{}))
		} else if !errors.Is(err, apikey.ErrNotFound) {
			return nil, err
		}
	}
	if e.Key != nil {
		p, err := plans.Plan(ctx, e.Key.OrgID)
		if err != nil && !errors.Is(err, apikey.ErrNotFound) {
			return nil, err
		}
		if err == nil {
			e.Plan = new(toPlanJSON(e.Key.OrgID, p))
		}
	}
	refusal, ok := errors.AsType[*apikey.Error](verdict)
	switch {
	case verdict == nil:
		e.Verdict = "admitted"
	case !ok || errors.Is(verdict, apikey.ErrUnavailable):
		return nil, verdict
	default:
		e.Code = refusal.Code
		e.Verdict = e.reason()
	}
	return e, nil
}

func authenticate(ctx context.Context, keys apikey.KeyStore, plans apikey.PlanStore, header string) error {
	_, err := apikey.New(keys, plans, nil).AuthenticateHeader(ctx, []string{header})
	return err
}

// reasonOfHeader says what is wrong with a header, and does not repeat it.
func reasonOfHeader(header string, verdict error) string {
	switch {
	case errors.Is(verdict, apikey.ErrInvalidAPIKeySchema):
		return "its scheme is not Bearer"
	case errors.Is(verdict, apikey.ErrAPIKeyMissing):
		return "nothing follows Bearer"
	}
	_, key, _ := strings.Cut(header, " ")
	key = strings.Trim(key, " ")
	switch {
	case strings.ContainsAny(key, " ,\t"):
		return "more than one key follows Bearer"
	case len(key) > bearer.MaxKeyLen:
		return fmt.Sprintf("the key has %d bytes, and %d are the most", len(key), bearer.MaxKeyLen)
	case !keyformat.Plausible(key):
		return "it begins like a key of ours, but its length or checksum is wrong: it was mistyped, cut off or made up"
	}
	return "it holds characters that a key cannot have"
}

// reason says why the key is refused.
func (e *explanation) reason() string {
	now := time.Now()
	switch {
	case e.hash == nil:
		return "the header is " + e.Header
	case e.Key == nil:
		return "no such key is on record: it was never valid, or has been deleted"
	case e.Key.State == "expired":
		return fmt.Sprintf("the key expired at %s", e.Key.ExpiresAt.Format(time.RFC3339))
	case e.Key.State != "active":
		return "the key is " + e.Key.State
	case e.Plan == nil:
		return "the organisation has no subscription"
	case e.Plan.Status != string(apikey.PlanActive):
		return fmt.Sprintf("the subscription is %s, not active", e.Plan.Status)
	case !e.Plan.APIAccess:
		return fmt.Sprintf("the tier %s does not include the API", e.Plan.Tier)
	case e.Plan.EndsAt != nil && !now.Before(*e.Plan.EndsAt):
		return fmt.Sprintf("the plan ended at %s", e.Plan.EndsAt.Format(time.RFC3339))
	}
	return "the facts have just changed: try again"
}

// addRedis adds the records of the key and the plan in Redis, and how they differ.
func (e *explanation) addRedis(ctx context.Context, redisURL, namespace string) error {
	secret := os.Getenv("APIKEY_CACHE_SECRET")
	if len(secret) < sealed.MinSecretLen {
		return errors.New("to read records in Redis, set APIKEY_CACHE_SECRET to the secret of the caches; or leave --redis-url and REDIS_URL empty")
	}
	rdb, err := openRedis(ctx, redisURL, nil)
	if err != nil {
		return err
	}
	defer rdb.Close()
	if !shared.ValidNamespace(namespace) {
		return fmt.Errorf("--namespace %q: use up to 64 of the characters A-Z a-z 0-9 . - _", namespace)
	}
	cache := apikey.NewCache(rdb, []byte(secret), &apikey.CacheOptions{Namespace: namespace, RedisTimeout: connectTimeout})
	var withKey apikey.CachedRecord[apikey.Plan] // the plan in the record of the key
	if e.hash != nil {
		r, err := cache.InspectKey(*e.hash)
		if err != nil {
			return err
		}
		if r.Plan != nil {
			withKey = apikey.CachedRecord[apikey.Plan]{Name: r.Name, Found: true, Value: *r.Plan, ReadAt: r.ReadAt, Snapshot: r.Snapshot}
		}
		same := e.Key != nil && r.Value.ID == e.Key.ID && r.Value.OrgID == e.Key.OrgID && r.Value.Active == (e.Key.State != "deactivated") &&
			r.Value.ExpiresAt.Equal(pg.TimeOrZero(e.Key.ExpiresAt))
		e.Redis = append(e.Redis, toRecordJSON(r, same))
	}
	if e.Key != nil {
		r, err := cache.InspectPlan(e.Key.OrgID)
		if err != nil {
			return err
		}
		if !r.Found && withKey.Found {
			r = withKey
		}
		same := e.Plan != nil && r.Value.Name == e.Plan.Tier && string(r.Value.Status) == e.Plan.Status && r.Value.APIAccess == e.Plan.APIAccess &&
			r.Value.EndsAt.Equal(pg.TimeOrZero(e.Plan.EndsAt))
		e.Redis = append(e.Redis, toRecordJSON(r, same))
	}
	return nil
}

func toRecordJSON[V apikey.Key | apikey.Plan](r apikey.CachedRecord[V], same bool) recordJSON {
	state := "as in PostgreSQL"
	switch {
	case !r.Found:
		state = "none"
	case r.Rejected:
		state = "not sealed under this secret: ignored"
	case !same:
		state = "from before a change: not used once that is announced"
	}
	return recordJSON{r.Name, state, pg.NullTime(r.ReadAt), r.Snapshot}
}

func (e *explanation) text(w io.Writer) {
	row(w, "header", e.Header)
	if k := e.Key; k != nil {
		row(w, "key", k.State+", id "+k.ID)
		row(w, "", "name "+k.Name+", hint "+k.Hint)
		row(w, "", "expires "+when(k.ExpiresAt)+", last used "+when(k.LastUsedAt))
		row(w, "organisation", k.OrgID)
	} else if e.hash != nil {
		row(w, "key", "not on record")
	}
	if p := e.Plan; p != nil {
		row(w, "plan", "tier "+p.Tier+", status "+p.Status)
		row(w, "", fmt.Sprintf("includes the API: %v, ends %s", p.APIAccess, when(p.EndsAt)))
	} else if e.Key != nil {
		row(w, "plan", "no subscription")
	}
	for _, r := range e.Redis {
		row(w, "Redis", r.Name)
		row(w, "", r.State)
		if r.ReadAt != nil {
			row(w, "", fmt.Sprintf("%v old, snapshot %s", time.Since(*r.ReadAt).Round(time.Millisecond), r.Snapshot))
		}
	}
	if e.RedisFault != "" {
		row(w, "Redis", e.RedisFault)
	}
	if e.Code == "" {
		row(w, "verdict", "admitted")
		return
	}
	row(w, "verdict", e.Code+": "+e.Verdict)
}

func when(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.Format(time.RFC3339)
}
