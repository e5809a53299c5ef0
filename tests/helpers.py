"""What several test files use: waiting for something to become true, and addresses of databases."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit, urlunsplit

from langgraph.checkpoint.base import empty_checkpoint
from psycopg.conninfo import make_conninfo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from langchain_core.runnables import RunnableConfig

    from checkpointer import BufferedPostgresSaver

T = TypeVar("T")

_INTERVAL = 0.02
# On a loaded machine anything can take long; only a test that fails waits for all of it.
_DEADLINE = 60


def wait_until(predicate: Callable[[], T], timeout: float = _DEADLINE, message: str = "it did not become true") -> T:
    """Call `predicate` until its result is true, and return that; fail the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"After {timeout} s: {message} (last result: {result!r})")
        time.sleep(_INTERVAL)
    return result


async def await_until(
    predicate: Callable[[], T | Awaitable[T]],
    timeout: float = _DEADLINE,  # noqa: ASYNC109 - the same signature as the synchronous one
    message: str = "it did not become true",
) -> T:
    """As `wait_until`, without blocking the loop; `predicate` may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        outcome = predicate()
        result: T = await outcome if inspect.isawaitable(outcome) else outcome
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"After {timeout} s: {message} (last result: {result!r})")
        await asyncio.sleep(_INTERVAL)


def put_one(
    saver: BufferedPostgresSaver, thread_id: str, value: object = "value", run_id: str | None = None
) -> RunnableConfig:
    """Put a checkpoint whose channel `a` holds `[value]`, as the first of its thread, and return its config."""
    checkpoint = empty_checkpoint()
    versions = {"a": checkpoint["id"]}
    checkpoint["channel_values"] = {"a": [value]}
    checkpoint["channel_versions"] = {**versions}
    config: RunnableConfig = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    metadata = {"source": "input", "step": -1, "parents": {}} | ({"run_id": run_id} if run_id else {})
    return saver.put(config, checkpoint, metadata, {**versions})  # type: ignore[arg-type]


def with_database(uri: str, name: str) -> str:
    """Return the same address with another database, as a URI if it was one."""
    if "://" not in uri:
        return make_conninfo(uri, dbname=name)
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"/{name}"))
