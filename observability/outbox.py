"""Rows on their way to Postgres, by the best way that is open at the moment.

The *ways*, best first: straight into the table; a Redis stream; the spool file; a line on standard error. A
*drainer* thread, which exists only while something waits, moves what took a worse way into the tables as
soon as they can be reached, also what an earlier process left. Every row has an `event_id`, so that a row
that is moved twice is stored once. Not here: what the rows say (`errors/`, `logs.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from checkpointer.hooks import renew_in_child
from observability.links import AwayError, RowRefusedError
from observability.scrub import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import psycopg
    import redis

    from checkpointer.events import CheckpointEvent
    from observability.links import PostgresLink, RedisLink
    from observability.spool import Spool

logger = logging.getLogger("checkpointer.observability")

_STREAM_ROWS = 10_000
_BATCH = 200
_FIRST_PAUSE = 0.05
# The links themselves wait longer between attempts; until then they refuse at once.
_LONGEST_PAUSE = 0.5

_FIELD = b"row"

Values = dict[str, Any]
"""A row's columns; JSON values only, and always an `event_id`."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table that takes rows.

    Attributes:
        name: Its name in Postgres and in the spool.
        stream: The last part of its Redis key.
        columns: Column name to SQL type, as in the migration.
        stand_in: Makes the row that takes the place of one whose values Postgres refuses; its arguments
            are the row's `event_id` and a sentence that says what happened.
    """

    name: str
    stream: str
    columns: dict[str, str]
    stand_in: Callable[[str, str], Values]

    def insert(self, connection: psycopg.Connection[Any], rows: Sequence[Values]) -> list[CheckpointEvent]:
        """Insert rows in one statement, in the order of their events; those that are there already stay.

        Returns:
            What is to be told because of it.
        """
        names = ", ".join(self.columns)
        # Not in the order given: two processes that move the same rows have to lock them in the same order.
        statement = (
            f"INSERT INTO {self.name} ({names}) SELECT {names} FROM {rows_from_json(self.columns)} "
            "ORDER BY created_at, event_id ON CONFLICT (event_id) DO NOTHING"
        )
        connection.execute(statement.encode(), [json.dumps(rows, allow_nan=False)])
        return []


def rows_from_json(columns: dict[str, str]) -> str:
    """Return SQL that reads rows with these columns from one JSON parameter."""
    typed = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    return f"jsonb_to_recordset(%s::jsonb) AS ({typed})"


def stream_key(prefix: str, table: Table) -> bytes:
    """Return the key of the Redis stream in which a table's rows wait."""
    return f"{prefix}:ev:{table.stream}".encode()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row that took a worse way, and where it still is."""

    table: Table
    values: Values
    stream_id: bytes | None = None
    spool_number: int | None = None


class Outbox:
    """Takes rows and sees that they arrive.

    Safe to use from several threads. `add` never raises for an outage. After a fork the child starts with
    connections and a drainer of its own.

    Args:
        postgres: The first way.
        redis: The second way.
        spool: The third way.
        prefix: Begins the Redis keys `<prefix>:ev:<stream>`.
        tables: The tables that rows may be for.
        tell: Takes the events that follow from what was stored.
    """

    def __init__(
        self,
        postgres: PostgresLink,
        redis: RedisLink,
        spool: Spool,
        prefix: str,
        tables: Sequence[Table],
        tell: Callable[[CheckpointEvent], None],
    ) -> None:
        self._postgres = postgres
        self._redis = redis
        self._spool = spool
        self._prefix = prefix
        self._tables = {table.name: table for table in tables}
        self._tell = tell
        self._closed = False
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._drainer: threading.Thread | None = None
        self._something_waits = False
        self._storing = threading.local()

    def add(self, table: Table, values: Values) -> str:
        """Store one row by the best way that is open.

        Returns:
            The way it took: `direct`, `redis`, `spool` or `stderr`.
        """
        with self._as_storing():
            return self._add(table, values)

    def is_storing(self) -> bool:
        """Return whether the calling thread is storing a row right now.

        A report that is made there is about the storing itself, as by a logging handler that files what is said here:
        storing it would lead to the next one.
        """
        return getattr(self._storing, "depth", 0) > 0

    @contextlib.contextmanager
    def _as_storing(self) -> Iterator[None]:
        self._storing.depth = getattr(self._storing, "depth", 0) + 1
        try:
            yield
        finally:
            self._storing.depth -= 1

    def _add(self, table: Table, values: Values) -> str:
        ways = (("direct", self._to_postgres), ("redis", self._to_redis), ("spool", self._to_spool))
        for way, store in ways:
            try:
                store(table, values)
            except AwayError:
                continue
            # A report must not get lost because of a fault in one way of storing it.
            except Exception:
                logger.exception("an error row could not take the way %r", way)
                continue
            if way != "direct":
                self.drain_soon()
            return way
        _to_stderr(table, values)
        return "stderr"

    def drain_soon(self) -> None:
        """Have the drainer look for rows that wait, now and until there are none."""
        with self._lock:
            self._something_waits = True
            if self._drainer is None and not self._closed:
                drainer = threading.Thread(target=self._drain, name="checkpointer-drainer", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter is ending; the rows stay for the next
                    drainer.start()
                    self._drainer = drainer

    def close(self, timeout: float) -> None:
        """Try once more to move what waits, then end the drainer; what is left waits for the next process."""
        with self._lock:
            self._closed = True
            drainer = self._drainer
        self._stop.set()
        if drainer is not None and drainer is not threading.current_thread():
            drainer.join(timeout)

    def _to_postgres(self, table: Table, values: Values) -> None:
        row = {**values, "delivery": "direct"} if "delivery" in table.columns else values
        self._insert(table, [row])

    def _to_redis(self, table: Table, values: Values) -> None:
        key = self._key(table)
        row = json.dumps(values, allow_nan=False).encode()

        def append(client: redis.Redis) -> None:
            # Full counts as away: trimming would drop rows without a word, and the spool has room.
            if client.xlen(key) >= _STREAM_ROWS:
                raise AwayError("the stream is full")
            client.xadd(key, {_FIELD: row}, maxlen=_STREAM_ROWS)

        self._redis.run(append)

    def _to_spool(self, table: Table, values: Values) -> None:
        self._spool.append(table.name, [json.dumps(values, allow_nan=False)])

    def _key(self, table: Table) -> bytes:
        return stream_key(self._prefix, table)

    def _insert(self, table: Table, rows: Sequence[Values]) -> None:
        """Insert rows; those that Postgres refuses are replaced by one that says so."""
        try:
            told = self._postgres.run(lambda connection: table.insert(connection, rows))
        except RowRefusedError as exc:
            if len(rows) > 1:
                for row in rows:
                    self._insert(table, [row])
            else:
                self._insert_stand_in(table, rows[0], exc)
            return
        for event in told:
            self._tell(event)

    def _insert_stand_in(self, table: Table, row: Values, refused: RowRefusedError) -> None:
        state = getattr(refused.__cause__, "sqlstate", None)
        substitute = _substitute(
            table, row.get("event_id"), f"Postgres refused the values of this row (SQLSTATE {state})."
        )
        try:
            self._postgres.run(lambda connection: table.insert(connection, [substitute]))
        except RowRefusedError:
            _to_stderr(table, row)

    def _drain(self) -> None:
        with self._as_storing():
            self._drain_all()

    def _drain_all(self) -> None:
        pause = 0.0
        while True:
            stopping = self._stop.wait(pause)
            if stopping:
                # The last attempt is a real one: a server that has just come back is not to be passed over.
                self._postgres.retry_now()
                self._redis.retry_now()
            try:
                moved = self._drain_batch()
                pause = 0.0 if moved else _FIRST_PAUSE
            except AwayError:
                moved = 0
                pause = min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
            # The drainer has to outlive whatever a batch meets; what waits is still there.
            except Exception:
                logger.exception("moving error rows failed; it is tried again")
                moved, pause = 0, _LONGEST_PAUSE
            with self._lock:
                if (not moved and not self._something_waits) or (stopping and not moved):
                    self._drainer = None
                    return

    def _drain_batch(self) -> int:
        """Move some rows, oldest first; return how many.

        Raises:
            AwayError: Some way could not be looked into, or the rows could not be stored.
        """
        with self._lock:
            self._something_waits = False
        try:
            spooled = self._spooled()
            try:
                streamed = self._streamed()
            except AwayError:
                if not spooled:
                    raise
                streamed = []
            # One order for all drainers, so that two of them that move the same rows cannot deadlock.
            waiting = sorted(spooled + streamed, key=lambda one: str(one.values.get("created_at")))
            for table in self._tables.values():
                rows = [one.values for one in waiting if one.table is table]
                if rows:
                    self._insert(table, rows)
            self._forget(waiting)
        except Exception:
            self._something_waits = True
            raise
        return len(waiting)

    def _spooled(self) -> list[_Waiting]:
        waiting = []
        for number, kind, text in self._spool.read(tuple(self._tables), _BATCH):
            table = self._tables[kind]
            values = _parse(table, text, f"spool:{self._spool.path}:{number}", "spool")
            waiting.append(_Waiting(table, values, spool_number=number))
        return waiting

    def _streamed(self) -> list[_Waiting]:
        waiting = []
        for table in self._tables.values():
            key = self._key(table)
            entries = self._redis.run(partial(_oldest, key=key))
            for stream_id, fields in entries:
                text = fields.get(_FIELD, b"").decode("utf-8", "replace")
                values = _parse(table, text, f"{key.decode()}:{stream_id.decode()}", "redis")
                waiting.append(_Waiting(table, values, stream_id=stream_id))
        return waiting

    def _forget(self, waiting: Sequence[_Waiting]) -> None:
        for table in self._tables.values():
            ids = [one.stream_id for one in waiting if one.table is table and one.stream_id is not None]
            if ids:
                self._redis.run(partial(_delete, key=self._key(table), ids=ids))
        numbers = [one.spool_number for one in waiting if one.spool_number is not None]
        if numbers:
            self._spool.delete(numbers)


def _oldest(client: redis.Redis, *, key: bytes) -> list[tuple[bytes, dict[bytes, bytes]]]:
    entries: Any = client.xrange(key, count=_BATCH)
    return list(entries)


def _delete(client: redis.Redis, *, key: bytes, ids: Sequence[bytes]) -> None:
    client.xdel(key, *ids)


def _parse(table: Table, text: str, place: str, delivery: str) -> Values:
    """Read a waiting row; what cannot be read becomes a row that says so."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("a row is an object")
        json.dumps(values, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        values = _substitute(table, place, f"A waiting row could not be read: {safe_text(text, 500)}")
    return {**values, "delivery": delivery} if "delivery" in table.columns else values


def _substitute(table: Table, event_id: Any, message: str) -> Values:
    """Return the stand-in of a row; the same one each time it is made for the same row."""
    try:
        known = str(UUID(event_id))
    except (ValueError, TypeError, AttributeError):
        known = str(uuid5(NAMESPACE_URL, repr(event_id)))
    return {**table.stand_in(known, message), "created_at": datetime.now(UTC).isoformat()}


def _to_stderr(table: Table, values: Values) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{table.name}: {json.dumps(values, default=str)}\n")
        sys.stderr.flush()
