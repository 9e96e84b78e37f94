-- Announcements that stay small when a change is large, and that replication makes too.

-- +goose Up
-- +goose StatementBegin
DROP TRIGGER apikey_announce_insert_delete ON api_keys;
DROP TRIGGER apikey_announce_update ON api_keys;
DROP TRIGGER apikey_announce_truncate ON api_keys;
DROP TRIGGER apikey_announce_insert_delete ON org_plans;
DROP TRIGGER apikey_announce_update ON org_plans;
DROP TRIGGER apikey_announce_truncate ON org_plans;
DROP TRIGGER apikey_announce_update ON plan_catalogue;
DROP FUNCTION apikey_announce_key, apikey_announce_plan, apikey_announce_all;

-- Every change of a column that authentication reads is announced on the channel
-- apikey_changes, with the transaction that made it:
--
--     key <xid> <first 8 bytes of key_hash, in hex>
--     keys <xid>             all keys
--     plan <xid> <org_id>
--     plans <xid>            all plans
--     tier <xid> <name>      all plans of the tier
--
-- Postgres delivers the notice after the commit, and never after a rollback.

-- The first 1,000 rows that a transaction changes are announced one by one. With one
-- more, all keys, or all plans, are announced once, and the rest is silent. The
-- setting that counts ends with the transaction, and goes back to a savepoint with it,
-- as the notices do.
--
-- These are row triggers that count, and not statement triggers with transition
-- tables: those copy the rows of every UPDATE, also of columns that nobody reads, and
-- the apply workers of logical replication do not fire them. The argument is the kind.
CREATE FUNCTION apikey_announce_row() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most      CONSTANT integer := 1000;
    kind      CONSTANT text := TG_ARGV[0];
    setting   CONSTANT text := 'apikey.announced_' || kind;
    announced CONSTANT integer := coalesce(nullif(pg_catalog.current_setting(setting, true), ''), '0')::integer;
    xid       text;
    was       text;
    is_now    text;
BEGIN
    IF announced > most THEN
        RETURN NULL;
    END IF;
    PERFORM pg_catalog.set_config(setting, (announced + 1)::text, true);
    xid := pg_catalog.pg_current_xact_id()::text;
    IF announced = most THEN
        PERFORM pg_catalog.pg_notify('apikey_changes', kind || 's ' || xid);
        RETURN NULL;
    END IF;
    IF kind = 'key' THEN
        IF TG_OP <> 'INSERT' THEN
            was := pg_catalog.encode(pg_catalog.substring(OLD.key_hash, 1, 8), 'hex');
        END IF;
        IF TG_OP <> 'DELETE' THEN
            is_now := pg_catalog.encode(pg_catalog.substring(NEW.key_hash, 1, 8), 'hex');
        END IF;
    ELSE
        IF TG_OP <> 'INSERT' THEN
            was := OLD.org_id;
        END IF;
        IF TG_OP <> 'DELETE' THEN
            is_now := NEW.org_id;
        END IF;
    END IF;
    IF was IS NOT NULL THEN
        PERFORM pg_catalog.pg_notify('apikey_changes', kind || ' ' || xid || ' ' || was);
    END IF;
    IF is_now IS DISTINCT FROM was AND is_now IS NOT NULL THEN
        PERFORM pg_catalog.pg_notify('apikey_changes', kind || ' ' || xid || ' ' || is_now);
    END IF;
    RETURN NULL;
END $$;

-- The argument is the kind, in the plural.
CREATE FUNCTION apikey_announce_all() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('apikey_changes', TG_ARGV[0] || ' ' || pg_catalog.pg_current_xact_id()::text);
    RETURN NULL;
END $$;

CREATE FUNCTION apikey_announce_tier() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('apikey_changes', 'tier ' || pg_catalog.pg_current_xact_id()::text || ' ' || OLD.name);
    IF NEW.name <> OLD.name THEN
        PERFORM pg_catalog.pg_notify('apikey_changes', 'tier ' || pg_catalog.pg_current_xact_id()::text || ' ' || NEW.name);
    END IF;
    RETURN NULL;
END $$;

-- WHEN, and not UPDATE OF: that one looks at the columns a statement names, and
-- misses what another trigger changes in the row.

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_row('key');
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.org_id, OLD.key_hash, OLD.active, OLD.expires_at)
        IS DISTINCT FROM (NEW.id, NEW.org_id, NEW.key_hash, NEW.active, NEW.expires_at))
    EXECUTE FUNCTION apikey_announce_row('key');
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all('keys');

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON org_plans
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_row('plan');
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON org_plans FOR EACH ROW
    WHEN ((OLD.org_id, OLD.plan, OLD.status, OLD.ends_at)
        IS DISTINCT FROM (NEW.org_id, NEW.plan, NEW.status, NEW.ends_at))
    EXECUTE FUNCTION apikey_announce_row('plan');
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON org_plans
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all('plans');

CREATE TRIGGER apikey_announce_update AFTER UPDATE ON plan_catalogue FOR EACH ROW
    WHEN (OLD.api_access IS DISTINCT FROM NEW.api_access)
    EXECUTE FUNCTION apikey_announce_tier();

-- The apply workers of logical replication, and sessions with session_replication_role
-- set to replica, fire only triggers that are always enabled.
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_truncate;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_truncate;
ALTER TABLE plan_catalogue ENABLE ALWAYS TRIGGER apikey_announce_update;
-- +goose StatementEnd
