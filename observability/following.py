"""Follows tables as they grow: the log of a thread, or the store of errors, line by line.

Rows get their ids before they are to be seen: a transaction that takes longer shows its row after rows with higher
ids. Going on from the highest id seen would lose it. So each look asks for all ids above a *floor* that were not seen
yet, and the floor rises to an id only when no row below it can still appear. Who inserts holds a lock on the table,
from before the id is taken until the transaction has ended. So each look also asks who holds one, the *writers*: the
floor may rise to the highest id of a look once a later look finds none of its writers any more, and the look after
that, which sees all that they have committed, has been taken. For an id that was taken without an insert, and on a
standby, which has no such locks, the floor stays behind by ten seconds besides.

What is found in one look is in the order in which it was created. A line that arrives late, such as one that an
outage held back, is delivered when it arrives; its `created_at` says when it was written.

Not here: pages of what is there already (`errors/reading.py`), and the events of runs (`runs.py`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from checkpointer.errors import ClosedError
from observability.errors.reading import ERROR_COLUMNS, Filters
from observability.errors.statements import Statement, run
from observability.links import AwayError
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from observability.errors.statements import Row
    from observability.links import PostgresLink

__all__ = ["AsyncFollower", "Follower", "Following", "Source", "errors_source", "log_source"]

_POLL_SECONDS = 0.5
_LATE_SECONDS = 10.0
_BATCH = 500
# At the start so many rows are looked at, so that the late ones among them are told from what is old.
_START_ROWS = 200

_LOG_COLUMNS = "id, thread_id, level, message, event_id, context, created_at"


@dataclass(frozen=True, slots=True)
class Source:
    """What is followed.

    Attributes:
        table: The table, with a column `id` and one `created_at`.
        columns: What to read of it.
        conditions: Which of its rows.
        params: The parameters of the conditions.
    """

    table: str
    columns: str
    conditions: tuple[str, ...]
    params: dict[str, Any]


def log_source(thread_id: str) -> Source:
    """The log of a thread."""
    return Source("thread_logs", _LOG_COLUMNS, ("thread_id = %(thread_id)s",), {"thread_id": safe_name(thread_id)})


def errors_source(filters: Filters) -> Source:
    """The errors that match."""
    conditions, params = filters.conditions()
    return Source("system_errors", ERROR_COLUMNS, tuple(conditions), params)


@dataclass(frozen=True, slots=True)
class Looked:
    """What one look saw: the rows, and the transactions that were writing to the table after that."""

    rows: list[Row]
    writers: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    highest_id: int
    writers: frozenset[str]


class Following:
    """What was seen so far and what to ask next, without I/O.

    Args:
        source: What is followed.
        lines: How many of the last rows to begin with.
    """

    def __init__(self, source: Source, lines: int) -> None:
        self._source = source
        self._lines = lines
        self._floor: int | None = None
        self._seen: set[int] = set()
        self._marks: deque[_Mark] = deque()
        self._last_writers: frozenset[str] | None = None
        self._is_full = False

    @property
    def pause(self) -> float:
        """For how many seconds to wait before the next look; 0 if more is known to be there."""
        return 0.0 if self._is_full else _POLL_SECONDS

    def look(self) -> Statement[Looked]:
        """Return what to ask: one statement, so that the writers are those after its snapshot, and not before."""
        start = self._floor is None
        conditions = [*self._source.conditions]
        params = {**self._source.params, "limit": self._limit()}
        if not start:
            conditions += ["id > %(floor)s", "id <> ALL(%(seen)s::bigint[])"]
            params |= {"floor": self._floor, "seen": sorted(self._seen)}
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        sql = f"""
            SELECT now.writers, found.* FROM (
                SELECT ARRAY(
                    SELECT DISTINCT virtualtransaction FROM pg_locks
                    WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                        AND relation = to_regclass('{self._source.table}')
                ) AS writers
            ) AS now LEFT JOIN LATERAL (
                SELECT {self._source.columns} FROM {self._source.table} {where}
                ORDER BY id {"DESC" if start else ""} LIMIT %(limit)s
            ) AS found ON true
        """
        return Statement(sql, params, _read)

    def take(self, looked: Looked, now: float) -> list[Row]:
        """Take what `look` has found.

        Args:
            looked: It.
            now: A clock that only goes forward, in seconds.

        Returns:
            The new rows, in the order in which they were created.
        """
        ids = [row["id"] for row in looked.rows]
        first = self._floor is None
        self._is_full = not first and len(ids) == self._limit()
        if first:
            # Below the lowest one everything counts as old, unless there is nothing below it.
            self._floor = min(ids) - 1 if len(ids) == self._limit() else 0
        self._seen.update(ids)
        if not self._is_full:
            # A page that was cut may have left out some below its highest id.
            self._rise(now)
        if ids:
            self._marks.append(_Mark(now, max(ids), looked.writers))
        self._last_writers = looked.writers
        # At the start they come from the highest id down.
        rows = looked.rows[: self._lines] if first else looked.rows
        return sorted(rows, key=lambda row: (row["created_at"] is not None, row["created_at"], row["id"]))

    def _rise(self, now: float) -> None:
        floor = self._floor or 0
        while self._marks:
            mark = self._marks[0]
            # Those that the last look still found may have committed after this one's snapshot.
            if now < mark.at + _LATE_SECONDS or self._last_writers is None or mark.writers & self._last_writers:
                break
            floor = max(floor, mark.highest_id)
            self._marks.popleft()
        if floor != self._floor:
            self._floor = floor
            self._seen = {number for number in self._seen if number > floor}

    def _limit(self) -> int:
        return _BATCH if self._floor is not None else max(self._lines, _START_ROWS)


def _read(rows: list[Row]) -> Looked:
    writers = frozenset(rows[0]["writers"])
    for row in rows:
        del row["writers"]
    return Looked([row for row in rows if row["id"] is not None], writers)


class _Runner:
    """What both runners share: a look at the table, through a link that fails fast and comes back by itself."""

    def __init__(self, following: Following, postgres: PostgresLink, clean: Callable[[Row], Row]) -> None:
        self._following = following
        self._postgres = postgres
        self._clean = clean
        self._waiting: deque[Row] = deque()

    def _look(self) -> tuple[Looked | None, float]:
        """Return what was seen, or None if Postgres is away, which costs nothing but time."""
        statement = self._following.look()
        try:
            return self._postgres.run(lambda connection: run(connection, statement)), time.monotonic()
        except AwayError:
            return None, time.monotonic()

    def _take(self, looked: Looked | None, now: float) -> float:
        """Keep what was seen, and return for how long to wait if that is nothing."""
        if looked is None:
            return _POLL_SECONDS
        self._waiting.extend(self._clean(row) for row in self._following.take(looked, now))
        return self._following.pause


class Follower(_Runner):
    """An iterator over rows, which waits for the next one and ends when it is closed.

    While Postgres is away it waits too, and goes on where it was. One thread iterates; any may close it.
    """

    def __init__(self, following: Following, postgres: PostgresLink, clean: Callable[[Row], Row]) -> None:
        super().__init__(following, postgres, clean)
        self._closed = threading.Event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Row:
        """Return the next row.

        Raises:
            StopIteration: It was closed.
        """
        while not self._closed.is_set():
            if self._waiting:
                return self._waiting.popleft()
            pause = self._take(*self._look())
            if not self._waiting:
                self._closed.wait(pause)
        raise StopIteration

    def __enter__(self) -> Self:
        if self._closed.is_set():
            raise ClosedError("The follower is closed: make a new one.")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration; again does nothing."""
        self._closed.set()


class AsyncFollower(_Runner):
    """As `Follower`, for an event loop, which it does not block."""

    def __init__(self, following: Following, postgres: PostgresLink, clean: Callable[[Row], Row]) -> None:
        super().__init__(following, postgres, clean)
        self._closed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Row:
        """Return the next row.

        Raises:
            StopAsyncIteration: It was closed.
        """
        while not self._closed.is_set():
            if self._waiting:
                return self._waiting.popleft()
            # Who is cancelled here has taken nothing: the next look sees the same rows.
            pause = self._take(*await asyncio.to_thread(self._look))
            if not self._waiting:
                await self._wait(pause)
        raise StopAsyncIteration

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return

    async def __aenter__(self) -> Self:
        if self._closed.is_set():
            raise ClosedError("The follower is closed: make a new one.")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the iteration; again does nothing."""
        self._closed.set()
