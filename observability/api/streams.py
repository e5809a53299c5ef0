"""Open streams: how many there may be, how long one lasts, and how all of them end.

A server that shuts down waits for the responses that are under way; a stream of events would keep it waiting for
ever. `Streams.end` ends them. Not here: what is streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from fastapi import HTTPException

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

T = TypeVar("T")

_MOST = 1_000
# Clients come back by themselves, and are asked for their credentials again.
_LIFETIME = 3_600.0


class Streams:
    """The open streams of one application."""

    def __init__(self) -> None:
        self._open: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._ended = False

    def end(self) -> None:
        """End all streams, and those that are opened later at once. Call it from any thread, as often as you like.

        A server's own signal handler is the right place: most servers wait for open responses before they end the
        application's lifespan.
        """
        self._ended = True
        for loop, event in list(self._open):
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its streams with it
                loop.call_soon_threadsafe(event.set)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Allow streams while an application runs."""
        self._ended = False
        try:
            yield
        finally:
            self.end()

    def check_room(self) -> None:
        """Refuse one more stream if there are too many.

        Raises:
            HTTPException: 503.
        """
        if len(self._open) >= _MOST:
            raise HTTPException(503, "Too many streams are open: try again later.", headers={"Retry-After": "5"})

    async def follow(self, source: AsyncIterator[T]) -> AsyncIterator[T]:
        """Yield what a source yields until it, the stream's time, or all streams end."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        ends_at = loop.time() + _LIFETIME
        self._open.add((loop, event))
        if self._ended:
            event.set()
        end = asyncio.ensure_future(event.wait())
        step: asyncio.Future[T] | None = None
        try:
            while True:
                step = asyncio.ensure_future(anext(source))
                await asyncio.wait({step, end}, timeout=ends_at - loop.time(), return_when=asyncio.FIRST_COMPLETED)
                if end.done() or not step.done():
                    return
                try:
                    item = step.result()
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._open.discard((loop, event))
            end.cancel()
            if step is not None and not step.done():
                step.cancel()
                await asyncio.wait({step})
