package feed

// The SQL of sessions, and of what tells servers and tables apart. Functions are named with their
// schema, and operators have operands of exactly their types: else one that somebody has put into
// a schema of the search_path could be a better match.

const (
	readSQL = `SELECT snapshot, again_after FROM apikey_announce()`
	beatSQL = readSQL + `; SELECT pg_catalog.pg_notify('` + Channel + `', '` + kindBeat + ` ' || pg_catalog.pg_current_xact_id()::text)`

	// tryLockSQL makes the session the announcer if there is none. The lock is held until
	// the session ends.
	tryLockSQL = `SELECT pg_catalog.pg_try_advisory_lock(` + announcerLock + `, pg_catalog.hashtext('apikey_outbox'::regclass::oid::text))`

	// settingsSQL replaces settings of the role with which the session could not announce,
	// wait for other announcers, or stay idle. It also lets the server notice soon if this
	// replica or the network is gone: a session that does not read holds up the notification
	// queue and VACUUM.
	settingsSQL = `SELECT pg_catalog.set_config(name, value, false) FROM pg_catalog.pg_settings JOIN (VALUES
		('default_transaction_isolation', 'read committed'), ('default_transaction_read_only', 'off'), ('statement_timeout', '0'),
		('lock_timeout', '0'), ('idle_session_timeout', '0'), ('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3'),
		('tcp_user_timeout', '30000')) AS s (name, value) USING (name)`
)

// announcerLock is the class of the announcers' advisory locks. The migrations use the same.
const announcerLock = "1634757477"

// AnnouncerSQL is an expression for whether the tables that the search_path finds have an
// announcer.
const AnnouncerSQL = `EXISTS (SELECT FROM pg_catalog.pg_locks JOIN pg_catalog.pg_database d ON d.oid = database
	WHERE datname = pg_catalog.current_database() AND locktype = 'advisory' AND classid = ` + announcerLock + `::pg_catalog.oid AND granted
		AND objid = pg_catalog.hashtext(pg_catalog.to_regclass('apikey_outbox')::oid::text)::oid)`

// ServerSQL is an expression for the present [snapshot.Server] as a bigint. It is 0 on a standby,
// whose snapshots cannot be used.
const ServerSQL = `CASE WHEN pg_catalog.pg_is_in_recovery() THEN 0 ELSE ` + OriginSQL + ` END`

// OriginSQL is an expression for the present [snapshot.Origin] as a bigint: the tables that the
// search_path finds, the database, and the start of the server. All by their identity and not by
// name: another one may come under the same name.
const OriginSQL = `(SELECT pg_catalog.hashtextextended(` + tablesSQL + `,
	(pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) OPERATOR(pg_catalog.*) 1000000::pg_catalog.float8)::pg_catalog.int8))`

const tablesSQL = `(SELECT pg_catalog.concat_ws(' ', d.oid, pg_catalog.to_regclass('api_keys')::oid, pg_catalog.to_regclass('org_plans')::oid,
	pg_catalog.to_regclass('plan_catalogue')::oid) FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())`

// historySQL returns the tables and the timeline of their server, which changes when a standby is
// promoted, even one that has not received the last transactions.
const historySQL = `SELECT system_identifier::text || ' ' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) || ' ' || ` + tablesSQL + ` FROM pg_control_system()`
