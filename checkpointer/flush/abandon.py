"""Gives up what a Redis held that is gone for good: the operator's way out, never taken by itself.

Not here: an outage that ends (nothing has to be given up then). While Redis is away, threads of which it may hold
something are open, and reading them raises, since Postgres may be behind. Abandoning closes them: from then on
Postgres' latest checkpoint is the latest.

Should that Redis come back nevertheless, what it has is flushed without replacing anything: the partitions' sequence
numbers are raised here, so that it is taken for older than Postgres.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checkpointer.events import CheckpointEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

# More than a partition can have handed out without a flush.
_GAP = 1_000_000_000

_RAISE = "UPDATE checkpoint_buffer_partitions SET sequence = sequence + %s WHERE prefix = %s"
_OPEN = "SELECT thread_id FROM checkpoint_buffer_threads WHERE prefix = %s AND token > 0 ORDER BY 1"
_CLOSE = "DELETE FROM checkpoint_buffer_threads WHERE prefix = %s AND token > 0 RETURNING thread_id"


def open_threads(conn: Connection[Any], prefix: str) -> list[str]:
    """Return the threads of which the buffer may hold something."""
    rows = conn.execute(_OPEN, (prefix,))
    return [row[0] if isinstance(row, tuple) else row["thread_id"] for row in rows]


def abandon(conn: Connection[Any], prefix: str, emit: Callable[[CheckpointEvent], None]) -> list[str]:
    """Close all open threads of an application; what only its Redis had is given up.

    Args:
        conn: A connection to Postgres.
        prefix: The application.
        emit: Takes one critical event for each thread.

    Returns:
        The threads that were open.
    """
    with conn.transaction():
        conn.execute(_RAISE, (_GAP, prefix))
        rows = conn.execute(_CLOSE, (prefix,)).fetchall()
    threads = sorted(row[0] if isinstance(row, tuple) else row["thread_id"] for row in rows)
    for thread in threads:
        emit(
            CheckpointEvent(
                name="buffer.abandoned",
                error_type="checkpoint_lost",
                severity="critical",
                message="The buffer was given up by an operator. What it held of this thread and Postgres did not have "
                "is lost; the thread goes on from its latest checkpoint in Postgres.",
                thread_id=thread,
                component="buffer",
                operation="abandon",
                outcome="lost",
                user_notice=True,
            )
        )
    return threads
