-- The environment in the text of a key, so that rotation keeps it.

-- +goose Up
ALTER TABLE api_keys ADD COLUMN environment text NOT NULL DEFAULT '' CHECK (environment IN ('', 'live', 'test'));

COMMENT ON COLUMN api_keys.environment IS 'What the key says, live or test. Empty: it was issued elsewhere and says nothing, or before this column was there.';
