"""New errors as they arrive, for administrators who watch.

One task looks into the table every second while anybody watches, for all of them together. It asks by id, and once
more for those of the last ten seconds: ids are given out before rows are to be seen, so that a lower one can appear
after a higher one. Not here: how an error gets to a browser (`admin.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Self

import psycopg

from checkpointer.errors import CheckpointerError
from observability.errors import reading

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from observability.api.store import Store
    from observability.errors.statements import Row

_POLL_SECONDS = 1.0
_LATE_SECONDS = 10.0
_LATE_ROWS = 100
_BATCH = 500
_QUEUE_ROWS = 1_000

REPLAYED = 256
"""The most errors that are delivered to somebody who comes back."""


class ErrorFeed:
    """Follows the table and feeds watchers; used from one event loop.

    Args:
        store: Has the table.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: set[Watcher] = set()
        self._task: asyncio.Task[None] | None = None
        self._beginning = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def watch(self, last_id: int | None) -> AsyncIterator[Watcher]:
        """Watch, from the moment that the block begins.

        Args:
            last_id: The last error that was seen; what came after it is delivered first.

        Raises:
            CheckpointerError: Postgres is away.
        """
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            async with self._beginning:
                # What is there now is known before anybody is told that this watches: nothing falls in between.
                if self._task is None:
                    self._task = asyncio.create_task(self._follow(*await self._known()))
            if last_id is not None:
                rows = await self._store.run(reading.since(last_id, limit=REPLAYED + 1))
                watcher.replay(rows)
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                await self.aclose()

    async def aclose(self) -> None:
        """End the task."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _known(self) -> tuple[int, set[int]]:
        """Return the id from which on is looked, and the ids beyond it that are there already."""
        newest = await self._store.run(reading.newest_id())
        floor = max(0, newest - _LATE_ROWS)
        rows = await self._store.run(reading.since(floor, limit=_BATCH))
        return floor, {row["id"] for row in rows if row["id"] <= newest}

    async def _follow(self, floor: int, seen: set[int]) -> None:
        # The highest id at each look of the last seconds, the oldest first.
        marks: deque[tuple[float, int]] = deque()
        clock = asyncio.get_running_loop().time
        while True:
            # Postgres is away, or refuses: what comes meanwhile is found later.
            with contextlib.suppress(CheckpointerError, psycopg.Error):
                rows = await self._store.run(reading.since(floor, limit=_BATCH))
                fresh = [row for row in rows if row["id"] not in seen]
                seen.update(row["id"] for row in fresh)
                for watcher in self._watchers:
                    watcher.take(fresh)
                if rows:
                    marks.append((clock(), rows[-1]["id"]))
                if len(rows) == _BATCH:
                    floor = rows[-1]["id"]
                while marks and marks[0][0] < clock() - _LATE_SECONDS:
                    floor = max(floor, marks.popleft()[1])
                seen = {number for number in seen if number > floor}
                if len(rows) == _BATCH:
                    continue
            await asyncio.sleep(_POLL_SECONDS)


class Watcher:
    """An async iterator over new errors; None says that some before the next one are missing."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Row | None] = asyncio.Queue()
        self._replayed: set[int] = set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Row | None:
        return await self._queue.get()

    def replay(self, rows: list[Row]) -> None:
        """Deliver what came after the last one seen, before what has come since."""
        waiting = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        self._replayed = {row["id"] for row in rows}
        if len(rows) > REPLAYED:
            self._queue.put_nowait(None)
            rows = []
        for row in rows:
            self._queue.put_nowait(row)
        self.take([row for row in waiting if row is not None])

    def take(self, rows: list[Row]) -> None:
        """Deliver new ones; one that is too slow loses what it has not taken, and is told."""
        for row in rows:
            if row["id"] in self._replayed:
                continue
            if self._queue.qsize() >= _QUEUE_ROWS:
                while not self._queue.empty():
                    self._queue.get_nowait()
                self._queue.put_nowait(None)
            self._queue.put_nowait(row)
