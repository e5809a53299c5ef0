-- Errors of one kind as one thing to look at, hourly counts that outlive the rows, and who did what.
-- Safe to run again. Without foreign keys: rows come and go by retention, and in any order after an outage.

-- What errors of one kind have in common: 'v1:' and a digest; which facts go into it is said where it is made.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS fingerprint TEXT;
-- When the last of a burst that was folded into this row happened; NULL for a single one.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS last_seen_at TIMESTAMPTZ;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS trace_id TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS release TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS environment TEXT;

CREATE INDEX IF NOT EXISTS idx_system_errors_fingerprint ON system_errors (fingerprint, created_at);
-- Pages of the unresolved and of all errors, newest first.
CREATE INDEX IF NOT EXISTS idx_system_errors_page ON system_errors (created_at DESC, id DESC);
CREATE INDEX IF NOT EXISTS idx_system_errors_page_unresolved
    ON system_errors (created_at DESC, id DESC) WHERE resolved_at IS NULL;

-- status: unresolved; resolved; regressed, if one happened later than the resolution; muted, until muted_until if set.
-- severity: the worst so far. title: the latest message.
CREATE TABLE IF NOT EXISTS system_error_groups (
    fingerprint TEXT PRIMARY KEY,
    error_type TEXT NOT NULL,
    severity TEXT NOT NULL,
    component TEXT,
    operation TEXT,
    error_code TEXT,
    title TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'unresolved' CHECK (status IN ('unresolved', 'resolved', 'regressed', 'muted')),
    first_seen_at TIMESTAMPTZ NOT NULL,
    last_seen_at TIMESTAMPTZ NOT NULL,
    occurrences BIGINT NOT NULL,
    regressions INTEGER NOT NULL DEFAULT 0,
    resolved_at TIMESTAMPTZ,
    resolved_by TEXT,
    resolution_notes TEXT,
    muted_at TIMESTAMPTZ,
    muted_by TEXT,
    muted_until TIMESTAMPTZ
);

CREATE INDEX IF NOT EXISTS idx_system_error_groups_page
    ON system_error_groups (last_seen_at DESC, fingerprint DESC);

-- By the hour (UTC) in which they happened.
CREATE TABLE IF NOT EXISTS system_error_hourly (
    hour TIMESTAMPTZ NOT NULL,
    error_type TEXT NOT NULL,
    severity TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    occurrences BIGINT NOT NULL,
    PRIMARY KEY (hour, error_type, severity, fingerprint)
);

-- action: resolve, reopen, mute, unmute, delete, sign-in, refuse, ... actor: the principal, or 'system'.
CREATE TABLE IF NOT EXISTS system_error_audit (
    id BIGSERIAL PRIMARY KEY,
    at TIMESTAMPTZ NOT NULL DEFAULT now(),
    action TEXT NOT NULL,
    actor TEXT NOT NULL,
    error_id BIGINT,
    fingerprint TEXT,
    details JSONB NOT NULL DEFAULT '{}'
);

CREATE INDEX IF NOT EXISTS idx_system_error_audit_at ON system_error_audit (at DESC, id DESC);
CREATE INDEX IF NOT EXISTS idx_system_error_audit_error_id ON system_error_audit (error_id) WHERE error_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS idx_system_error_audit_fingerprint
    ON system_error_audit (fingerprint, id) WHERE fingerprint IS NOT NULL;
