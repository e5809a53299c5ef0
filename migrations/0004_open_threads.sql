-- Which threads may have records in the buffer that are not in Postgres yet. Without a row, Postgres alone is complete.
-- token: rises each time the thread is opened, so that what closes it cannot undo a later opening; 0 if it is not open.
-- replay: something of it went straight to Postgres, so what the buffer has of it replaces nothing until it is flushed.
CREATE SEQUENCE IF NOT EXISTS checkpoint_buffer_tokens;

CREATE TABLE IF NOT EXISTS checkpoint_buffer_threads (
    prefix TEXT NOT NULL,
    thread_id TEXT NOT NULL,
    token BIGINT NOT NULL,
    opened_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    replay BOOLEAN NOT NULL DEFAULT false,
    PRIMARY KEY (prefix, thread_id)
);

CREATE INDEX IF NOT EXISTS checkpoint_buffer_threads_opened_at_idx
    ON checkpoint_buffer_threads (prefix, opened_at);

-- last_id: the latest checkpoint id of the deleted life. late: checkpoints that were refused because they go on from it.
ALTER TABLE checkpoint_buffer_tombstones ADD COLUMN IF NOT EXISTS last_id TEXT NOT NULL DEFAULT '';
ALTER TABLE checkpoint_buffer_tombstones ADD COLUMN IF NOT EXISTS late TEXT[] NOT NULL DEFAULT '{}';
