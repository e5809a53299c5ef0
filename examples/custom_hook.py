"""A hook of your own: a function, an async function, one that fails, and one that a package publishes by name.

Run it: python examples/custom_hook.py
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from _agent import addresses, thread
from langgraph.graph import END, START, StateGraph

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from checkpointer import CheckpointEvent

# What another package has to contain: a factory, and one line of its pyproject.toml that gives it a name:
#
#     [project.entry-points."checkpointer.hooks"]
#     pager = "pager_hook:create"
#
PACKAGE = {
    "pager_hook.py": '''
def create(context):
    """Return the hook. The context opens connections: context.connect_postgres(), context.connect_redis()."""
    def page(event):
        if event.severity != "info":
            print(f"   pager:    [{event.severity}] {event.error_type} in application {context.prefix!r}")
    return page
''',
    "pager_hook-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: pager-hook\nVersion: 1.0\n",
    "pager_hook-1.0.dist-info/entry_points.txt": "[checkpointer.hooks]\npager = pager_hook:create\n",
}


class State(TypedDict, total=False):
    """The state of a graph that yields a NaN, which the saver replaces and reports."""

    score: float


def run_graph(saver: BufferedPostgresSaver) -> float:
    """Run the graph and return what it answers."""
    builder = StateGraph(State)
    builder.add_node("rate", lambda state: {"score": math.nan})
    builder.add_edge(START, "rate")
    builder.add_edge("rate", END)
    return float(builder.compile(checkpointer=saver).invoke({"score": 1.0}, thread("hook"))["score"])


def on_event(event: CheckpointEvent) -> None:
    """A plain hook; it runs in a thread of its own and may block."""
    print(f"   function: [{event.severity}] {event.message}")


async def on_event_async(event: CheckpointEvent) -> None:
    """An async hook; it runs in an event loop of its own."""
    await asyncio.sleep(0.01)
    print(f"   async:    {event.name} during {event.operation}")


def broken(event: CheckpointEvent) -> None:
    """A hook with a bug."""
    raise ZeroDivisionError("a bug in a hook")


def main() -> None:
    """Run the example."""
    with addresses() as at, tempfile.TemporaryDirectory() as folder:
        print("1. saver.hooks.add(hook)")
        with BufferedPostgresSaver.from_conn_string(at.postgres_uri, redis_url=at.redis_url, hooks=()) as saver:
            saver.setup()
            unsubscribe = saver.hooks.add(on_event)
            saver.hooks.add(on_event_async)
            saver.hooks.add(broken)
            print(f"   the run's answer, whatever the hooks do: {run_graph(saver)}")
            saver.hooks.flush()
            for name, stats in saver.hooks.stats().items():
                print(f"   {name}: {stats.delivered} delivered, {stats.failed} failed")

            unsubscribe()
            run_graph(saver)
            saver.hooks.flush()
            print(f"   after unsubscribing there are: {', '.join(saver.hooks.stats())}")

        print("2. a hook by name, from an installed package")
        for name, text in PACKAGE.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        sys.path.append(folder)  # stands for `pip install pager-hook`
        with BufferedPostgresSaver.from_conn_string(
            at.postgres_uri, redis_url=at.redis_url, hooks=("console", "system_errors", "pager")
        ) as saver:
            run_graph(saver)


if __name__ == "__main__":
    main()
