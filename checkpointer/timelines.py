"""One thread's checkpoints, the latest first, a page at a time, and where each of them lives. Changes nothing.

A page is of one *namespace* (the root's is empty, others are those of subgraphs) and costs what it holds, however long
the history is. Not here: which threads there are (`whereabouts.py`), and what a checkpoint holds (`saver.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from psycopg.rows import dict_row

from checkpointer.sanitize import load_json
from checkpointer.whereabouts import made, written

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from psycopg import Connection

    from checkpointer.records import CheckpointRow
    from checkpointer.whereabouts import Buffer, Holdings

__all__ = ["LARGEST_LIMIT", "Entry", "Timeline", "namespaces", "timeline"]

InRedis = Literal["waiting", "cached", "no", "unknown"]

LARGEST_LIMIT = 200
"""The most checkpoints that a page holds."""

_NAMESPACES = 64

# One index probe for each namespace.
_NAMESPACES_OF = f"""
WITH RECURSIVE found AS (
    (SELECT checkpoint_ns, 1 AS n FROM checkpoints WHERE thread_id = %(thread)s ORDER BY checkpoint_ns LIMIT 1)
    UNION ALL
    SELECT next.checkpoint_ns, found.n + 1
    FROM found CROSS JOIN LATERAL (
        SELECT checkpoint_ns FROM checkpoints
        WHERE thread_id = %(thread)s AND checkpoint_ns > found.checkpoint_ns ORDER BY checkpoint_ns LIMIT 1
    ) AS next
    WHERE found.n < {_NAMESPACES}
)
SELECT checkpoint_ns FROM found ORDER BY n
"""

# The ids first, in the order of the database, from both servers; then what Postgres has of them.
PAGE = """
WITH page AS (
    (SELECT checkpoint_id FROM checkpoints
     WHERE thread_id = %(thread)s AND checkpoint_ns = %(ns)s {before}
     ORDER BY checkpoint_id DESC LIMIT %(limit)s)
    UNION
    (SELECT checkpoint_id FROM unnest(%(buffered)s::text[]) AS checkpoint_id
     WHERE true {before} ORDER BY checkpoint_id DESC LIMIT %(limit)s)
    ORDER BY checkpoint_id DESC LIMIT %(limit)s
)
SELECT page.checkpoint_id, stored.*
FROM page LEFT JOIN LATERAL (
    SELECT true AS in_postgres, c.parent_checkpoint_id AS parent_id, c.checkpoint ->> 'ts' AS ts,
        c.metadata -> 'step' AS step, c.metadata ->> 'source' AS source,
        pg_column_size(c.checkpoint) + pg_column_size(c.metadata) + coalesce((
            SELECT sum(octet_length(b.blob)) FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
            JOIN checkpoint_blobs AS b ON b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns
                AND b.channel = v.key AND b.version = v.value
        ), 0)::bigint AS bytes,
        w.writes, w.kinds
    FROM checkpoints AS c CROSS JOIN LATERAL (
        SELECT count(*) AS writes, array_agg(DISTINCT w.channel) FILTER (
            WHERE w.channel IN ('__error__', '__interrupt__', '__resume__')
        ) AS kinds
        FROM checkpoint_writes AS w
        WHERE w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns AND w.checkpoint_id = c.checkpoint_id
    ) AS w
    WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(ns)s AND c.checkpoint_id = page.checkpoint_id
) AS stored ON true
ORDER BY page.checkpoint_id DESC
"""
"""A page; the place `{before}` takes a condition that begins with AND, or nothing."""

BEFORE = "AND checkpoint_id < %(before)s"

_SIZES = """
SELECT r.id, sum(octet_length(b.blob))::bigint AS bytes
FROM unnest(%(ids)s::text[], %(channels)s::text[], %(versions)s::text[]) AS r (id, channel, version)
JOIN checkpoint_blobs AS b ON b.thread_id = %(thread)s AND b.checkpoint_ns = %(ns)s
    AND b.channel = r.channel AND b.version = r.version
GROUP BY r.id
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint.

    Attributes:
        checkpoint_id: Its id.
        parent_id: The id of the one that it goes on from, or None.
        at: When it was made, if that can be told.
        step: The superstep, if the metadata tells.
        source: `input`, `loop`, `update` or `fork`, if the metadata tells.
        bytes: Its size with all channel values, as they are stored.
        in_postgres: Postgres has it.
        in_redis: `waiting`, if Redis has it and it is not known to be in Postgres; `cached`, if Redis keeps it for
            fast reads; `no`; `unknown`, if Redis cannot be asked.
        writes: Pending writes that Postgres has of it.
        writes_waiting: Pending writes that wait in Redis.
        kinds: Special ones among those that Postgres has: `__error__`, `__interrupt__`, `__resume__`.
    """

    checkpoint_id: str
    parent_id: str | None
    at: datetime | None
    step: int | None
    source: str | None
    bytes: int
    in_postgres: bool
    in_redis: InRedis
    writes: int
    writes_waiting: int
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Some checkpoints of a namespace.

    Attributes:
        entries: The latest first.
        next_before: Leads to the next page; None if this is the last.
        redis_trouble: Why Redis could not be asked; None if it was.
    """

    entries: list[Entry]
    next_before: str | None
    redis_trouble: str | None


def namespaces(conn: Connection[Any], thread_id: str) -> list[str]:
    """Return the first 64 namespaces that Postgres has of a thread."""
    return [row["checkpoint_ns"] for row in _rows(conn, _NAMESPACES_OF, {"thread": thread_id})]


def timeline(
    conn: Connection[Any],
    buffer: Buffer,
    thread_id: str,
    checkpoint_ns: str = "",
    *,
    before: str | None = None,
    limit: int = 50,
) -> Timeline:
    """Return some checkpoints of a thread's namespace.

    Args:
        conn: A connection to Postgres.
        buffer: The application's.
        thread_id: The thread.
        checkpoint_ns: The namespace.
        before: The `next_before` of the page before.
        limit: How many at most, from 1 to 200.
    """
    # The buffer first: what is flushed in between is then seen in both, and not in neither.
    held = buffer.holdings(thread_id, checkpoint_ns)
    waiting = held.waiting if held is not None else frozenset()
    params: dict[str, Any] = {
        "thread": thread_id,
        "ns": checkpoint_ns,
        "before": before,
        "limit": limit + 1,
        "buffered": list(waiting),
    }
    rows = _rows(conn, PAGE.format(before=BEFORE if before is not None else ""), params)
    shown = rows[:limit]
    missing = [row["checkpoint_id"] for row in shown if row["in_postgres"] is None]
    in_buffer = buffer.checkpoints(thread_id, checkpoint_ns, missing)
    sizes = _sizes(conn, buffer, thread_id, checkpoint_ns, {name: row for name, (row, _) in in_buffer.items()})
    entries = []
    for row in shown:
        name = row["checkpoint_id"]
        if row["in_postgres"]:
            entries.append(_stored(row, held))
        elif name in in_buffer:
            found, size = in_buffer[name]
            entries.append(_buffered(found, size + sizes.get(name, 0), held))
        elif held is not None:
            # It left the buffer just now, or cannot be read.
            entries.append(_buffered(None, 0, held, name))
    return Timeline(entries, shown[-1]["checkpoint_id"] if len(rows) > limit else None, buffer.trouble)


def _sizes(
    conn: Connection[Any], buffer: Buffer, thread_id: str, checkpoint_ns: str, rows: Mapping[str, CheckpointRow]
) -> dict[str, int]:
    """Return the size of the channel values of checkpoints that wait; the values can be on either server."""
    if not rows:
        return {}
    here = buffer.sizes(thread_id, checkpoint_ns, list({ref for row in rows.values() for ref in row.refs}))
    sizes = {name: sum(here.get(ref, 0) for ref in row.refs) for name, row in rows.items()}
    there = [(name, *ref.partition("\0")[::2]) for name, row in rows.items() for ref in row.refs if ref not in here]
    params = {
        "thread": thread_id,
        "ns": checkpoint_ns,
        "ids": [name for name, _, _ in there],
        "channels": [channel for _, channel, _ in there],
        "versions": [version for _, _, version in there],
    }
    for row in _rows(conn, _SIZES, params) if there else ():
        sizes[row["id"]] += row["bytes"] or 0
    return sizes


def _stored(row: Mapping[str, Any], held: Holdings | None) -> Entry:
    name = row["checkpoint_id"]
    return Entry(
        checkpoint_id=name,
        parent_id=row["parent_id"],
        at=written(row["ts"]) or made(name),
        step=_step(row["step"]),
        source=row["source"],
        bytes=row["bytes"],
        in_postgres=True,
        in_redis=_in_redis(name, held),
        writes=row["writes"],
        writes_waiting=0 if held is None else held.writes.get(name, 0),
        kinds=tuple(row["kinds"] or ()),
    )


def _buffered(row: CheckpointRow | None, size: int, held: Holdings | None, name: str = "") -> Entry:
    name = name if row is None else row.checkpoint_id
    checkpoint, metadata = (_object(row.checkpoint), _object(row.metadata)) if row is not None else ({}, {})
    ts, source = checkpoint.get("ts"), metadata.get("source")
    return Entry(
        checkpoint_id=name,
        parent_id=None if row is None else row.parent_id,
        at=written(ts if isinstance(ts, str) else None) or made(name),
        step=_step(metadata.get("step")),
        source=source if isinstance(source, str) else None,
        bytes=size,
        in_postgres=False,
        in_redis=_in_redis(name, held),
        writes=0,
        writes_waiting=0 if held is None else held.writes.get(name, 0),
        kinds=(),
    )


def _in_redis(name: str, held: Holdings | None) -> InRedis:
    if held is None:
        return "unknown"
    return "waiting" if name in held.waiting else "cached" if name in held.cached else "no"


def _step(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = load_json(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(conn: Connection[Any], query: str, params: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), params).fetchall()
