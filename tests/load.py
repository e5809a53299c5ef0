"""Writers that put checkpoints until told to stop, and know what was acknowledged; for the fault tests.

Each writer has a thread of checkpoints of its own, one child after the other, synchronous or asynchronous.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import create_checkpoint, empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

_PAUSE = 0.005


def steps(thread: str) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments of the puts of one thread, for ever."""
    config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
    checkpoint = empty_checkpoint()
    step = 0
    while True:
        checkpoint = create_checkpoint(checkpoint, None, step)
        checkpoint["channel_values"] = {"xs": [thread, step]}
        checkpoint["channel_versions"] = {"xs": f"{step:08}"}
        yield config, checkpoint, {"source": "loop", "step": step, "parents": {}}, {"xs": f"{step:08}"}
        config = {"configurable": {"thread_id": thread, "checkpoint_ns": "", "checkpoint_id": checkpoint["id"]}}
        step += 1


class Load:
    """Runs writers for as long as the block lasts; half of them on an event loop.

    Attributes:
        acknowledged: What was acknowledged: thread, checkpoint id -> step.
        failures: What a put has raised.
        slowest: The seconds that the slowest put took.
    """

    def __init__(self, saver: Any, threads: Sequence[str]) -> None:
        self._saver = saver
        self._stop = threading.Event()
        self.acknowledged: dict[tuple[str, str], int] = {}
        self.failures: list[BaseException] = []
        self.slowest = 0.0
        half = len(threads) // 2
        self._workers = [threading.Thread(target=self._write, args=[thread]) for thread in threads[:half]]
        self._workers.append(threading.Thread(target=lambda: asyncio.run(self._awrite_all(threads[half:]))))

    def _write(self, thread: str) -> None:
        try:
            for put in steps(thread):
                if self._stop.wait(_PAUSE):
                    return
                begun = time.monotonic()
                saved = self._saver.put(*put)
                self._note(saved, put, begun)
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self.failures.append(exc)

    async def _awrite_all(self, threads: Sequence[str]) -> None:
        await asyncio.gather(*map(self._awrite, threads))
        await self._saver._core._aclose_loop()

    async def _awrite(self, thread: str) -> None:
        try:
            for put in steps(thread):
                await asyncio.sleep(_PAUSE)
                if self._stop.is_set():
                    return
                begun = time.monotonic()
                saved = await self._saver.aput(*put)
                self._note(saved, put, begun)
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self.failures.append(exc)

    def _note(self, saved: Any, put: tuple[Any, ...], begun: float) -> None:
        self.slowest = max(self.slowest, time.monotonic() - begun)
        found = saved["configurable"]
        self.acknowledged[found["thread_id"], found["checkpoint_id"]] = put[2]["step"]

    def __enter__(self) -> Load:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(60)

    def count(self, thread: str | None = None) -> int:
        """Return how many puts were acknowledged."""
        return sum(thread in (None, owner) for owner, _ in list(self.acknowledged))

    def missing(self, postgres_uri: str) -> list[tuple[str, str]]:
        """Return what was acknowledged and stock `PostgresSaver` does not read, or not as it was put."""
        lost = []
        with PostgresSaver.from_conn_string(postgres_uri) as stock:
            for thread in {thread for thread, _ in self.acknowledged}:
                found = {
                    t.config["configurable"]["checkpoint_id"]: t.checkpoint["channel_values"]
                    for t in stock.list({"configurable": {"thread_id": thread}})
                }
                lost += [
                    (owner, i)
                    for (owner, i), step in self.acknowledged.items()
                    if owner == thread and found.get(i) != {"xs": [thread, step]}
                ]
        return lost
