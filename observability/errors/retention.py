"""How long things are kept, and the job that deletes the rest.

| what | how long |
|---|---|
| a resolved error | 30 days after its resolution |
| an unresolved error | until somebody resolves it |
| stack trace and context of an error | 14 days after it happened; of the newest of a group as long as the row |
| a line of a thread's log, a recovery | 30 days |
| who did what | one year |
| hourly counts | 13 months |
| a resolved group without rows | 13 months after its last error |

All of it goes by batches of 2,000 rows, each a transaction of its own, that pass by what somebody else has locked: no
writer waits for this, and two of these jobs share the work. One process at a time takes it on, at most once an hour, by
a row in `system_error_jobs`: a row and not an advisory lock, since it also says when the last one was. An administrator
can run it at any time: `retention.run(connection)`.

Deleting is fast enough for some five million errors. For more, make `system_errors` a table partitioned by month of
`created_at` (`PARTITION BY RANGE`), and drop whole partitions once nothing in them is unresolved. A unique index on a
partitioned table has to contain `created_at`, so `event_id` alone can then no longer be one, and neither can `id` be
the primary key: make them `(event_id, created_at)`, `(id, created_at)`, and the insertion's `ON CONFLICT` likewise. An
event that is delivered twice has the same time, so it is still stored once.

Not here: what an administrator deletes by hand.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

from checkpointer.hooks import renew_in_child
from observability.errors.recoveries import resolve_missed
from observability.links import deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import psycopg

__all__ = ["Retention", "run", "run_if_due"]

logger = logging.getLogger("checkpointer.observability")

_BATCH = 2_000
# A process that lives shorter leaves it to others.
_FIRST_PAUSE = 60.0
_PAUSE = 600.0
_STATEMENT_SECONDS = 30.0

_CLAIM = b"""
INSERT INTO system_error_jobs AS known (job, begun_at) VALUES ('retention', now())
ON CONFLICT (job) DO UPDATE SET begun_at = now() WHERE known.begun_at <= now() - interval '1 hour'
RETURNING job
"""

# Each takes the size of a batch, and finds it along an index. An array, since a subquery may be run for each row.
_BATCHES: dict[str, bytes] = {
    "errors_deleted": b"""
        DELETE FROM system_errors WHERE id = ANY(ARRAY(
            SELECT id FROM system_errors WHERE resolved_at < now() - interval '30 days'
            ORDER BY resolved_at LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
    "details_removed": b"""
        UPDATE system_errors SET stack_trace = NULL, error_context = NULL WHERE id = ANY(ARRAY(
            SELECT id FROM system_errors e
            WHERE created_at < now() - interval '14 days' AND (stack_trace IS NOT NULL OR error_context IS NOT NULL)
                AND EXISTS (
                    SELECT FROM system_errors n
                    WHERE n.fingerprint = e.fingerprint AND (n.created_at, n.id) > (e.created_at, e.id))
            ORDER BY created_at LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
    "log_lines_deleted": b"""
        DELETE FROM thread_logs WHERE id = ANY(ARRAY(
            SELECT id FROM thread_logs WHERE created_at < now() - interval '30 days'
            ORDER BY created_at LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
    "recoveries_deleted": b"""
        DELETE FROM system_error_recoveries WHERE recovery_key = ANY(ARRAY(
            SELECT recovery_key FROM system_error_recoveries WHERE recovered_at < now() - interval '30 days'
            ORDER BY recovered_at LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
    "audit_deleted": b"""
        DELETE FROM system_error_audit WHERE id = ANY(ARRAY(
            SELECT id FROM system_error_audit WHERE at < now() - interval '1 year'
            ORDER BY at LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
    # By their place, since there is no short key; a locked row stays where it is.
    "hours_deleted": b"""
        DELETE FROM system_error_hourly WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM system_error_hourly WHERE hour < now() - interval '13 months'
            ORDER BY hour LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
    "groups_deleted": b"""
        DELETE FROM system_error_groups WHERE fingerprint = ANY(ARRAY(
            SELECT fingerprint FROM system_error_groups g
            WHERE last_seen_at < now() - interval '13 months' AND status = 'resolved'
                AND NOT EXISTS (SELECT FROM system_errors e WHERE e.fingerprint = g.fingerprint)
            ORDER BY last_seen_at LIMIT %s FOR UPDATE SKIP LOCKED))
    """,
}

_AUDIT = b"INSERT INTO system_error_audit (action, actor, details) VALUES ('retention', %s, %s)"


def run(conn: psycopg.Connection[Any], *, actor: str = "system", stop: threading.Event | None = None) -> dict[str, int]:
    """Delete what is older than it is to be kept, now.

    What a run leaves, because somebody else has locked it, the next one takes.

    Args:
        conn: An autocommit connection, so that each batch is a transaction of its own; with another one all of it is
            part of the caller's transaction.
        actor: Who is noted to have done it.
        stop: Ends it after the batch that is under way.

    Returns:
        How many rows of each kind: `errors_deleted`, `details_removed`, `log_lines_deleted`, `recoveries_deleted`,
        `audit_deleted`, `hours_deleted`, `groups_deleted`.
    """
    counts = dict.fromkeys(_BATCHES, 0)
    for kind, statement in _BATCHES.items():
        while stop is None or not stop.is_set():
            with deadline(conn, _STATEMENT_SECONDS):
                done = conn.execute(statement, [_BATCH]).rowcount
            counts[kind] += done
            if done < _BATCH:
                break
    if any(counts.values()):
        conn.execute(_AUDIT, [actor, json.dumps(_what_was_done(counts))])
    return counts


def run_if_due(conn: psycopg.Connection[Any], *, stop: threading.Event | None = None) -> dict[str, int] | None:
    """As `run`, unless some process has begun it within the last hour: then nothing is done, and None returned.

    It also resolves the errors that are over and were missed.
    """
    with deadline(conn, _STATEMENT_SECONDS):
        if conn.execute(_CLAIM).fetchone() is None:
            return None
        resolve_missed(conn)
    return run(conn, stop=stop)


def _what_was_done(counts: Mapping[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}


class Retention:
    """Does it from time to time, on a daemon thread that `close` ends.

    A forked child leaves it to its parent and to others.

    Args:
        connect: Opens an autocommit connection.
    """

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        self._connect = connect
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once; after `close` nothing is started."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._work, name="checkpointer-retention", daemon=True)
                self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """End the thread after the batch that is under way; calling it again does nothing."""
        self._stop.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stop.wait(pause):
            pause = _PAUSE
            try:
                with self._connect() as connection:
                    run_if_due(connection, stop=self._stop)
            # An outage is told of by others, and the thread has to outlive it.
            except Exception as exc:  # noqa: BLE001
                logger.info("old error rows could not be deleted (%s); it is tried again", type(exc).__name__)
