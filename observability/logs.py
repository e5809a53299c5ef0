"""The log of a thread: lines for the people behind it, kept in `thread_logs` and shown live.

The *tail* is a Redis stream of the last lines of a thread, which live views follow. Not here: the program's
own log (`hooks/console.py`).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row

from checkpointer.errors import StoreUnavailableError
from observability.following import AsyncFollower, Follower, Following, log_source
from observability.links import AwayError
from observability.outbox import Outbox, Table, Values
from observability.scrub import safe_json, safe_name, safe_text

if TYPE_CHECKING:
    from uuid import UUID

    import psycopg
    import redis

    from observability.links import PostgresLink, RedisLink

_TAIL_LINES = 256
_TAIL_SECONDS = 600

_SELECT = b"""
SELECT thread_id, level, message, event_id, context, created_at
FROM thread_logs WHERE thread_id = %s ORDER BY id DESC LIMIT %s
"""


def _stand_in(event_id: str, message: str) -> Values:
    return {"event_id": event_id, "thread_id": "", "level": "error", "message": message}


THREAD_LOGS = Table(
    name="thread_logs",
    stream="logs",
    columns={
        "thread_id": "text",
        "level": "text",
        "message": "text",
        "event_id": "uuid",
        "context": "jsonb",
        "created_at": "timestamptz",
    },
    stand_in=_stand_in,
)
"""Where log lines go."""


class ThreadLog:
    """Writes and reads the lines of threads.

    Args:
        outbox: Knows `THREAD_LOGS`.
        postgres: To read from.
        redis: Holds the tails.
        prefix: Begins the Redis keys `<prefix>:ev:log:<thread_id>`.
    """

    def __init__(self, outbox: Outbox, postgres: PostgresLink, redis: RedisLink, prefix: str) -> None:
        self._outbox = outbox
        self._postgres = postgres
        self._redis = redis
        self._prefix = prefix

    def add(
        self,
        message: str,
        *,
        thread_id: str,
        level: str,
        event_id: UUID,
        occurred_at: datetime,
        context: dict[str, Any] | None = None,
    ) -> None:
        """Store a line and show it live; waits for the servers."""
        line = {
            "thread_id": safe_name(thread_id),
            "level": safe_name(level, 50),
            "message": safe_text(message),
            "event_id": str(event_id),
            "context": safe_json(context or {}),
            "created_at": occurred_at.isoformat(),
        }
        self._show(line)
        self._outbox.add(THREAD_LOGS, line)

    def read(self, thread_id: str, limit: int) -> list[dict[str, Any]]:
        """Return the last `limit` lines of a thread, oldest first; from the tail if Postgres is away.

        Raises:
            StoreUnavailableError: Neither can be reached.
        """
        name = safe_name(thread_id)
        try:
            return _in_order(self._postgres.run(lambda connection: _select(connection, name, limit)))
        except AwayError as exc:
            try:
                return self._tail(name, limit)
            except AwayError:
                raise StoreUnavailableError(
                    "neither Postgres nor Redis can be reached to read the log of the thread"
                ) from exc

    def tail(self, thread_id: str, limit: int) -> list[dict[str, Any]]:
        """Return what Redis has of the last `limit` lines of a thread, oldest first.

        Raises:
            StoreUnavailableError: Redis cannot be reached.
        """
        try:
            return self._tail(safe_name(thread_id), limit)
        except AwayError as exc:
            raise StoreUnavailableError("Redis cannot be reached to read the end of the thread's log") from exc

    def follow(self, thread_id: str, lines: int) -> Follower:
        """Return an iterator over the last `lines` lines of a thread and those that come, in the form of `read`."""
        return Follower(Following(log_source(thread_id), lines), self._postgres, as_line)

    def afollow(self, thread_id: str, lines: int) -> AsyncFollower:
        """As `follow`, for an event loop."""
        return AsyncFollower(Following(log_source(thread_id), lines), self._postgres, as_line)

    def _show(self, line: Values) -> None:
        key = self._key(line["thread_id"])

        def append(client: redis.Redis) -> None:
            with client.pipeline(transaction=False) as pipeline:
                pipeline.xadd(key, {b"line": json.dumps(line).encode()}, maxlen=_TAIL_LINES, approximate=False)
                pipeline.expire(key, _TAIL_SECONDS)
                pipeline.execute()

        try:
            self._redis.run(append)
        except AwayError:
            # A tail is for those who look now; the line itself takes its own way.
            return

    def _tail(self, name: str, limit: int) -> list[dict[str, Any]]:
        entries: Any = self._redis.run(lambda client: client.xrevrange(self._key(name), count=limit))
        return _in_order([json.loads(fields[b"line"]) for _, fields in entries])

    def _key(self, thread_id: str) -> bytes:
        return f"{self._prefix}:ev:log:{thread_id}".encode()


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Lines that waited for Postgres have a later id than their time says.
    return sorted(rows, key=lambda row: str(row["created_at"]))


def _select(connection: psycopg.Connection[Any], thread_id: str, limit: int) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(_SELECT, [thread_id, limit]).fetchall()
    return [as_line(row) for row in rows]


def as_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `thread_logs` as people get it: of JSON values, without its number."""
    line = {name: row[name] for name in ("thread_id", "level", "message", "event_id", "context", "created_at")}
    line["event_id"] = line["event_id"] and str(line["event_id"])
    line["created_at"] = line["created_at"] and line["created_at"].astimezone(UTC).isoformat()
    return line
