"""What Postgres knows about the buffer: which threads are open in it, which were deleted, how far it was flushed.

Not here: who asks (`operations.py`, `flush/`). Statements and their rows, without I/O, over the tables of the
migrations `0001` and `0004`.

A thread is *passed by* when something of it goes straight to Postgres: what Redis has of it is older then, until it has
been flushed without replacing anything, and forgotten. With the token 0 it is passed by and not open.

A thread is *open* while Redis may hold records of it that Postgres lacks. It is opened in Postgres before its first
record goes to Redis, and closed after its last one was flushed, so with Redis away Postgres alone can answer for every
thread that is not open. Opening gives a *token*; a later one is higher, and closing names the one that it closes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# The commit has to be safe whatever the session's setting: a put is acknowledged on the strength of it.
_OPENED = """
opened AS (
    INSERT INTO checkpoint_buffer_threads AS t (prefix, thread_id, token)
    VALUES (%s, %s, nextval('checkpoint_buffer_tokens'))
    ON CONFLICT (prefix, thread_id) {conflict}
    RETURNING t.token, t.xmax::text <> '0' AS existed, set_config('synchronous_commit', 'on', true) AS safe
)
"""
_OPENED_ANEW = _OPENED.format(conflict="DO UPDATE SET token = nextval('checkpoint_buffer_tokens'), opened_at = now()")
# Who only reads takes nothing from the process that has the thread open.
_OPENED_IF_CLOSED = _OPENED.format(conflict="DO NOTHING")

_IS_OPEN = """
SELECT EXISTS (SELECT FROM checkpoint_buffer_threads WHERE prefix = %s AND thread_id = %s AND token > 0) AS open
"""
_IS_ANY_OPEN = """
SELECT EXISTS (SELECT FROM checkpoint_buffer_threads WHERE prefix = %s AND token > 0) AS open
"""

_FLOORS = """
SELECT partition, sequence FROM checkpoint_buffer_partitions WHERE prefix = %s AND sequence > 0
"""

CLOSE = """
DELETE FROM checkpoint_buffer_threads AS t
USING unnest(%s::text[], %s::bigint[]) AS closed (thread_id, token)
WHERE t.prefix = %s AND t.thread_id = closed.thread_id AND t.token = closed.token
"""
"""Close threads under these tokens; parameters: threads, tokens, prefix."""

OPEN_FOR = """
SELECT thread_id, token FROM checkpoint_buffer_threads
WHERE prefix = %s AND token > 0 AND opened_at < now() - make_interval(secs => %s) ORDER BY opened_at LIMIT 1000
"""
"""The threads that have been open for some seconds; parameters: prefix, seconds."""

STATE_OF = """
SELECT t.thread_id, d.sequence AS buried, d.last_id, d.late, coalesce(o.replay, false) AS replay
FROM unnest(%s::text[]) AS t (thread_id)
LEFT JOIN checkpoint_buffer_tombstones AS d ON d.prefix = %s AND d.thread_id = t.thread_id
LEFT JOIN checkpoint_buffer_threads AS o ON o.prefix = %s AND o.thread_id = t.thread_id
WHERE d.sequence IS NOT NULL OR o.replay
"""
"""What stands in the way of flushing threads; parameters: threads, prefix, prefix. Rows: see `Buried`."""

PASS_BY = """
INSERT INTO checkpoint_buffer_threads AS t (prefix, thread_id, token, replay)
VALUES (%s, %s, CASE WHEN %s THEN nextval('checkpoint_buffer_tokens') ELSE 0 END, true)
ON CONFLICT (prefix, thread_id) DO UPDATE SET replay = true WHERE NOT t.replay
"""
"""Something of a thread goes straight to Postgres; parameters: prefix, thread, whether the buffer owes something."""

PASSED = "SELECT thread_id FROM checkpoint_buffer_threads WHERE prefix = %s AND replay LIMIT 1000"
"""The threads that were passed by; parameter: prefix."""

REPLAYED = """
WITH caught_up AS (
    DELETE FROM checkpoint_buffer_threads WHERE prefix = %s AND thread_id = ANY(%s) AND token = 0
)
UPDATE checkpoint_buffer_threads SET replay = false WHERE prefix = %s AND thread_id = ANY(%s) AND token > 0
"""
"""The buffer has forgotten what it had of threads; parameters: prefix, threads, prefix, threads."""

BURY = """
INSERT INTO checkpoint_buffer_tombstones AS d (prefix, thread_id, sequence, last_id)
SELECT %s, t.thread_id, t.sequence,
    greatest(
        t.last_id, (SELECT coalesce(max(c.checkpoint_id), '') FROM checkpoints AS c WHERE c.thread_id = t.thread_id)
    )
FROM unnest(%s::text[], %s::bigint[], %s::text[]) AS t (thread_id, sequence, last_id)
ON CONFLICT (prefix, thread_id)
DO UPDATE SET sequence = greatest(d.sequence, EXCLUDED.sequence), last_id = greatest(d.last_id, EXCLUDED.last_id),
    deleted_at = now()
RETURNING thread_id, last_id
"""
"""Note deleted threads; parameters: prefix, threads, sequences, latest ids that the buffer has."""

NOTE_LATE = """
UPDATE checkpoint_buffer_tombstones SET late = (late || %s::text[])[greatest(1, cardinality(late) - 999):]
WHERE prefix = %s AND thread_id = %s
"""

FORGET_TOMBSTONES = """
DELETE FROM checkpoint_buffer_tombstones WHERE prefix = %s AND deleted_at < now() - interval '7 days'
"""


class Opening(NamedTuple):
    """A thread was opened.

    Attributes:
        token: The token.
        existed: It was open already. Then Redis may have forgotten what it had of the thread.
        flushed: The partition's highest sequence number that Postgres knows to be used.
    """

    token: int
    existed: bool
    flushed: int


@dataclass(frozen=True, slots=True)
class Buried:
    """A thread's tombstone.

    Attributes:
        sequence: Records up to this sequence number belong to the deleted life.
        last_id: The latest checkpoint id of that life.
        late: Checkpoints refused since, because they go on from it.
    """

    sequence: int
    last_id: str
    late: frozenset[str]


OPENING_COLUMNS = """
(SELECT token FROM opened) AS token, (SELECT existed FROM opened) AS existed,
(SELECT sequence FROM checkpoint_buffer_partitions WHERE prefix = %s AND partition = %s) AS flushed
"""
"""What an opening statement selects; parameters: prefix, partition."""


def with_opening(sql: str) -> str:
    """Return a statement that opens a thread if it is closed, and runs a query.

    Its first parameters are prefix and thread.
    """
    head = "WITH RECURSIVE " if sql.lstrip().startswith("WITH RECURSIVE") else "WITH "
    rest = sql.lstrip().removeprefix("WITH RECURSIVE")
    return head + _OPENED_IF_CLOSED + (", " if head != "WITH " else "") + rest


def opening(prefix: str, thread_id: str, partition: int) -> tuple[str, tuple[str, str, str, str]]:
    """Open a thread, under a new token if it is open already."""
    return f"WITH {_OPENED_ANEW} SELECT {OPENING_COLUMNS}", (prefix, thread_id, prefix, str(partition))


def is_open(prefix: str, thread_id: str | None) -> tuple[str, tuple[str, ...]]:
    """Ask whether a thread, or any, is open."""
    return (_IS_ANY_OPEN, (prefix,)) if thread_id is None else (_IS_OPEN, (prefix, thread_id))


def floors(prefix: str) -> tuple[str, tuple[str]]:
    """Ask up to which sequence number each partition was flushed."""
    return _FLOORS, (prefix,)


def read_opening(rows: Sequence[Mapping[str, Any]]) -> Opening:
    """Read the columns of a statement that opens a thread whatever it is."""
    return Opening(rows[0]["token"], rows[0]["existed"], rows[0]["flushed"] or 0)


def read_opening_if_closed(rows: Sequence[Mapping[str, Any]]) -> Opening | None:
    """Read the columns of a statement `with_opening`; None if the thread was open already."""
    return read_opening(rows) if rows[0]["token"] is not None else None
