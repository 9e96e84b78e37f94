-- Announcements through a table, so that transactions which write keys and plans never run
-- NOTIFY. Large changes make few announcements, and logical replication announces, too.
--
-- NOTIFY takes a lock that all notifying transactions of the server hold until they have
-- committed, so that they commit one after the other. It fails in a transaction that is
-- prepared (two-phase commit), and at commit if the notification queue is full.

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
-- The replicas announce it: see apikey_announce.

-- Changes that were not announced yet. UNLOGGED, since nobody needs them after a crash: the
-- listeners start again then, and trust nothing that was read before.
CREATE UNLOGGED TABLE apikey_outbox (
    xid     xid8        NOT NULL DEFAULT pg_catalog.pg_current_xact_id(),
    kind    text        NOT NULL,
    subject text,
    at      timestamptz NOT NULL DEFAULT now()
);

-- The functions run with the rights of the owner, so that the roles that write or read keys
-- and plans need no rights on this table.
DO $do$
BEGIN
EXECUTE pg_catalog.format($format$

-- apikey_announce announces what was committed and not announced yet, on the channel
-- apikey_changes, and returns a snapshot. Everything that this snapshot sees was announced,
-- by this call or by a transaction that has committed before. So it waits for others that
-- are announcing. The replicas call it again and again.
CREATE FUNCTION apikey_announce() RETURNS text LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    -- All names have a schema, and no operator is used, so that the caller's search_path
    -- does not matter. To set one here would take a third of the time.
    snapshot CONSTANT text := pg_catalog.pg_current_snapshot()::pg_catalog.text;
    payload  pg_catalog.text;
BEGIN
    IF EXISTS (SELECT FROM %1$I.apikey_outbox) THEN
        FOR payload IN
            WITH gone AS (DELETE FROM %1$I.apikey_outbox RETURNING kind, xid, subject)
            SELECT pg_catalog.concat_ws(' ', kind, xid, subject) FROM gone
        LOOP
            PERFORM pg_catalog.pg_notify('apikey_changes', payload);
        END LOOP;
    END IF;
    RETURN snapshot;
END $$;

-- The first 1,000 rows that a transaction changes are announced one by one. The next one
-- announces all keys, or all plans, and further ones announce nothing. The setting that
-- counts is local to the transaction, and is rolled back to savepoints like the rows.
--
-- These are row triggers that count, and not statement triggers with transition tables:
-- transition tables copy the rows of every UPDATE, even of columns that nobody reads, and
-- the apply workers of logical replication do not fire statement triggers. The argument is
-- the kind.
CREATE FUNCTION apikey_announce_row() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = %1$I, pg_temp AS $$
DECLARE
    most      CONSTANT integer := 1000;
    kind      CONSTANT text := TG_ARGV[0];
    setting   CONSTANT text := 'apikey.announced_' || kind;
    announced CONSTANT integer := coalesce(nullif(pg_catalog.current_setting(setting, true), ''), '0')::integer;
    was       text;
    is_now    text;
BEGIN
    IF announced > most THEN
        RETURN NULL;
    END IF;
    PERFORM pg_catalog.set_config(setting, (announced + 1)::text, true);
    IF announced = most THEN
        INSERT INTO apikey_outbox (kind) VALUES (kind || 's');
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
    INSERT INTO apikey_outbox (kind, subject)
        SELECT kind, s FROM (VALUES (was), (is_now)) AS v (s) WHERE s IS NOT NULL GROUP BY s;

    -- Where no replica listens nobody takes the rows away.
    IF pg_catalog.random() < 0.001 AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_locks JOIN pg_catalog.pg_database d ON d.oid = database
        WHERE datname = pg_catalog.current_database() AND locktype = 'advisory' AND classid = 1634757477) THEN
        DELETE FROM apikey_outbox WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM apikey_outbox WHERE at < now() - interval '1 hour' LIMIT 10000 FOR UPDATE SKIP LOCKED));
    END IF;
    RETURN NULL;
END $$;

-- The argument is the kind, in the plural.
CREATE FUNCTION apikey_announce_all() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = %1$I, pg_temp AS $$
BEGIN
    INSERT INTO apikey_outbox (kind) VALUES (TG_ARGV[0]);
    RETURN NULL;
END $$;

CREATE FUNCTION apikey_announce_tier() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = %1$I, pg_temp AS $$
BEGIN
    INSERT INTO apikey_outbox (kind, subject) SELECT 'tier', s FROM (VALUES (OLD.name), (NEW.name)) AS v (s) GROUP BY s;
    RETURN NULL;
END $$

$format$, pg_catalog.current_schema());
END $do$;

-- WHEN, and not UPDATE OF, which looks at the columns that the statement names and misses
-- what another trigger changes in the row.

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

-- The apply workers of logical replication, and sessions with session_replication_role =
-- replica, fire only triggers that are enabled ALWAYS.
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_truncate;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_truncate;
ALTER TABLE plan_catalogue ENABLE ALWAYS TRIGGER apikey_announce_update;
-- +goose StatementEnd
