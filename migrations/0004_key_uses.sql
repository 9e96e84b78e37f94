-- When keys were last used, in a separate table: the rows of api_keys stay narrow, and
-- changing a key does not wait for the recording of uses.

-- +goose Up
CREATE TABLE api_key_uses (
    key_id       uuid        PRIMARY KEY REFERENCES api_keys (id) ON UPDATE CASCADE ON DELETE CASCADE,
    last_used_at timestamptz NOT NULL
) WITH (fillfactor = 80);

INSERT INTO api_key_uses (key_id, last_used_at) SELECT id, last_used_at FROM api_keys WHERE last_used_at IS NOT NULL;
ALTER TABLE api_keys DROP COLUMN last_used_at;
