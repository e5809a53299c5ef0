"""The loads, by the name under which a run can choose them.

Each module is one kind of work. A load is a coroutine function that takes the lab and notes its results there; its
name in results can have several parts (`burst, made` beside `burst`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.loads import (
    backlog,
    channels,
    concurrency,
    events,
    flusher,
    graphs,
    history,
    latency,
    memory,
    operations,
    resume,
    trips,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.lab import Lab

LOADS: dict[str, Callable[[Lab], Awaitable[None]]] = {
    "operations": operations.by_size,
    "async": operations.asynchronous,
    "cold": operations.cold,
    "burst": concurrency.burst,
    "sustained": concurrency.sustained,
    "graphs": graphs.run,
    "resume": resume.run,
    "backlog": backlog.run,
    "flusher": flusher.run,
    "history": history.run,
    "channels": channels.run,
    "network": latency.run,
    "trips": trips.run,
    "memory": memory.run,
    "events": events.run,
}
"""In the order in which they are run."""
