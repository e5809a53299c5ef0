-- Errors as they happened, one row for each: what an administrator reads without access to the machine.
-- Safe to run again, and upgrades a table that has only the first eleven columns.

CREATE TABLE IF NOT EXISTS system_errors (
    id BIGSERIAL PRIMARY KEY,
    error_type TEXT NOT NULL,
    severity TEXT NOT NULL,
    thread_id TEXT,
    error_message TEXT NOT NULL,
    stack_trace TEXT,
    error_context JSONB,
    created_at TIMESTAMPTZ DEFAULT now(),
    resolved_at TIMESTAMPTZ,
    resolved_by TEXT,
    resolution_notes TEXT
);

-- Made by the client, so that a row that is delivered twice is stored once.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS event_id UUID;
-- created_at is when it happened, recorded_at when it arrived here: after an outage these are far apart.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS recorded_at TIMESTAMPTZ;
-- The way it came: direct, redis or spool.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS delivery TEXT;
-- More than 1 if a burst was folded into this row.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS occurrences INT NOT NULL DEFAULT 1;
-- SQLSTATE.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS error_code TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS run_id TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS checkpoint_ns TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS checkpoint_id TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS component TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS operation TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS outcome TEXT;

-- Rows from before the upgrade arrived when they happened; with a default of now() from the start they would
-- all raise today's alert.
UPDATE system_errors SET recorded_at = created_at WHERE recorded_at IS NULL AND created_at IS NOT NULL;
ALTER TABLE system_errors ALTER COLUMN recorded_at SET DEFAULT now();

CREATE INDEX IF NOT EXISTS idx_system_errors_error_type ON system_errors (error_type);
CREATE INDEX IF NOT EXISTS idx_system_errors_unresolved ON system_errors (created_at) WHERE resolved_at IS NULL;
CREATE INDEX IF NOT EXISTS idx_system_errors_created_at ON system_errors (created_at);
CREATE INDEX IF NOT EXISTS idx_system_errors_thread_id ON system_errors (thread_id);
CREATE INDEX IF NOT EXISTS idx_system_errors_severity_created_at ON system_errors (severity, created_at);
CREATE INDEX IF NOT EXISTS idx_system_errors_error_type_unresolved
    ON system_errors (error_type) WHERE resolved_at IS NULL;

CREATE UNIQUE INDEX IF NOT EXISTS idx_system_errors_event_id ON system_errors (event_id);
CREATE INDEX IF NOT EXISTS idx_system_errors_recorded_at ON system_errors (recorded_at);
