package admin_test

// Keys and plans from birth to death, by the stores: what the dashboard does.

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/keyformat"
	"github.com/trackpilots/apikey/internal/testservers"
	"github.com/trackpilots/apikey/internal/world"
)

// wantInputError wants an InputError that names the field and says want.
func wantInputError(t *testing.T, err error, field, want string) {
	t.Helper()
	if e, ok := errors.AsType[*admin.InputError](err); !ok || e.Field != field || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want an InputError of %s with %q in it", err, field, want)
	}
}

func TestMain(m *testing.M) { os.Exit(testservers.Main(m)) }

// keys are the keys in a database, for managing them and for looking them up.
type keys struct {
	*admin.Keys
	*apikey.PostgresKeyStore
}

func newKeys(db apikey.DB) keys { return keys{admin.NewKeys(db), apikey.NewPostgresKeyStore(db)} }

// plans are the same of plans.
type plans struct {
	*admin.Plans
	*apikey.PostgresPlanStore
}

func newPlans(db apikey.DB) plans { return plans{admin.NewPlans(db), apikey.NewPostgresPlanStore(db)} }

func TestCreate(t *testing.T) {
	pool := testservers.Postgres(t)
	s := newKeys(pool)
	tomorrow := time.Now().Add(24 * time.Hour).UTC().Truncate(time.Microsecond)
	for _, k := range []admin.NewKey{
		{}, {Name: "CI", Environment: admin.EnvironmentTest}, {Name: strings.Repeat("ü", 255), ExpiresAt: tomorrow},
	} {
		info, secret, err := s.Create(t.Context(), "org_1", k)
		if err != nil {
			t.Fatal(err)
		}
		key := secret.Reveal()
		prefix := map[admin.Environment]string{"": "tpk_live_", admin.EnvironmentTest: "tpk_test_"}[k.Environment]
		if !strings.HasPrefix(key, prefix) || !keyformat.Plausible(key) || len(key) != 58 {
			t.Errorf("made %q", key)
		}
		if info.ID == "" || info.OrgID != "org_1" || info.Name != k.Name || info.Hint != key[9:15] || !info.Active ||
			!info.ExpiresAt.Equal(k.ExpiresAt) || time.Since(info.CreatedAt).Abs() > time.Minute || !info.LastUsedAt.IsZero() {
			t.Errorf("Create = %+v", info)
		}
		found, err := s.Key(t.Context(), apikey.HashKey(key))
		if want := (apikey.Key{ID: info.ID, OrgID: "org_1", Active: true, ExpiresAt: k.ExpiresAt}); err != nil || found != want {
			t.Errorf("Key = %+v, %v, want %+v", found, err, want)
		}
		var stored string
		world.MustNot(t, pool.QueryRow(t.Context(), `SELECT string_agg(k::text, ' ') FROM api_keys k`).Scan(&stored))
		if part := world.PartOf(stored, key); part != "" {
			t.Errorf("%s is in the database: %s", part, stored)
		}
		byID, err := s.Find(t.Context(), info.ID)
		if err != nil || byID != info || byID.Hash != apikey.HashKey(key) {
			t.Errorf("Find = %+v, %v", byID, err)
		}
		byHash, err := s.FindHash(t.Context(), apikey.HashKey(key))
		if err != nil || byHash != info {
			t.Errorf("FindHash = %+v, %v", byHash, err)
		}
	}
	for _, id := range []string{"", "x", "00000000-0000-0000-0000-000000000000"} {
		if _, err := s.Find(t.Context(), id); !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("Find(%q): %v, want ErrNotFound", id, err)
		}
	}

	for _, c := range []struct {
		org   string
		key   admin.NewKey
		field string
		want  string
	}{
		{"", admin.NewKey{}, "organisation", "use 1 to 255 bytes"},
		{strings.Repeat("o", 256), admin.NewKey{}, "organisation", "use 1 to 255 bytes"},
		{"o\x00", admin.NewKey{}, "organisation", "UTF-8"},
		{"o\xff", admin.NewKey{}, "organisation", "UTF-8"},
		{"o", admin.NewKey{Name: strings.Repeat("n", 256)}, "name", "has 256 characters: use at most 255"},
		{"o", admin.NewKey{Name: "a\nb"}, "name", "without control characters"},
		{"o", admin.NewKey{Name: "\xff"}, "name", "UTF-8"},
		{"o", admin.NewKey{ExpiresAt: time.Now().Add(-time.Second)}, "expiry", "is in the past"},
	} {
		_, secret, err := s.Create(t.Context(), c.org, c.key)
		wantInputError(t, err, c.field, c.want)
		if secret.Reveal() != "" {
			t.Error("a key that was not created has a secret")
		}
	}
}

// TestSecretPrints: no verb, encoder or logger shows a secret, however deep.
func TestSecretPrints(t *testing.T) {
	_, secret, err := newKeys(testservers.Postgres(t)).Create(t.Context(), "org_1", admin.NewKey{})
	if err != nil {
		t.Fatal(err)
	}
	type inner struct{ hidden admin.Secret }
	type outer struct {
		Shown  admin.Secret
		Deeper *inner
		within map[string]any
	}
	value := outer{secret, &inner{secret}, map[string]any{"s": secret, "p": &secret}}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%p"} {
		for _, v := range []any{secret, &secret, value, &value, inner{secret}, []any{secret}, value.within} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
	}
	encoded, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(encoded)
	slog.New(slog.NewTextHandler(&out, nil)).Info("m", "s", secret, "v", value)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "s", secret, "v", value)
	if part := world.PartOf(out.String(), secret.Reveal()); part != "" {
		t.Errorf("%s is shown in\n%s", part, out.String())
	}
	if !strings.Contains(out.String(), "[redacted]") || !strings.Contains(string(encoded), `"Shown":"[redacted]"`) {
		t.Errorf("nothing is redacted:\n%s", out.String())
	}
}

func TestImport(t *testing.T) {
	s := newKeys(testservers.Postgres(t))
	ours := keyformat.New(keyformat.Live)
	for _, key := range []string{strings.Repeat("k", 16), strings.Repeat("k", 512), "sk_live_4eC39HqLyjWDarjtT1zdp7dc", "AZaz09-._~+/====", ours} {
		info, err := s.Import(t.Context(), "org_1", key, admin.NewKey{Name: "old"})
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		if wantHint := map[bool]string{true: ours[9:15]}[key == ours]; info.Hint != wantHint || info.Name != "old" {
			t.Errorf("%s: %+v", key, info)
		}
		if found, err := s.Key(t.Context(), apikey.HashKey(key)); err != nil || found.ID != info.ID {
			t.Errorf("%s: Key = %+v, %v", key, found, err)
		}
		for _, org := range []string{"org_1", "org_2"} {
			if _, err := s.Import(t.Context(), org, key, admin.NewKey{}); !errors.Is(err, admin.ErrKeyExists) {
				t.Errorf("a second time for %s: %v, want ErrKeyExists", org, err)
			}
		}
	}
	for _, key := range []string{"", strings.Repeat("k", 15), strings.Repeat("k", 513), "with blank in the middle", "ключключключключ", "================"} {
		_, err := s.Import(t.Context(), "org_1", key, admin.NewKey{})
		wantInputError(t, err, "key", "use 16 to 512")
	}
	_, err := s.Import(t.Context(), "org_1", ours[:57]+"_", admin.NewKey{})
	wantInputError(t, err, "key", "checksum")

	h := apikey.HashKey("known by its hash only")
	info, err := s.ImportHash(t.Context(), "org_1", h, admin.NewKey{})
	if err != nil {
		t.Fatal(err)
	}
	if found, err := s.Key(t.Context(), h); err != nil || found.ID != info.ID {
		t.Errorf("Key = %+v, %v", found, err)
	}
}

func TestList(t *testing.T) {
	pool := testservers.Postgres(t)
	s := newKeys(pool)
	var want []string
	for i := range 25 {
		info, _, err := s.Create(t.Context(), "org_1", admin.NewKey{Name: fmt.Sprint(i)})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Create(t.Context(), "org_2", admin.NewKey{}); err != nil {
			t.Fatal(err)
		}
		want = append(want, info.ID)
	}
	testservers.Exec(t, pool, `UPDATE api_keys SET created_at = date_trunc('minute', created_at) WHERE name IN ('3', '4', '5', '6')`) // the same instant
	for _, limit := range []int{0, 1, 7, 25, 1000} {
		var got []string
		for page := (admin.Page{Limit: limit}); ; {
			keys, next, err := s.List(t.Context(), "org_1", page)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range keys {
				got = append(got, k.ID)
			}
			if page.After = next; next == "" {
				break
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("by %d: %d keys, want each of %d once", limit, len(got), len(want))
		}
	}
	if keys, next, err := s.List(t.Context(), "nobody", admin.Page{}); len(keys) != 0 || next != "" || err != nil {
		t.Errorf("List of nobody = %v, %q, %v", keys, next, err)
	}
	_, _, err := s.List(t.Context(), "org_1", admin.Page{Limit: 1001})
	wantInputError(t, err, "page limit", "use 1 to 1000")
	_, _, err = s.List(t.Context(), "org_1", admin.Page{Limit: -1})
	wantInputError(t, err, "page limit", "use 1 to 1000")
	for _, after := range []string{"x", "1.x", "1.00000000-0000-0000-0000-00000000000", "'; DROP TABLE api_keys; --"} {
		_, _, err = s.List(t.Context(), "org_1", admin.Page{After: after})
		wantInputError(t, err, "page", "previous page")
	}
}

// TestChangesOfKeys: what each change does to a key, and that another
// organisation cannot make it.
func TestChangesOfKeys(t *testing.T) {
	s := newKeys(testservers.Postgres(t))
	ctx, now := t.Context(), time.Now()
	for _, c := range []struct {
		name   string
		change func(org, id string) error
		want   string // the state after it
	}{
		{"deactivate", func(org, id string) error { return s.Deactivate(ctx, org, id) }, "deactivated"},
		{"activate", func(org, id string) error { return s.Activate(ctx, org, id) }, "active"},
		{"expire", func(org, id string) error { return s.Expire(ctx, org, id, now.Add(-time.Hour)) }, "expired"},
		{"expire later", func(org, id string) error { return s.Expire(ctx, org, id, now.Add(time.Hour)) }, "active"},
		{"never expire", func(org, id string) error { return s.Expire(ctx, org, id, time.Time{}) }, "active"},
		{"delete", func(org, id string) error { return s.Delete(ctx, org, id) }, ""},
		{"rotate", func(org, id string) error { _, _, err := s.Rotate(ctx, org, id, now, admin.NewKey{}); return err }, "expired"},
	} {
		t.Run(c.name, func(t *testing.T) {
			info, _, err := s.Create(ctx, "org_1", admin.NewKey{})
			if err != nil {
				t.Fatal(err)
			}
			for _, other := range [][2]string{
				{"org_2", info.ID}, {"", info.ID}, {"org_1", ""}, {"org_1", "not-a-uuid"}, {"org_1", "00000000-0000-0000-0000-000000000000"},
			} {
				if err := c.change(other[0], other[1]); !errors.Is(err, apikey.ErrNotFound) {
					t.Errorf("%q: %v, want ErrNotFound", other, err)
				}
			}
			if untouched, err := s.Find(ctx, info.ID); err != nil || untouched != info {
				t.Errorf("changed by others: %+v, %v", untouched, err)
			}
			for range 2 { // twice is as good as once, where that can be
				if err := c.change("org_1", info.ID); err != nil && c.name != "delete" && c.name != "rotate" {
					t.Error(err)
				}
			}
			after, err := s.Find(ctx, info.ID)
			switch {
			case c.want == "":
				if !errors.Is(err, apikey.ErrNotFound) {
					t.Errorf("%+v, %v, want ErrNotFound", after, err)
				}
			case err != nil || after.State(now) != c.want:
				t.Errorf("%s, %v, want %s", after.State(now), err, c.want)
			}
		})
	}
}

// TestRotateKeeps: the new key is what the old one was, unless something else is asked
// for.
func TestRotateKeeps(t *testing.T) {
	s := newKeys(testservers.Postgres(t))
	end, later := time.Now().Add(time.Hour).Truncate(time.Microsecond), time.Now().Add(2*time.Hour).Truncate(time.Microsecond)
	for name, c := range map[string]struct {
		change admin.NewKey
		prefix string
		end    time.Time
	}{
		"nothing":        {admin.NewKey{}, "tpk_test_", end},
		"a name":         {admin.NewKey{Name: "other"}, "tpk_test_", end},
		"a later end":    {admin.NewKey{ExpiresAt: later}, "tpk_test_", later},
		"no end":         {admin.NewKey{NeverEnds: true}, "tpk_test_", time.Time{}},
		"an environment": {admin.NewKey{Environment: admin.EnvironmentLive}, "tpk_live_", end},
	} {
		old, _, err := s.Create(t.Context(), "org_1", admin.NewKey{Environment: admin.EnvironmentTest, ExpiresAt: end})
		if err != nil {
			t.Fatal(err)
		}
		made, secret, err := s.Rotate(t.Context(), "org_1", old.ID, time.Now(), c.change)
		if err != nil || !strings.HasPrefix(secret.Reveal(), c.prefix) || !made.ExpiresAt.Equal(c.end) {
			t.Errorf("%s: %+v, %v, want %s and an end at %v", name, made, err, c.prefix, c.end)
		}
	}
	if _, _, err := s.Create(t.Context(), "org_1", admin.NewKey{NeverEnds: true, ExpiresAt: end}); err == nil {
		t.Error("a key that never ends has an end")
	}
	if _, _, err := s.Create(t.Context(), "org_1 ", admin.NewKey{}); err == nil {
		t.Error("an organisation with a blank after its id has a key")
	}
}

func TestRotate(t *testing.T) {
	s := newKeys(testservers.Postgres(t))
	ctx, now := t.Context(), time.Now().UTC().Truncate(time.Microsecond)
	old, _, err := s.Create(ctx, "org_1", admin.NewKey{Name: "CI"})
	if err != nil {
		t.Fatal(err)
	}
	made, secret, err := s.Rotate(ctx, "org_1", old.ID, now.Add(time.Hour), admin.NewKey{})
	if err != nil || made.ID == old.ID || made.Name != "CI" || made.State(now) != "active" || !made.ExpiresAt.IsZero() {
		t.Errorf("Rotate = %+v, %v", made, err)
	}
	if key, err := s.Key(ctx, apikey.HashKey(secret.Reveal())); err != nil || key.ID != made.ID {
		t.Errorf("the new key is %+v, %v", key, err)
	}
	if old, err := s.Find(ctx, old.ID); err != nil || !old.ExpiresAt.Equal(now.Add(time.Hour)) {
		t.Errorf("the old key is %+v, %v", old, err)
	}

	// Rotating again does not prolong the old one.
	named, _, err := s.Rotate(ctx, "org_1", old.ID, now.Add(2*time.Hour), admin.NewKey{Name: "CD", ExpiresAt: now.Add(time.Hour)})
	if err != nil || named.Name != "CD" || !named.ExpiresAt.Equal(now.Add(time.Hour)) {
		t.Errorf("Rotate = %+v, %v", named, err)
	}
	if old, err := s.Find(ctx, old.ID); err != nil || !old.ExpiresAt.Equal(now.Add(time.Hour)) {
		t.Errorf("the old key is %+v, %v", old, err)
	}

	if err := s.Deactivate(ctx, "org_1", made.ID); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Rotate(ctx, "org_1", made.ID, now, admin.NewKey{}); !errors.Is(err, admin.ErrKeyDead) {
		t.Errorf("a deactivated key: %v, want ErrKeyDead", err)
	}
	_, _, err = s.Rotate(ctx, "org_1", named.ID, time.Time{}, admin.NewKey{})
	wantInputError(t, err, "until", "say when")

	// At once, from several places: each gets a key.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, _, err := s.Rotate(ctx, "org_1", named.ID, now.Add(time.Minute), admin.NewKey{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if keys, _, err := s.List(ctx, "org_1", admin.Page{}); err != nil || len(keys) != 11 {
		t.Errorf("%d keys, %v, want 11", len(keys), err)
	}
}

// TestManyKeys: all keys of one organisation are ended at once, and those that are long
// dead are forgotten; nobody else's.
func TestManyKeys(t *testing.T) {
	pool := testservers.Postgres(t)
	s := newKeys(pool)
	testservers.Exec(t, pool, `INSERT INTO api_keys (org_id, key_hash, active, expires_at)
		SELECT 'org_' || i % 3, sha256(i::text::bytea), i % 4 > 0, CASE WHEN i % 5 = 0 THEN now() - i * interval '1 day' END FROM generate_series(1, 120) i`)
	if n, err := s.DeactivateAll(t.Context(), "org_1"); n != 30 || err != nil {
		t.Errorf("%d keys were deactivated, %v, want 30", n, err)
	}
	if n, err := s.DeactivateAll(t.Context(), "org_1"); n != 0 || err != nil {
		t.Errorf("and again %d, %v", n, err)
	}
	if n, err := s.Prune(t.Context(), time.Now().Add(-61*24*time.Hour)); n != 12 || err != nil { // 65, 70, ... 120 days ago
		t.Errorf("%d keys were pruned, %v, want 12", n, err)
	}
	var active, all int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FILTER (WHERE active), count(*) FROM api_keys`).Scan(&active, &all); err != nil || all != 108 || active == 0 {
		t.Errorf("%d keys are left, %d active, %v", all, active, err)
	}
	_, err := s.Prune(t.Context(), time.Now().Add(time.Hour))
	wantInputError(t, err, "time", "in the future")
}

func TestKeyLimit(t *testing.T) {
	pool := testservers.Postgres(t)
	s := newKeys(pool)
	testservers.Exec(t, pool, `INSERT INTO api_keys (org_id, key_hash) SELECT 'org_1', sha256(i::text::bytea) FROM generate_series(2, $1) i`, admin.MaxKeysPerOrg)
	last, _, err := s.Create(t.Context(), "org_1", admin.NewKey{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Create(t.Context(), "org_1", admin.NewKey{}); !errors.Is(err, admin.ErrKeyLimit) || !strings.Contains(err.Error(), "1000 keys already: delete some") {
		t.Errorf("Create = %v, want ErrKeyLimit", err)
	}
	if _, _, err := s.Rotate(t.Context(), "org_1", last.ID, time.Now(), admin.NewKey{}); !errors.Is(err, admin.ErrKeyLimit) {
		t.Errorf("Rotate = %v, want ErrKeyLimit", err)
	}
	testservers.Exec(t, pool, `UPDATE api_keys SET expires_at = now() WHERE id <> $1`, last.ID)
	if _, _, err := s.Create(t.Context(), "org_1", admin.NewKey{}); err != nil {
		t.Errorf("Create = %v although all other keys have expired", err)
	}
	if key, err := s.Find(t.Context(), last.ID); err != nil || key.State(time.Now()) != "active" {
		t.Errorf("a rotation that was refused has left the key %s, %v", key.State(time.Now()), err)
	}
	if _, _, err := s.Create(t.Context(), "org_2", admin.NewKey{}); err != nil {
		t.Errorf("another organisation: %v", err)
	}
}

// TestTransaction: all of it is part of the caller's transaction, and refusals do
// not end that.
func TestTransaction(t *testing.T) {
	pool := testservers.Postgres(t)
	ctx := t.Context()
	outside := newKeys(pool)
	existing, err := outside.Import(ctx, "org_0", "a-key-issued-elsewhere", admin.NewKey{})
	if err != nil {
		t.Fatal(err)
	}
	work := func(tx pgx.Tx) error {
		keys, plans := newKeys(tx), newPlans(tx)
		refused := func(err, want error) {
			if !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		}
		_, err := keys.Import(ctx, "org_1", "a-key-issued-elsewhere", admin.NewKey{})
		refused(err, admin.ErrKeyExists)
		refused(keys.Deactivate(ctx, "org_1", existing.ID), apikey.ErrNotFound)
		refused(plans.SetStatus(ctx, "org_1", apikey.PlanActive), apikey.ErrNotFound)
		_, _, err = keys.Create(ctx, "", admin.NewKey{})
		wantInputError(t, err, "organisation", "")
		wantInputError(t, plans.Subscribe(ctx, "org_1", "gold", apikey.PlanActive, time.Time{}), "tier", "define it first")
		info, _, err := keys.Create(ctx, "org_1", admin.NewKey{})
		if err != nil {
			return err
		}
		_, _, err = keys.Rotate(ctx, "org_1", info.ID, time.Now(), admin.NewKey{})
		return errors.Join(err,
			plans.DefineTier(ctx, "starter", true),
			plans.Subscribe(ctx, "org_1", "starter", apikey.PlanActive, time.Time{}),
			keys.Delete(ctx, "org_0", existing.ID))
	}
	count := func() (n int) {
		keys, _, err := outside.List(ctx, "org_1", admin.Page{})
		if err != nil {
			t.Fatal(err)
		}
		return len(keys)
	}
	errUndo := errors.New("undo")
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return errors.Join(work(tx), errUndo) })
	if err == nil || err.Error() != errUndo.Error() || count() != 0 {
		t.Errorf("rolled back: %v, %d keys", err, count())
	}
	if err := pgx.BeginFunc(ctx, pool, work); err != nil || count() != 2 {
		t.Errorf("committed: %v, %d keys, want 2", err, count())
	}
}

func TestPlans(t *testing.T) {
	pool := testservers.Postgres(t)
	s := newPlans(pool)
	ctx := t.Context()
	end := time.Now().Add(time.Hour).UTC().Truncate(time.Microsecond)
	for _, c := range []struct {
		name   string
		change func() error
		want   apikey.Plan
	}{
		{"define", func() error {
			return errors.Join(s.DefineTier(ctx, "starter", true), s.DefineTier(ctx, "basic", false),
				s.Subscribe(ctx, "org_1", "starter", apikey.PlanPending, time.Time{}))
		}, apikey.Plan{Name: "starter", Status: apikey.PlanPending, APIAccess: true}},
		{"pay", func() error { return s.SetStatus(ctx, "org_1", apikey.PlanActive) }, apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true}},
		{"end", func() error { return s.SetEnd(ctx, "org_1", end) }, apikey.Plan{Name: "starter", Status: apikey.PlanActive, APIAccess: true, EndsAt: end}},
		{"downgrade", func() error { return s.SetTier(ctx, "org_1", "basic") }, apikey.Plan{Name: "basic", Status: apikey.PlanActive, EndsAt: end}},
		{"the tier gets the API", func() error { return s.DefineTier(ctx, "basic", true) }, apikey.Plan{Name: "basic", Status: apikey.PlanActive, APIAccess: true, EndsAt: end}},
		{"no end", func() error { return s.SetEnd(ctx, "org_1", time.Time{}) }, apikey.Plan{Name: "basic", Status: apikey.PlanActive, APIAccess: true}},
		{"subscribe anew", func() error { return s.Subscribe(ctx, "org_1", "starter", apikey.PlanCancelled, end) }, apikey.Plan{Name: "starter", Status: apikey.PlanCancelled, APIAccess: true, EndsAt: end}},
	} {
		if err := c.change(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got, err := s.Plan(ctx, "org_1"); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v, want %+v", c.name, got, err, c.want)
		}
	}
	for name, err := range map[string]error{
		"status": s.SetStatus(ctx, "nobody", apikey.PlanActive), "tier": s.SetTier(ctx, "nobody", "starter"), "end": s.SetEnd(ctx, "nobody", end),
	} {
		if !errors.Is(err, apikey.ErrNotFound) {
			t.Errorf("%s of nobody: %v, want ErrNotFound", name, err)
		}
	}
	wantInputError(t, s.SetStatus(ctx, "org_1", "Active"), "status", `"Active" is none of ["active" `)
	wantInputError(t, s.SetTier(ctx, "org_1", "gold"), "tier", "define it first")
	wantInputError(t, s.SetTier(ctx, "org_1", ""), "tier", "1 to 255")
	wantInputError(t, s.DefineTier(ctx, "a\nb", true), "tier", "1 to 255")
	wantInputError(t, s.Subscribe(ctx, "org_1", "gold", apikey.PlanActive, end), "tier", "define it first")
	wantInputError(t, s.Subscribe(ctx, "", "starter", apikey.PlanActive, end), "organisation", "1 to 255")
	wantInputError(t, s.Subscribe(ctx, "org_1", "starter", "", end), "status", "none of")
}
