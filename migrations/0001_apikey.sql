-- Keys, plans, and what announces their changes. PostgreSQL 13 or later.
--
-- Run this as a role that is to own the tables and has no other rights, and not as a
-- superuser: some of the functions run with the rights of their owner.
--
-- Some comments are instructions for goose; other tools ignore them.

-- +goose Up
-- +goose StatementBegin
CREATE TABLE api_keys (
    id          uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    org_id      text        NOT NULL CHECK (octet_length(org_id) BETWEEN 1 AND 255),
    name        text        NOT NULL DEFAULT '' CHECK (char_length(name) <= 255),
    hint        text        NOT NULL DEFAULT '' CHECK (char_length(hint) <= 16),
    key_hash    bytea       NOT NULL UNIQUE CHECK (octet_length(key_hash) = 32),
    active      boolean     NOT NULL DEFAULT true,
    expires_at  timestamptz CHECK (isfinite(expires_at)),
    created_at  timestamptz NOT NULL DEFAULT now(),
    environment text        NOT NULL DEFAULT '' CHECK (environment IN ('', 'live', 'test'))
);
CREATE INDEX api_keys_org_id_created_at_id_idx ON api_keys (org_id, created_at, id);

COMMENT ON COLUMN api_keys.key_hash IS 'SHA-256 of the key. The key itself is stored nowhere.';
COMMENT ON COLUMN api_keys.hint IS 'The first characters of the key''s random part, to tell keys apart.';
COMMENT ON COLUMN api_keys.expires_at IS 'First instant at which the key is dead. NULL: never.';
COMMENT ON COLUMN api_keys.environment IS 'What the key says, live or test. Empty: it was issued elsewhere and says nothing.';

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

-- When keys were last used, in a separate table: the rows of api_keys stay narrow, and
-- changing a key does not wait for the recording of uses.
CREATE TABLE api_key_uses (
    key_id       uuid        PRIMARY KEY REFERENCES api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    last_used_at timestamptz NOT NULL CHECK (isfinite(last_used_at))
) WITH (fillfactor = 80);

-- Every change of a column that authentication reads leaves a row in the outbox, and is
-- announced from there on the channel apikey_changes:
--
--     kind transaction [subject]
--
--     key <xid> <first 8 bytes of key_hash>    one key
--     keys-of <xid> <word of org_id>           all keys of an organisation
--     keys-new <xid>                           keys that were not there
--     keys <xid>                               all keys
--     plan <xid> <word of org_id>              the plan of an organisation
--     plans-new <xid>                          plans that were not there
--     tier <xid> <word of name>                all plans of a tier
--     plans <xid>                              all plans
--     all <xid>                                all keys and plans
--
-- A subject is a word of 16 hexadecimal digits. Names become the first 8 bytes of the SHA-256 of their
-- UTF-8 text, so that whoever listens does not read them. Later versions may add words. They
-- may add kinds, too: who does not know a kind takes it for "all", unless it begins with "?".

-- A role that may INSERT (kind, subject) can announce changes of tables of its own: the other columns
-- are not for it to choose. UNLOGGED, since nobody needs the rows after a crash: the listeners start
-- again then, and trust nothing that was read before. The primary key finds what is new without
-- looking at what was deleted, which VACUUM cannot remove while an older transaction is open.
CREATE UNLOGGED TABLE apikey_outbox (
    xid     xid8        NOT NULL DEFAULT pg_current_xact_id(),
    kind    text        NOT NULL CHECK (octet_length(kind) <= 63),
    subject text        NOT NULL DEFAULT '' CHECK (octet_length(subject) <= 255),
    at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (xid, kind, subject)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

-- How far announcing has come: one row, or none after a crash.
CREATE UNLOGGED TABLE apikey_announced (
    one      boolean PRIMARY KEY DEFAULT true CHECK (one),
    seen     pg_snapshot, -- everything that this snapshot sees was announced
    leftover pg_snapshot  -- rows that this one sees are still in the outbox, and are to be deleted; NULL: there are none
);

-- Settings, for all replicas of this database.
CREATE TABLE apikey_settings (
    one            boolean  PRIMARY KEY DEFAULT true CHECK (one),
    announce_every interval NOT NULL DEFAULT '20 milliseconds' CHECK (announce_every BETWEEN '5 milliseconds' AND '1 minute')
);
INSERT INTO apikey_settings DEFAULT VALUES;

COMMENT ON COLUMN apikey_settings.announce_every IS 'How often changes are announced. More often costs more, less often takes longer.';

DO $do$
DECLARE
    -- Names in this block are looked up in pg_catalog only, whatever others have put into the schema.
    path   CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    schema CONSTANT pg_catalog.text := pg_catalog.current_schema();
    given  record;
BEGIN
PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

-- These functions have the rights of their owner, so that roles that write or read keys and
-- plans need none on the outbox. Their search_path has no schema in which others may create
-- types, functions or operators: what is not in pg_catalog is named with its schema.
EXECUTE format($format$

-- apikey_announce announces what was committed and not announced yet, and returns a snapshot.
-- Everything that this snapshot sees was announced, by this call or by a transaction that has
-- committed before: it waits for others that are announcing. It also returns the milliseconds
-- after which it should be called again. Later versions may add columns. It must not be called
-- in a transaction that has written: its snapshot would see changes that are still to come.
CREATE FUNCTION %1$I.apikey_announce(OUT snapshot text, OUT again_after integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    one_by_one CONSTANT bigint := 10000; -- if more is waiting, everything is announced at once
    now_seen   CONSTANT pg_snapshot := pg_current_snapshot();
    upto       CONSTANT xid8 := pg_snapshot_xmax(now_seen); -- rows from here on were restored from another server, or are for the next call
    place      %1$I.apikey_announced;
    running    xid8[];
    since      xid8;
    waiting    bigint;
    announced  bigint;
    restored   boolean; -- the place is that of another server
BEGIN
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE 'apikey_announce is called in a transaction that has written: call it in one of its own';
    END IF;
    snapshot := now_seen;
    SELECT extract(epoch FROM announce_every) * 1000 INTO again_after FROM %1$I.apikey_settings WHERE one;
    again_after := coalesce(again_after, 20);

    SELECT * INTO place FROM %1$I.apikey_announced WHERE one;
    FOR attempt IN 1..2 LOOP -- without the lock, then with it
        restored := coalesce(greatest(pg_snapshot_xmax(place.seen), pg_snapshot_xmax(place.leftover)) > upto, false);
        IF place.seen IS NULL OR restored THEN
            place.seen := '1:1:';
            place.leftover := NULL;
        END IF;
        running := ARRAY(SELECT pg_snapshot_xip(place.seen));
        since := pg_snapshot_xmax(place.seen);
        SELECT count(*) INTO waiting FROM (
            SELECT 1 FROM %1$I.apikey_outbox WHERE xid = ANY (running)
            UNION ALL SELECT 1 FROM %1$I.apikey_outbox WHERE xid >= since AND xid < upto
            LIMIT one_by_one + 1) AS w;
        IF waiting = 0 AND place.leftover IS NULL AND NOT restored THEN
            RETURN;
        END IF;
        IF attempt = 1 THEN
            IF place.one IS NULL THEN
                INSERT INTO %1$I.apikey_announced DEFAULT VALUES ON CONFLICT DO NOTHING;
            END IF;
            SELECT * INTO place FROM %1$I.apikey_announced WHERE one FOR UPDATE; -- waits for others that are announcing
        END IF;
    END LOOP;

    IF waiting > one_by_one THEN
        -- No record that misses any of these changes has seen this transaction.
        PERFORM pg_notify('apikey_changes', 'all ' || pg_current_xact_id());
        UPDATE %1$I.apikey_announced SET seen = now_seen, leftover = now_seen WHERE one;
        RETURN;
    END IF;
    WITH older AS (DELETE FROM %1$I.apikey_outbox WHERE xid = ANY (running) RETURNING kind, xid, subject),
    newer AS (DELETE FROM %1$I.apikey_outbox WHERE xid >= since AND xid < upto RETURNING kind, xid, subject)
    SELECT count(pg_notify('apikey_changes', CASE WHEN kind ~ '^[?]?[a-z-]{1,62}$' AND subject ~ '^[A-Za-z0-9_.:-]{0,255}$'
        THEN concat_ws(' ', kind, xid, nullif(subject, '')) ELSE 'all ' || xid END)) INTO announced
    FROM (SELECT * FROM older UNION ALL SELECT * FROM newer) AS gone;
    IF announced < waiting THEN -- apikey_tidy has taken some, and what stands for them is for the next call
        PERFORM pg_notify('apikey_changes', 'all ' || pg_current_xact_id());
    END IF;
    -- Now and then, since old versions of this row cannot be vacuumed either.
    IF restored OR random() < announced / 500.0 THEN
        UPDATE %1$I.apikey_announced SET seen = now_seen, leftover = place.leftover WHERE one;
    END IF;
    IF place.leftover IS NOT NULL THEN
        -- A transaction that has notified cannot be prepared, and so keep others waiting for ever.
        PERFORM pg_notify('apikey_changes', '?cleared ' || pg_current_xact_id());
        DELETE FROM %1$I.apikey_outbox WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM %1$I.apikey_outbox
            WHERE xid < pg_snapshot_xmax(place.leftover) AND pg_visible_in_snapshot(xid, place.leftover) ORDER BY xid LIMIT one_by_one));
        IF NOT FOUND THEN
            UPDATE %1$I.apikey_announced SET leftover = NULL WHERE one;
        END IF;
    END IF;
END $$;

-- The triggers announce the first 1,000 rows that a transaction changes one by one. Of more
-- rows they announce what can have changed and no more: an INSERT concerns keys that were not
-- there, other changes of keys the organisation, and what was dead and is deleted nobody.
--
-- How many rows there were is a setting of the transaction, which is rolled back to savepoints
-- like the rows. Whoever sets it himself makes his announcements finer or coarser, and cannot
-- suppress them: every row leaves something that covers it.
--
-- These are row triggers, and not statement triggers with transition tables: these would copy
-- the rows of every UPDATE, even of columns that nobody reads, and the apply workers of
-- logical replication do not fire them.

CREATE FUNCTION %1$I.apikey_announce_key() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one_by_one CONSTANT integer := 1000; -- rows; then as many organisations
    done       integer := coalesce(nullif(current_setting('apikey.announced_keys', true), ''), '0');
BEGIN
    IF done < one_by_one THEN
        INSERT INTO %1$I.apikey_outbox (kind, subject)
            SELECT 'key', encode(substring(hash, 1, 8), 'hex') FROM (VALUES (OLD.key_hash), (NEW.key_hash)) AS v (hash) WHERE hash IS NOT NULL
            ON CONFLICT DO NOTHING;
        PERFORM set_config('apikey.announced_keys', (done + 1)::text, true);
        IF random() < 0.001 THEN
            PERFORM %1$I.apikey_tidy();
        END IF;
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.key_hash <> OLD.key_hash THEN
        INSERT INTO %1$I.apikey_outbox (kind) VALUES ('keys-new') ON CONFLICT DO NOTHING;
    END IF;
    IF TG_OP = 'UPDATE' OR TG_OP = 'DELETE' AND OLD.active AND coalesce(OLD.expires_at > now() - interval '1 hour', true) THEN
        IF done < 2 * one_by_one THEN
            INSERT INTO %1$I.apikey_outbox (kind, subject)
                VALUES ('keys-of', encode(substring(sha256(convert_to(OLD.org_id, 'UTF8')), 1, 8), 'hex')) ON CONFLICT DO NOTHING;
            IF FOUND THEN
                PERFORM set_config('apikey.announced_keys', (done + 1)::text, true);
            END IF;
        ELSE
            INSERT INTO %1$I.apikey_outbox (kind) VALUES ('keys') ON CONFLICT DO NOTHING;
        END IF;
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION %1$I.apikey_announce_plan() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one_by_one CONSTANT integer := 1000;
    done       integer := coalesce(nullif(current_setting('apikey.announced_plans', true), ''), '0');
BEGIN
    IF done < one_by_one THEN
        INSERT INTO %1$I.apikey_outbox (kind, subject)
            SELECT 'plan', encode(substring(sha256(convert_to(org, 'UTF8')), 1, 8), 'hex')
            FROM (VALUES (OLD.org_id), (NEW.org_id)) AS v (org) WHERE org IS NOT NULL
            ON CONFLICT DO NOTHING;
        PERFORM set_config('apikey.announced_plans', (done + 1)::text, true);
        IF random() < 0.001 THEN
            PERFORM %1$I.apikey_tidy();
        END IF;
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.org_id <> OLD.org_id THEN
        INSERT INTO %1$I.apikey_outbox (kind) VALUES ('plans-new') ON CONFLICT DO NOTHING;
    END IF;
    IF TG_OP = 'UPDATE' OR TG_OP = 'DELETE' AND OLD.status = 'active' AND coalesce(OLD.ends_at > now() - interval '1 hour', true) THEN
        INSERT INTO %1$I.apikey_outbox (kind) VALUES ('plans') ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;

-- A tier concerns the plans that are on it, and those that named it before it was there.
CREATE FUNCTION %1$I.apikey_announce_tier() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO %1$I.apikey_outbox (kind, subject)
        SELECT 'tier', encode(substring(sha256(convert_to(tier, 'UTF8')), 1, 8), 'hex')
        FROM (VALUES (OLD.name), (NEW.name)) AS v (tier) WHERE tier IS NOT NULL
        ON CONFLICT DO NOTHING;
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND NEW.name <> OLD.name THEN
        INSERT INTO %1$I.apikey_outbox (kind) VALUES ('plans-new') ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;

-- The argument is the kind.
CREATE FUNCTION %1$I.apikey_announce_all() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO %1$I.apikey_outbox (kind) VALUES (TG_ARGV[0]) ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;

-- Where no replica announces, nobody takes rows away. So one change in a thousand replaces old
-- rows by one that covers them all: "all" with its own transaction, which is newer.
CREATE FUNCTION %1$I.apikey_tidy() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN; -- the writer would fail if another one does the same
    END IF;
    IF EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = 1634757477 AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND objid = hashtext((SELECT c.oid::text FROM pg_class c WHERE relname = 'apikey_outbox' AND relnamespace = quote_ident(%1$L)::regnamespace))::oid) THEN
        RETURN;
    END IF;
    DELETE FROM %1$I.apikey_outbox WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM %1$I.apikey_outbox WHERE at < now() - interval '1 hour' ORDER BY xid LIMIT 10000 FOR UPDATE SKIP LOCKED));
    IF FOUND THEN
        INSERT INTO %1$I.apikey_outbox (kind) VALUES ('all') ON CONFLICT DO NOTHING;
    END IF;
END $$

$format$, schema);

-- Functions belong to everybody at first, and a platform may give new tables and functions to
-- roles of its own by default. These are for the owner, until he grants them to others.
FOR given IN
    SELECT format('%s %s FROM %s', what, object, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END) AS away
    FROM (
        SELECT 'FUNCTION' AS what, p.oid::regprocedure::text AS object, a.grantee
        FROM pg_proc p, aclexplode(coalesce(proacl, acldefault('f', proowner))) a
        WHERE pronamespace = quote_ident(schema)::regnamespace AND proname LIKE 'apikey\_%' AND a.grantee <> proowner
        UNION
        SELECT 'TABLE', c.oid::regclass::text, a.grantee
        FROM pg_class c, aclexplode(coalesce(relacl, acldefault('r', relowner))) a
        WHERE relnamespace = quote_ident(schema)::regnamespace AND a.grantee <> relowner
            AND relname IN ('api_keys', 'plan_catalogue', 'org_plans', 'api_key_uses', 'apikey_outbox', 'apikey_announced', 'apikey_settings', 'apikey_migrations')
    ) AS g
LOOP
    EXECUTE 'REVOKE ALL ON ' || given.away;
    IF given.away NOT LIKE 'FUNCTION % FROM PUBLIC' THEN
        RAISE NOTICE 'revoked what a default privilege had granted: %', given.away;
    END IF;
END LOOP;

PERFORM set_config('search_path', path, true);
END $do$;

-- WHEN, and not UPDATE OF, which looks at the columns that the statement names and misses
-- what another trigger changes in the row.

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_key();
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON api_keys FOR EACH ROW
    WHEN ((OLD.id, OLD.org_id, OLD.key_hash, OLD.active, OLD.expires_at)
        IS DISTINCT FROM (NEW.id, NEW.org_id, NEW.key_hash, NEW.active, NEW.expires_at))
    EXECUTE FUNCTION apikey_announce_key();
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all('keys');

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON org_plans
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_plan();
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON org_plans FOR EACH ROW
    WHEN ((OLD.org_id, OLD.plan, OLD.status, OLD.ends_at)
        IS DISTINCT FROM (NEW.org_id, NEW.plan, NEW.status, NEW.ends_at))
    EXECUTE FUNCTION apikey_announce_plan();
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON org_plans
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all('plans');

CREATE TRIGGER apikey_announce_insert_delete AFTER INSERT OR DELETE ON plan_catalogue
    FOR EACH ROW EXECUTE FUNCTION apikey_announce_tier();
CREATE TRIGGER apikey_announce_update AFTER UPDATE ON plan_catalogue FOR EACH ROW
    WHEN ((OLD.name, OLD.api_access) IS DISTINCT FROM (NEW.name, NEW.api_access))
    EXECUTE FUNCTION apikey_announce_tier();
CREATE TRIGGER apikey_announce_truncate AFTER TRUNCATE ON plan_catalogue
    FOR EACH STATEMENT EXECUTE FUNCTION apikey_announce_all('plans');

-- The apply workers of logical replication, and sessions with session_replication_role =
-- replica, fire only triggers that are enabled ALWAYS.
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE api_keys ENABLE ALWAYS TRIGGER apikey_announce_truncate;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE org_plans ENABLE ALWAYS TRIGGER apikey_announce_truncate;
ALTER TABLE plan_catalogue ENABLE ALWAYS TRIGGER apikey_announce_insert_delete;
ALTER TABLE plan_catalogue ENABLE ALWAYS TRIGGER apikey_announce_update;
ALTER TABLE plan_catalogue ENABLE ALWAYS TRIGGER apikey_announce_truncate;
-- +goose StatementEnd
