"""What the processes do that the torture test kills: lanes that run graphs on threads of their own, until told to stop.

Not here: the faults (`torture.py`). A *lane* works on a few thread ids, one call at a time: runs with fan-out, subgraph
and interrupts, state updates, copies, prunes, deletions and new lives of the same ids. What it learns goes to a
log outside both stores. Typed errors are met by going on; any other exception is a failure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from audit import Log, RecordingSaver
from fault_graph import build, config_of, next_input

from checkpointer import FlushIncompleteError, TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Generator

EXPECTED = (TierUnavailableError, FlushIncompleteError)
LANES = 3
SLOTS = 2
_PATIENCE = 0.1


class Call(NamedTuple):
    """A call to make, or its `a` twin."""

    target: Any
    method: str
    args: tuple[Any, ...]
    named: dict[str, Any]


class Lane:
    """See the module. `steps` yields calls and receives their results, so that it serves both APIs."""

    def __init__(self, name: str, saver: RecordingSaver, graph: Any, log: Log, rng: random.Random, stop: Path) -> None:
        self._saver = saver
        self._graph = graph
        self._log = log
        self._rng = rng
        self._stop = stop
        self._threads = [f"{name}-{slot}" for slot in range(SLOTS)]
        self._copies = 0

    def _call(self, target: Any, method: str, *args: Any, **named: Any) -> Call:
        return Call(target, method, args, named)

    def steps(self, unfinished: set[str]) -> Generator[Call, Any, None]:
        """Work until the file `stop` is there.

        Args:
            unfinished: Threads whose deletion an earlier process began and did not see done.
        """
        for thread in self._threads:
            if thread in unfinished:
                yield from self._deletion(thread)
        while not self._stop.exists():
            thread = self._rng.choice(self._threads)
            try:
                yield from self._act(thread)
            except EXPECTED as exc:
                self._log("error", type(exc).__name__)
                yield self._call(None, "sleep", _PATIENCE)

    def _act(self, thread: str) -> Generator[Call, Any, None]:
        config = config_of(thread)
        state = yield self._call(self._graph, "get_state", config)
        self._log("seen", thread, state.config["configurable"].get("checkpoint_id") or "")
        if state.next:
            yield from self._run(config, next_input(state))
            return
        size = len(state.values.get("xs", ()))
        act = self._rng.random()
        if size > 40 or (size and act < 0.05):
            yield from self._deletion(thread)
        elif size and act < 0.10:
            self._copies += 1
            target = f"{thread}-copy-{os.getpid()}-{self._copies}"
            yield self._call(self._saver, "copy_thread", thread, target)
            yield from self._update(target)
        elif size and act < 0.15:
            yield self._call(self._saver, "prune", [thread])
        elif size and act < 0.30:
            yield from self._update(thread)
        else:
            yield from self._run(config, next_input(state))

    def _run(self, config: Any, value: Any) -> Generator[Call, Any, None]:
        durability = self._rng.choice(("sync", "async", "async"))
        yield self._call(self._graph, "invoke", value, config, durability=durability)

    def _update(self, thread: str) -> Generator[Call, Any, None]:
        values = {"xs": ["updated"], "note": "updated"}
        yield self._call(self._graph, "update_state", config_of(thread), values, as_node="ask")

    def _deletion(self, thread: str) -> Generator[Call, Any, None]:
        """Delete, and do nothing else with the thread before that is acknowledged."""
        while True:
            try:
                yield self._call(self._saver, "delete_thread", thread)
            except EXPECTED as exc:
                self._log("error", type(exc).__name__)
                if self._stop.exists():
                    return
                yield self._call(None, "sleep", _PATIENCE)
            else:
                return

    def run(self, unfinished: set[str]) -> None:
        steps = self.steps(unfinished)
        step = next(steps, None)
        while step is not None:
            try:
                if step.target is None:
                    result: Any = time.sleep(*step.args)
                else:
                    result = getattr(step.target, step.method)(*step.args, **step.named)
            except Exception as exc:  # noqa: BLE001 - the lane decides what it means
                step = _advance(steps.throw, exc)
            else:
                step = _advance(steps.send, result)

    async def arun(self, unfinished: set[str]) -> None:
        steps = self.steps(unfinished)
        step = next(steps, None)
        while step is not None:
            try:
                if step.target is None:
                    result: Any = await asyncio.sleep(*step.args)
                else:
                    result = await getattr(step.target, f"a{step.method}")(*step.args, **step.named)
            except Exception as exc:  # noqa: BLE001 - the lane decides what it means
                step = _advance(steps.throw, exc)
            else:
                step = _advance(steps.send, result)


def _advance(step: Any, value: Any) -> Call | None:
    try:
        found: Call = step(value)
    except StopIteration:
        return None
    return found


def unfinished_deletions(lines: list[list[Any]]) -> set[str]:
    begun: set[str] = set()
    for kind, *rest in lines:
        if kind == "try_delete":
            begun.add(rest[0])
        elif kind == "delete":
            begun.discard(rest[0])
    return begun


def run(number: int, asynchronous: bool, seed: int, folder: str, postgres_uri: str, redis_url: str) -> None:
    """Work in this process until the file `stop` is in the folder."""
    # The pools tell of every broken connection; here they are the rule.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    log = Log(Path(folder, f"{number}.log"))
    log("start")
    saver: Any = RecordingSaver.from_conn_string(
        postgres_uri,
        redis_url=redis_url,
        hooks=(),
        flush_age=0.2,
        flush_size=200,
        redis_timeout=1.0,
        postgres_timeout=2.0,
    )
    saver.log = log
    saver.hooks.add(lambda event: log("event", event.name, event.error_type, event.thread_id, event.message))
    try:
        unfinished = unfinished_deletions(log.lines())
        graph = build(saver)
        lanes = [
            Lane(f"w{number}-{i}", saver, graph, log, random.Random(f"{seed}-{i}"), Path(folder, "stop"))
            for i in range(LANES)
        ]
        if asynchronous:
            asyncio.run(_arun(saver, lanes, unfinished))
        else:
            threads = [threading.Thread(target=_guarded, args=(lane, unfinished, log)) for lane in lanes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            saver.close()
    except BaseException:
        log("failure", traceback.format_exc())
        raise


def _guarded(lane: Lane, unfinished: set[str], log: Log) -> None:
    try:
        lane.run(unfinished)
    except BaseException:  # noqa: BLE001 - the parent fails the test for it
        log("failure", traceback.format_exc())


async def _arun(saver: RecordingSaver, lanes: list[Lane], unfinished: set[str]) -> None:
    async with saver:
        await asyncio.gather(*(lane.arun(unfinished) for lane in lanes))
