"""The users behind the threads: what their screens show as it happens, by the run events that a browser gets too.

Not here: what a user may see (`observability/projections.py`).
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Self

from observability import subscribe_run_events
from observability.target import open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from checkpointer.embedded import Servers

    Show = Callable[[dict[str, Any]], None]

__all__ = ["Audience"]

_SECONDS = 30.0


class Audience:
    """Watches threads in an event loop of its own; use it under `with`.

    Args:
        servers: Where run events come from.
    """

    def __init__(self, servers: Servers) -> None:
        self._target = open_target(servers.postgres_uri, servers.redis_url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="audience", daemon=True)
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._in_loop(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS)
        self._loop.close()
        self._target.close()

    def watch(self, thread_id: str, show: Show) -> None:
        """Watch a thread instead of the one before; returns when nothing of it can be missed any more.

        Args:
            thread_id: The thread.
            show: Called with what the screen shows, in the loop's thread.
        """
        self._in_loop(self._change_to(thread_id, show))

    def _in_loop(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_SECONDS)

    async def _leave(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _change_to(self, thread_id: str, show: Show) -> None:
        await self._leave()
        connected = asyncio.Event()
        self._task = asyncio.create_task(self._watch(thread_id, show, connected))
        await connected.wait()

    async def _watch(self, thread_id: str, show: Show, connected: asyncio.Event) -> None:
        async with subscribe_run_events(thread_id, observability=self._target) as events:
            connected.set()
            async for event in events:
                show(event)
