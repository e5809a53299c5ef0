-- Records that Postgres refused for what they are, one row for each, with what was to be stored.
-- Safe to run again.

-- An unresolved row pins its thread: nothing of the thread is flushed over the gap until the record is replayed or
-- dropped. payload: the record as Redis has it; NULL once it is in the checkpoint tables, or the thread is deleted.
-- error_message: the primary message only, since the details of an error quote row values.
CREATE TABLE IF NOT EXISTS checkpoint_dead_letters (
    id BIGSERIAL PRIMARY KEY,
    prefix TEXT NOT NULL,
    thread_id TEXT NOT NULL,
    checkpoint_ns TEXT NOT NULL,
    checkpoint_id TEXT,
    kind TEXT NOT NULL CHECK (kind IN ('checkpoint', 'blob', 'write')),
    field BYTEA NOT NULL,
    sequence BIGINT NOT NULL,
    payload BYTEA,
    error_type TEXT NOT NULL,
    sqlstate TEXT,
    error_message TEXT NOT NULL,
    event_id UUID NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    attempts INTEGER NOT NULL DEFAULT 1,
    resolved_at TIMESTAMPTZ,
    resolution TEXT CHECK (resolution IN ('replayed', 'dropped', 'deleted')),
    resolved_by TEXT,
    CHECK ((resolved_at IS NULL) = (resolution IS NULL))
);

-- Nothing is flushed behind an unresolved record, so a thread has at most one.
CREATE UNIQUE INDEX IF NOT EXISTS checkpoint_dead_letters_unresolved_idx
    ON checkpoint_dead_letters (prefix, thread_id) WHERE resolved_at IS NULL;
CREATE INDEX IF NOT EXISTS checkpoint_dead_letters_thread_id_idx ON checkpoint_dead_letters (prefix, thread_id);
