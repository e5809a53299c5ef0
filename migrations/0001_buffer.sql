-- What the flusher keeps beside LangGraph's own tables. The checkpoint tables themselves are left as they are.

-- One row for each application (key prefix): into how many partitions its threads are divided.
CREATE TABLE IF NOT EXISTS checkpoint_buffers (
    prefix TEXT PRIMARY KEY,
    partitions INTEGER NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- One row for each partition. Who holds its row lock flushes the partition; a dead worker's lock dies with its
-- connection. sequence: the highest sequence number that was flushed.
CREATE TABLE IF NOT EXISTS checkpoint_buffer_partitions (
    prefix TEXT NOT NULL,
    partition INTEGER NOT NULL,
    sequence BIGINT NOT NULL DEFAULT 0,
    flushed_at TIMESTAMPTZ,
    PRIMARY KEY (prefix, partition)
);

-- One row for each deleted thread: records up to this sequence number are never flushed.
CREATE TABLE IF NOT EXISTS checkpoint_buffer_tombstones (
    prefix TEXT NOT NULL,
    thread_id TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    deleted_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    PRIMARY KEY (prefix, thread_id)
);

CREATE INDEX IF NOT EXISTS checkpoint_buffer_tombstones_deleted_at_idx
    ON checkpoint_buffer_tombstones (deleted_at);
