-- What was said to the people behind a thread, line by line.
-- Safe to run again.

CREATE TABLE IF NOT EXISTS thread_logs (
    id BIGSERIAL PRIMARY KEY,
    thread_id TEXT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    event_id UUID,
    context JSONB,
    created_at TIMESTAMPTZ DEFAULT now()
);

CREATE INDEX IF NOT EXISTS idx_thread_logs_thread_id ON thread_logs (thread_id, id);
-- A line that is delivered twice, as after an outage, is stored once.
CREATE UNIQUE INDEX IF NOT EXISTS idx_thread_logs_event_id ON thread_logs (event_id);
