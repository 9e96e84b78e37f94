package demo

// Keys and plans in PostgreSQL.

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/trackpilots/apikey"
	"github.com/trackpilots/apikey/admin"
	"github.com/trackpilots/apikey/internal/localserver"
	"github.com/trackpilots/apikey/internal/pg"
	"github.com/trackpilots/apikey/migrations"
)

// postgres is a store in a database. It adds rows of organisations called demo-..., and
// removes them in the end.
type postgres struct {
	config *pgxpool.Config
	pool   *pgxpool.Pool // past the links
	server *localserver.Server
	hashes [][]byte // of all keys that were created
	orgs   []string
}

// openTemporary opens the store on a server that ends with the demo.
func openTemporary(ctx context.Context, server *localserver.Server, url string, rows []*row) (store, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		server.Stop()
		return nil, err
	}
	return openPostgres(ctx, config, rows, server)
}

func openPostgres(ctx context.Context, config *pgxpool.Config, rows []*row, server *localserver.Server) (_ store, err error) {
	p := &postgres{config: config, server: server}
	defer func() {
		if err != nil {
			p.end()
		}
	}()
	if p.pool, err = pgxpool.NewWithConfig(ctx, config); err != nil {
		return nil, err
	}
	if err := migrations.Apply(ctx, p.pool); err != nil {
		return nil, err
	}
	err = pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO plan_catalogue (name, api_access) VALUES ($1, true), ($2, false) ON CONFLICT DO NOTHING`, starter, basic)
		for _, r := range rows {
			err = errors.Join(err, p.insert(ctx, tx, r))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("adding the demo's rows: %w", err)
	}
	return p, nil
}

// insert adds a row in its first state, which package admin cannot: a key may have expired.
func (p *postgres) insert(ctx context.Context, tx pgx.Tx, r *row) error {
	err := tx.QueryRow(ctx, `INSERT INTO api_keys (org_id, name, key_hash, active, expires_at, environment) VALUES ($1, 'demo', $2, $3, $4, 'test')
		RETURNING id::text`, r.orgID, r.hash[:], r.key.Active, pg.NullTime(r.key.ExpiresAt)).Scan(&r.keyID)
	if err != nil {
		return err
	}
	p.hashes, p.orgs = append(p.hashes, r.hash[:]), append(p.orgs, r.orgID)
	if r.plan == nil {
		return nil
	}
	_, err = tx.Exec(ctx, `INSERT INTO org_plans (org_id, plan, status, ends_at) VALUES ($1, $2, $3, $4)
		ON CONFLICT (org_id) DO UPDATE SET plan = excluded.plan, status = excluded.status, ends_at = excluded.ends_at`,
		r.orgID, r.plan.Name, r.plan.Status, pg.NullTime(r.plan.EndsAt))
	return err
}

func (p *postgres) open(ctx context.Context, l *links) (replicaStores, error) {
	behind := func(one *link, connections int32) (*pgxpool.Pool, error) {
		config := p.config.Copy()
		config.MaxConns, config.MinConns = connections, 0
		config.ConnConfig.ConnectTimeout = time.Second
		config.ConnConfig.DialFunc = one.dial
		return pgxpool.NewWithConfig(ctx, config)
	}
	lookups, err := behind(l.database, 4)
	if err != nil {
		return replicaStores{}, err
	}
	// Apart from the lookups, so that announcements can be lost while these work.
	announcements, err := behind(l.announcements, 1)
	if err != nil {
		lookups.Close()
		return replicaStores{}, err
	}
	return replicaStores{
		keys: apikey.NewPostgresKeyStore(lookups), plans: apikey.NewPostgresPlanStore(lookups),
		watch: func(ctx context.Context, cache *apikey.Cache) { _ = cache.Watch(ctx, announcements) }, // fails only if it is called twice
		close: func() { lookups.Close(); announcements.Close() },
	}, nil
}

func (p *postgres) facts(ctx context.Context, rows []*row) (f facts, err error) {
	var hashes []apikey.KeyHash
	var orgs []string
	for _, r := range rows {
		hashes, orgs = append(hashes, r.hash), append(orgs, r.orgID)
	}
	if f.keys, err = apikey.NewPostgresKeyStore(p.pool).Keys(ctx, hashes); err != nil {
		return f, err
	}
	f.plans, err = apikey.NewPostgresPlanStore(p.pool).Plans(ctx, orgs)
	return f, err
}

func (p *postgres) change(ctx context.Context, action string, r *row) (created *row, err error) {
	keys, plans := admin.NewKeys(p.pool), admin.NewPlans(p.pool)
	switch action {
	case deactivate:
		err = keys.Deactivate(ctx, r.orgID, r.keyID)
	case activate:
		err = errors.Join(keys.Activate(ctx, r.orgID, r.keyID), keys.Expire(ctx, r.orgID, r.keyID, time.Time{}))
	case remove:
		err = keys.Delete(ctx, r.orgID, r.keyID)
	case expire:
		err = keys.Expire(ctx, r.orgID, r.keyID, time.Now())
	case rotate, create:
		var info admin.KeyInfo
		var secret admin.Secret
		if action == rotate {
			info, secret, err = keys.Rotate(ctx, r.orgID, r.keyID, time.Now().Add(overlap), admin.NewKey{})
		} else {
			info, secret, err = keys.Create(ctx, r.orgID, admin.NewKey{Name: "demo", Environment: admin.EnvironmentTest})
		}
		if err == nil {
			created = newRow(r.orgID, info.ID, secret.Reveal())
			p.hashes = append(p.hashes, created.hash[:])
		}
	case renew:
		err = plans.Subscribe(ctx, r.orgID, starter, apikey.PlanActive, time.Time{})
	case endPlan:
		err = plans.Subscribe(ctx, r.orgID, starter, apikey.PlanExpired, time.Time{})
	case downgrade:
		err = plans.Subscribe(ctx, r.orgID, basic, apikey.PlanActive, time.Time{})
	case closeTier, openTier:
		err = plans.DefineTier(ctx, starter, action == openTier)
	default:
		err = errNoAction
	}
	if errors.Is(err, apikey.ErrNotFound) {
		err = errDeleted
	}
	return created, err
}

// close removes the rows. A tier that another demo uses stays.
func (p *postgres) close() error {
	defer p.end()
	if p.server != nil {
		return nil // it is removed with everything
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var b pgx.Batch
	b.Queue(`DELETE FROM api_keys WHERE key_hash = ANY ($1)`, p.hashes)
	b.Queue(`DELETE FROM org_plans o WHERE org_id = ANY ($1) AND NOT EXISTS (SELECT FROM api_keys k WHERE k.org_id = o.org_id)`, p.orgs)
	b.Queue(`DELETE FROM plan_catalogue c WHERE name IN ($1, $2) AND NOT EXISTS (SELECT FROM org_plans o WHERE o.plan = c.name)`, starter, basic)
	if err := p.pool.SendBatch(ctx, &b).Close(); err != nil {
		return fmt.Errorf("removing the demo's rows: %w", err)
	}
	return nil
}

// end closes the connections, and stops the server if it is ours.
func (p *postgres) end() {
	if p.pool != nil {
		p.pool.Close()
	}
	if p.server != nil {
		p.server.Stop()
	}
}
