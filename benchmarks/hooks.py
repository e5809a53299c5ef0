"""What a hook that misbehaves costs a put: `python -m benchmarks.hooks`.

One saver for each hook, and one without any, take turns in one run on servers of its own. An event is emitted before
each turn of 25 puts, and in a second part before each single put, so that the hook has something to hang or to fail at;
a put by itself emits none. A hook that does nothing shows what handing the event to any thread costs. In the rows that
are *flooded* a thread emits 10,000 events a second meanwhile, and the hook emits one more for each; the thread's own
work competes with the puts too, so they are compared with a saver without hooks under the same flood.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import empty_checkpoint

from checkpointer import BufferedPostgresSaver, CheckpointEvent, embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TURNS = 40
_PUTS = 25
_FLOOD = 10_000


def _event() -> CheckpointEvent:
    return CheckpointEvent(name="benchmark.measured", severity="info", message="This is a benchmark.")


def _sleeps(event: CheckpointEvent) -> None:
    threading.Event().wait()


def _raises(event: CheckpointEvent) -> None:
    raise ValueError("This is a benchmark.")


@contextmanager
def _flood(saver: BufferedPostgresSaver) -> Iterator[None]:
    over = threading.Event()

    def emit() -> None:
        while not over.wait(0.001):
            for _ in range(_FLOOD // 1_000):
                saver.hooks.emit(_event())

    thread = threading.Thread(target=emit, daemon=True)
    thread.start()
    time.sleep(0.02)  # it has begun, and goes on
    try:
        yield
    finally:
        over.set()
        thread.join()


def _turn(saver: BufferedPostgresSaver, thread_id: str, every: int, times: list[float]) -> None:
    config: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
    for step in range(_PUTS):
        checkpoint = empty_checkpoint()
        versions: Any = {"messages": step + 1}
        checkpoint["channel_values"] = {"messages": ["x" * 1_000]}
        checkpoint["channel_versions"] = versions
        if step % every == 0:
            saver.hooks.emit(_event())
        begin = time.perf_counter()
        config = saver.put(config, checkpoint, {"source": "loop", "step": step, "parents": {}}, versions)
        times.append(time.perf_counter() - begin)
    saver.flush()


def _measure(servers: embedded.Servers, every: int) -> None:
    hooks: dict[str, Callable[[BufferedPostgresSaver], Any] | None] = {
        "no hook": None,
        "a hook that does nothing": lambda saver: lambda event: None,
        "a hook that sleeps forever": lambda saver: _sleeps,
        "a hook that raises": lambda saver: _raises,
        "no hook, flooded": None,
        "a hook that floods, flooded": lambda saver: lambda event: saver.hooks.emit(_event()),
    }
    with ExitStack() as stack:
        savers = {}
        for number, (name, make) in enumerate(hooks.items()):
            saver = BufferedPostgresSaver(
                servers.postgres_uri, servers.redis_url, prefix=f"h{every}-{number}", hooks=(), triggers=frozenset()
            )
            stack.callback(saver.close)
            saver.setup()
            if make is not None:
                saver.hooks.add(make(saver))
            savers[name] = saver
        times: dict[str, list[float]] = {name: [] for name in savers}
        for turn in range(-2, _TURNS):
            order = list(savers.items())
            for name, saver in order[turn % len(order) :] + order[: turn % len(order)]:
                kept = times[name] if turn >= 0 else []
                thread_id = f"{name} {every} {turn}"
                if name.endswith("flooded"):
                    with _flood(saver):
                        _turn(saver, thread_id, every, kept)
                else:
                    _turn(saver, thread_id, every, kept)
        medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"An event before every {every} puts:" if every > 1 else "An event before each put:")
    for name, median in medians.items():
        without = medians["no hook, flooded" if name.endswith("flooded") else "no hook"]
        print(f"  {name:30} {median * 1e6:8.0f} µs  {median / without:6.3f} of without a hook")


def main() -> None:
    """Measure, and print the medians and their ratios."""
    # What the hooks' own failures are logged as is not of interest.
    logging.getLogger("checkpointer.hooks").setLevel(logging.CRITICAL)
    with embedded.servers() as servers:
        for every in (_PUTS, 1):
            _measure(servers, every)


if __name__ == "__main__":
    main()
