-- Keys, plans, and the triggers that announce their changes. PostgreSQL 13 or later.
-- Some comments are instructions for goose; other tools ignore them.

-- +goose Up
-- +goose StatementBegin
CREATE TABLE api_keys (
    id           uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id       text        NOT NULL CHECK (octet_length(org_id) BETWEEN 1 AND 255),
    name         text        NOT NULL DEFAULT '' CHECK (char_length(name) <= 255),
    hint         text        NOT NULL DEFAULT '' CHECK (char_length(hint) <= 16),
    key_hash     bytea       NOT NULL UNIQUE CHECK (octet_length(key_hash) = 32),
    active       boolean     NOT NULL DEFAULT true,
    expires_at   timestamptz CHECK (isfinite(expires_at)),
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz
);
CREATE INDEX api_keys_org_id_created_at_id_idx ON api_keys (org_id, created_at, id);

COMMENT ON COLUMN api_keys.key_hash IS 'SHA-256 of the key. The key itself is stored nowhere.';
COMMENT ON COLUMN api_keys.hint IS 'The first characters of the key''s random part, to tell keys apart.';
COMMENT ON COLUMN api_keys.expires_at IS 'First instant at which the key is dead. NULL: never.';

CREATE TABLE plan_catalogue (
    name       text    PRIMARY KEY CHECK (octet_length(name) BETWEEN 1 AND 255),
    api_access boolean NOT NULL
);

CREATE TABLE org_plans (
    org_id     text        PRIMARY KEY CHECK (octet_length(org_id) BETWEEN 1 AND 255),
    plan       text        NOT NULL REFERENCES plan_catalogue (name) ON UPDATE CASCADE,
    status     text        NOT NULL CHECK (octet_length(status) BETWEEN 1 AND 63),
    ends_at    timestamptz CHECK (isfinite(ends_at)),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX org_plans_plan_idx ON org_plans (plan);

COMMENT ON COLUMN org_plans.status IS 'Only ''active'' admits. Any other word, known or not, refuses.';
COMMENT ON COLUMN org_plans.ends_at IS 'First instant at which the plan no longer holds. NULL: no end.';

-- Every change of a column that authentication reads is announced on the channel
-- apikey_changes, with the transaction that made it:
--
--     key <xid> <first 8 bytes of key_hash, in hex>
--     plan <xid> <org_id>
--     all <xid>
--
-- Postgres delivers the notice after the commit, and never after a rollback.

CREATE FUNCTION apikey_announce_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_catalog.pg_notify('apikey_changes', 'key ' || pg_catalog.pg_current_xact_id()::text
            || ' ' || pg_catalog.encode(pg_catalog.substring(OLD.key_hash, 1, 8), 'hex'));
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM pg_catalog.pg_notify('apikey_changes', 'key ' || pg_catalog.pg_current_xact_id()::text
            || ' ' || pg_catalog.encode(pg_catalog.substring(NEW.key_hash, 1, 8), 'hex'));
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION apikey_announce_plan() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        PERFORM pg_catalog.pg_notify('apikey_changes',
            'plan ' || pg_catalog.pg_current_xact_id()::text || ' ' || OLD.org_id);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        PERFORM pg_catalog.pg_notify('apikey_changes',
            'plan ' || pg_catalog.pg_current_xact_id()::text || ' ' || NEW.org_id);
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION apikey_announce_all() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('apikey_changes', 'all ' || pg_catalog.pg_current_xact_id()::text);
    RETURN NULL;
END $$;

-- WHEN, and not UPDATE OF: that one looks at the columns a statement names, and
-- misses what another trigger changes in the row.

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_key();
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.org_id, OLD.key_hash, OLD.active, OLD.expires_at)
        IS DISTINCT FROM (NEW.id, NEW.org_id, NEW.key_hash, NEW.active, NEW.expires_at))
    EXECUTE FUNCTION apikey_announce_key();
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all();

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON org_plans
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_plan();
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON org_plans FOR EACH ROW
    WHEN ((OLD.org_id, OLD.plan, OLD.status, OLD.ends_at)
        IS DISTINCT FROM (NEW.org_id, NEW.plan, NEW.status, NEW.ends_at))
    EXECUTE FUNCTION apikey_announce_plan();
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON org_plans
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all();

-- A tier concerns every organisation on it, and those about to move to it.
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON plan_catalogue FOR EACH ROW
    WHEN (OLD.api_access IS DISTINCT FROM NEW.api_access)
    EXECUTE FUNCTION apikey_announce_all();
-- +goose StatementEnd
