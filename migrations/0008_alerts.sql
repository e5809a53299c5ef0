-- Who has looked for what is worth an alert, what is to be sent, and an index for the question that the alert asks.
-- Safe to run again.

-- One row for each rule, locked by the process that looks. state: what the rule has said and must not say again.
CREATE TABLE IF NOT EXISTS system_alerts (
    rule TEXT PRIMARY KEY,
    last_run TIMESTAMPTZ,
    last_sent TIMESTAMPTZ,
    state JSONB NOT NULL DEFAULT '{}'
);

-- Written in the transaction in which a rule decides, so that a message outlives the process that made it.
-- id: the idempotency key of every attempt. body: the very text that is signed and sent, JSON.
-- lease_until: a process is at it. delivered: the channels that have it. failure: why the latest attempt failed.
CREATE TABLE IF NOT EXISTS system_alert_messages (
    id UUID PRIMARY KEY,
    rule TEXT NOT NULL,
    body TEXT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    not_before TIMESTAMPTZ NOT NULL DEFAULT now(),
    lease_until TIMESTAMPTZ,
    attempts INTEGER NOT NULL DEFAULT 0,
    delivered TEXT[] NOT NULL DEFAULT '{}',
    refused TEXT[] NOT NULL DEFAULT '{}',
    failure TEXT,
    done_at TIMESTAMPTZ
);

CREATE INDEX IF NOT EXISTS idx_system_alert_messages_waiting
    ON system_alert_messages (created_at, id) WHERE done_at IS NULL;
CREATE INDEX IF NOT EXISTS idx_system_alert_messages_done_at
    ON system_alert_messages (done_at) WHERE done_at IS NOT NULL;

-- Unresolved criticals are few among many errors, and both the alert and their list are about them alone.
CREATE INDEX IF NOT EXISTS idx_system_errors_critical_arrivals
    ON system_errors (recorded_at) WHERE severity = 'critical' AND resolved_at IS NULL;
