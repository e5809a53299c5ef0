-- Errors of one kind as one thing to look at, hourly counts that outlive the rows, and who did what.
-- Safe to run again. Without foreign keys: rows come and go by retention, and in any order after an outage.

-- What errors of one kind have in common: 'v1:' and a digest; which facts go into it is said where it is made.
-- 'v0:' for rows from before this migration, which are told apart by less.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS fingerprint TEXT;
-- When the last of a burst that was folded into this row happened; NULL for a single one.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS last_seen_at TIMESTAMPTZ;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS trace_id TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS release TEXT;
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS environment TEXT;
-- What has to recover for this error to be over: a thread's flush, a server. NULL if nothing but a person can tell.
ALTER TABLE system_errors ADD COLUMN IF NOT EXISTS recovery_key TEXT;

CREATE INDEX IF NOT EXISTS idx_system_errors_fingerprint ON system_errors (fingerprint, created_at);
-- Pages of the unresolved and of all errors, newest first.
CREATE INDEX IF NOT EXISTS idx_system_errors_page ON system_errors (created_at DESC, id DESC);
CREATE INDEX IF NOT EXISTS idx_system_errors_page_unresolved
    ON system_errors (created_at DESC, id DESC) WHERE resolved_at IS NULL;
CREATE INDEX IF NOT EXISTS idx_system_errors_recovery_key
    ON system_errors (recovery_key) WHERE resolved_at IS NULL AND recovery_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS idx_system_errors_fingerprint_unresolved
    ON system_errors (fingerprint) WHERE resolved_at IS NULL;
-- What retention looks for.
CREATE INDEX IF NOT EXISTS idx_system_errors_resolved_at ON system_errors (resolved_at) WHERE resolved_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS idx_system_errors_details
    ON system_errors (created_at) WHERE stack_trace IS NOT NULL OR error_context IS NOT NULL;
CREATE INDEX IF NOT EXISTS idx_system_errors_without_fingerprint
    ON system_errors (id) WHERE fingerprint IS NULL;
CREATE INDEX IF NOT EXISTS idx_thread_logs_created_at ON thread_logs (created_at);

-- status: unresolved; resolved; regressed, if one happened later than the resolution; muted, until muted_until if set.
-- severity: the worst so far. title: the latest message. latest_event_id: the latest occurrence.
-- regression_event_id: the occurrence that regressed it last.
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
    muted_until TIMESTAMPTZ,
    latest_event_id UUID,
    regression_event_id UUID
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

-- action: resolve, regress, reopen, mute, unmute, delete, sign-in, refuse, ... actor: the principal, or 'system'.
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

-- The latest sign that something has recovered: errors of that key that happened before it are over, also those that
-- arrive after it.
CREATE TABLE IF NOT EXISTS system_error_recoveries (
    recovery_key TEXT PRIMARY KEY,
    event TEXT NOT NULL,
    event_id UUID,
    recovered_at TIMESTAMPTZ NOT NULL
);

CREATE INDEX IF NOT EXISTS idx_system_error_recoveries_recovered_at ON system_error_recoveries (recovered_at);

-- When a job that one process does for all was last begun.
CREATE TABLE IF NOT EXISTS system_error_jobs (
    job TEXT PRIMARY KEY,
    begun_at TIMESTAMPTZ NOT NULL
);

-- Rows without a fingerprint become part of groups and of the hourly counts; each only once, since it has one then.
WITH adopted AS (
    UPDATE system_errors
    SET fingerprint = 'v0:' || md5(concat_ws(
        E'\n', error_type, error_context ->> 'exception_type', component, operation, error_code))
    WHERE fingerprint IS NULL
    RETURNING *, coalesce(created_at, recorded_at, now()) AS happened_at
), hours AS (
    INSERT INTO system_error_hourly AS known (hour, error_type, severity, fingerprint, occurrences)
    SELECT date_trunc('hour', happened_at, 'UTC'), error_type, severity, fingerprint, sum(occurrences)
    FROM adopted GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    ON CONFLICT (hour, error_type, severity, fingerprint)
        DO UPDATE SET occurrences = known.occurrences + excluded.occurrences
    RETURNING 1
), latest AS (
    SELECT DISTINCT ON (fingerprint) * FROM adopted ORDER BY fingerprint, happened_at DESC, id DESC
), totals AS (
    SELECT
        fingerprint,
        (ARRAY['info', 'warning', 'error', 'critical'])[
            max(CASE severity WHEN 'critical' THEN 4 WHEN 'error' THEN 3 WHEN 'warning' THEN 2 ELSE 1 END)
        ] AS severity,
        min(happened_at) AS first_seen_at,
        max(happened_at) AS last_seen_at,
        sum(occurrences) AS occurrences,
        bool_and(resolved_at IS NOT NULL) AS is_resolved,
        max(resolved_at) AS resolved_at
    FROM adopted GROUP BY fingerprint
)
INSERT INTO system_error_groups AS known (
    fingerprint, error_type, severity, component, operation, error_code, title, status,
    first_seen_at, last_seen_at, occurrences, resolved_at, resolved_by, resolution_notes, latest_event_id
)
SELECT
    fingerprint, l.error_type, t.severity, l.component, l.operation, l.error_code, l.error_message,
    CASE WHEN t.is_resolved THEN 'resolved' ELSE 'unresolved' END,
    t.first_seen_at, t.last_seen_at, t.occurrences,
    CASE WHEN t.is_resolved THEN t.resolved_at END,
    CASE WHEN t.is_resolved THEN l.resolved_by END,
    CASE WHEN t.is_resolved THEN l.resolution_notes END,
    l.event_id
FROM totals t JOIN latest l USING (fingerprint)
WHERE (SELECT count(*) FROM hours) >= 0
ORDER BY fingerprint
ON CONFLICT (fingerprint) DO UPDATE SET
    severity = CASE
        WHEN array_position(ARRAY['info', 'warning', 'error', 'critical'], excluded.severity)
            > coalesce(array_position(ARRAY['info', 'warning', 'error', 'critical'], known.severity), 0)
        THEN excluded.severity ELSE known.severity END,
    title = CASE WHEN excluded.last_seen_at >= known.last_seen_at THEN excluded.title ELSE known.title END,
    status = CASE
        WHEN known.status = 'resolved' AND excluded.status = 'unresolved' THEN 'unresolved' ELSE known.status END,
    first_seen_at = least(known.first_seen_at, excluded.first_seen_at),
    last_seen_at = greatest(known.last_seen_at, excluded.last_seen_at),
    occurrences = known.occurrences + excluded.occurrences;
