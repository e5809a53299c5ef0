-- Bearer tokens of the HTTP interface.
-- Safe to run again.

-- A token is 'cpt_<id>_<secret>'; only the SHA-256 of its secret is kept, which is enough for 256 random bits.
-- A revoked or expired one stays, so that the audit's names can be explained.
CREATE TABLE IF NOT EXISTS checkpointer_api_tokens (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    secret_sha256 BYTEA NOT NULL,
    scopes TEXT[] NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    created_by TEXT NOT NULL,
    expires_at TIMESTAMPTZ,
    revoked_at TIMESTAMPTZ,
    revoked_by TEXT,
    last_used_at TIMESTAMPTZ
);
