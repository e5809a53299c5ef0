"""Errors that are over by themselves: which event shows it, of which errors, and the statements that resolve them.

An error that something can recover from has a *recovery key*; an event that shows that something has recovered has the
same one. A *recovery* is the latest such event of a key. It resolves what happened before it, by the times of the
events, so that it does not matter which of the two arrives first: what waited in Redis or in a file is resolved when it
gets here. Nothing is ever resolved that was lost, and nothing of a thread that has lost something in between.

| event | shows that |
|---|---|
| `flush.recovered` | all that was buffered of its thread is in Postgres |
| `recovery.found` | the same, for the threads that a process which has ended had left |
| `dead_letter.replayed` | the record of that dead letter is in Postgres |
| `backend.up` | the server can be reached again by the process that said it could not |
| `buffer.normal` | the buffer is below its mark again for the process that said it was above |

What only a person can tell has no key: losses, replaced values, a dropped dead letter, hooks, the application's errors.

The recovery is stored first, in a transaction of its own, and a row too; what resolves comes after both. So of a row
and its recovery that arrive at the same time, the later one sees the other; of a process that is killed in between,
`resolve_missed` finds what it has left. Groups are locked before their rows, as by everybody who changes both. Not
here: when any of it is done.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any

from psycopg.rows import scalar_row

from observability.outbox import Table, Values, rows_from_json
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import psycopg

    from checkpointer.events import CheckpointEvent

__all__ = ["RECOVERIES", "RecoveryTable", "recovery_key", "recoveries_of", "resolve_arrived", "resolve_missed"]

_OF_A_FLUSH = {"flush.failed", "flush.incomplete", "put.unconfirmed", "put.unacknowledged"}
_KEY_BYTES = 500


def recovery_key(event: CheckpointEvent, prefix: str, instance: str) -> str | None:
    """Return what has to recover for an error to be over; None if no event shows that.

    Args:
        event: The error.
        prefix: Of the Redis keys: threads of another prefix are others.
        instance: The process that speaks.
    """
    if event.outcome == "lost":
        return None
    if event.name in _OF_A_FLUSH and event.thread_id:
        return _key("flush", prefix, event.thread_id)
    if event.name == "dead_letter.added":
        return _key("letter", prefix, event.context.get("dead_letter"))
    if event.name == "backend.down":
        return _key("backend", prefix, instance, event.context.get("backend"))
    if event.name == "put.around":
        return _key("backend", prefix, instance, "redis")
    if event.name == "buffer.high":
        return _key("buffer", prefix, instance)
    return None


def recoveries_of(event: CheckpointEvent, prefix: str, instance: str) -> list[Values]:
    """Return the recoveries that an event shows, as rows of `RECOVERIES`; most events show none."""
    keys: list[str] = []
    if event.name == "flush.recovered" and event.thread_id:
        keys = [_key("flush", prefix, event.thread_id)]
    elif event.name == "recovery.found":
        keys = [_key("flush", prefix, thread) for thread in event.context.get("thread_ids", ())]
    elif event.name == "dead_letter.replayed":
        keys = [_key("letter", prefix, event.context.get("dead_letter"))]
    elif event.name == "backend.up":
        keys = [_key("backend", prefix, instance, event.context.get("backend"))]
    elif event.name == "buffer.normal":
        keys = [_key("buffer", prefix, instance)]
    return [
        {
            "event_id": str(event.event_id),
            "recovery_key": key,
            "event": event.name,
            "created_at": event.occurred_at.astimezone(UTC).isoformat(),
        }
        for key in keys
    ]


def _key(*parts: Any) -> str:
    # As JSON, so that no part can pass for two.
    return safe_name(json.dumps([str(part) for part in parts]), _KEY_BYTES)


@dataclass(frozen=True, slots=True)
class RecoveryTable(Table):
    """`system_error_recoveries`, with what follows from each row."""

    def insert(self, connection: psycopg.Connection[Any], rows: Sequence[Values]) -> list[CheckpointEvent]:
        """Keep the latest recovery of each key, and resolve what they explain."""
        connection.execute(_KEEP.encode(), [json.dumps(rows, allow_nan=False)])
        resolve_arrived(connection, {row["recovery_key"] for row in rows if isinstance(row.get("recovery_key"), str)})
        return []


def _stand_in(event_id: str, message: str) -> Values:
    return {"event_id": event_id, "recovery_key": f"unreadable {event_id}", "event": message}


RECOVERIES = RecoveryTable(
    name="system_error_recoveries",
    stream="recoveries",
    columns={"event_id": "uuid", "recovery_key": "text", "event": "text", "created_at": "timestamptz"},
    stand_in=_stand_in,
)
"""Where recoveries go."""

_KEEP = f"""
INSERT INTO system_error_recoveries AS known (recovery_key, event, event_id, recovered_at)
SELECT DISTINCT ON (recovery_key) recovery_key, event, event_id, created_at
FROM {rows_from_json(RECOVERIES.columns)}
ORDER BY recovery_key, created_at DESC
ON CONFLICT (recovery_key) DO UPDATE
    SET event = excluded.event, event_id = excluded.event_id, recovered_at = excluded.recovered_at
    WHERE excluded.recovered_at > known.recovered_at
"""

# What recoveries explain. A thread that has lost something in between is left to a person.
_OVER = """
FROM system_errors e JOIN system_error_recoveries r USING (recovery_key)
WHERE e.resolved_at IS NULL AND e.outcome IS DISTINCT FROM 'lost'
    AND coalesce(e.last_seen_at, e.created_at) <= r.recovered_at
    AND NOT EXISTS (
        SELECT FROM system_errors l
        WHERE l.thread_id = e.thread_id AND l.outcome = 'lost'
            AND coalesce(l.last_seen_at, l.created_at) BETWEEN e.created_at AND r.recovered_at
    )
"""

_EXPLAINED = f"{_OVER} AND e.recovery_key = ANY(%s)"

_MISSED = f"SELECT DISTINCT e.recovery_key {_OVER} LIMIT 1000"

_FIND = f"SELECT DISTINCT e.fingerprint {_EXPLAINED}"

_LOCK = b"SELECT fingerprint FROM system_error_groups WHERE fingerprint = ANY(%s) ORDER BY fingerprint FOR UPDATE"

# A group is resolved with the last of its rows. As of the recovery, so that what happens after that regresses it.
_RESOLVE = f"""
WITH explained AS (
    SELECT e.id, r.event, r.event_id AS by_event, r.recovered_at {_EXPLAINED} AND e.fingerprint = ANY(%s)
    ORDER BY e.id FOR UPDATE OF e
), resolved AS (
    UPDATE system_errors e SET
        resolved_at = x.recovered_at,
        resolved_by = 'system',
        resolution_notes = format('%%s of %%s UTC shows that this is over.',
            x.event, to_char(x.recovered_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'))
    FROM explained x WHERE e.id = x.id
    RETURNING e.id, e.fingerprint, x.event, x.by_event, x.recovered_at, e.resolution_notes
), audited AS (
    INSERT INTO system_error_audit (action, actor, error_id, fingerprint, details)
    SELECT 'resolve', 'system', id, fingerprint,
        jsonb_build_object('event', event, 'event_id', by_event, 'recovered_at', recovered_at)
    FROM resolved ORDER BY id
), latest AS (
    SELECT DISTINCT ON (fingerprint) fingerprint, recovered_at, resolution_notes FROM resolved
    ORDER BY fingerprint, recovered_at DESC
)
UPDATE system_error_groups g SET
    status = 'resolved',
    resolved_at = greatest(l.recovered_at, g.last_seen_at),
    resolved_by = 'system',
    resolution_notes = l.resolution_notes
FROM latest l
WHERE g.fingerprint = l.fingerprint AND g.status IN ('unresolved', 'regressed') AND NOT EXISTS (
    SELECT FROM system_errors e
    WHERE e.fingerprint = l.fingerprint AND e.resolved_at IS NULL AND e.id NOT IN (SELECT id FROM resolved)
)
"""


def resolve_arrived(connection: psycopg.Connection[Any], keys: Collection[str]) -> None:
    """Resolve the errors of some keys that happened before their recovery; nothing changes without one.

    Args:
        connection: In autocommit mode: what is looked at has to be committed.
        keys: Recovery keys.
    """
    if not keys:
        return
    with connection.cursor(row_factory=scalar_row) as cursor:
        asked = sorted(keys)
        found = cursor.execute(_FIND.encode(), [asked]).fetchall()
        if not found:
            return
        with connection.transaction():
            # First: whoever holds a group's lock sees all of its rows, those apart that are then counted as later ones.
            cursor.execute(_LOCK, [found])
            cursor.execute(_RESOLVE.encode(), [asked, found])


def resolve_missed(connection: psycopg.Connection[Any]) -> None:
    """Resolve what a process that was killed at the wrong moment has left: stored, and not yet looked at.

    Args:
        connection: In autocommit mode.
    """
    keys = connection.execute(_MISSED.encode()).fetchall()
    resolve_arrived(connection, {key for (key,) in keys})
