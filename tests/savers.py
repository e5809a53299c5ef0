"""Savers, checkpoints and a state graph for tests that count on exactly what was put."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import psycopg
from langgraph.checkpoint.base import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from checkpointer import CheckpointEvent

NOTHING: frozenset[Any] = frozenset()
"""No trigger: nothing is flushed unasked."""


class State(TypedDict):
    xs: Annotated[list[int], operator.add]
    big: list[str]


class Recording(BufferedPostgresSaver):
    """A saver that keeps its events."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[CheckpointEvent] = []
        self.hooks.add(self.events.append)

    def named(self, name: str) -> list[CheckpointEvent]:
        """Return the events of this name so far."""
        self.hooks.flush(5)
        return [event for event in self.events if event.name == name]


def config(thread: str = "t", checkpoint_id: str | None = None, **more: Any) -> Any:
    found: dict[str, Any] = {"thread_id": thread, "checkpoint_ns": "", **more}
    return {"configurable": found if checkpoint_id is None else {**found, "checkpoint_id": checkpoint_id}}


def make_checkpoint(step: int, **values: Any) -> tuple[Any, Any, Any]:
    """Return checkpoint, metadata and new versions; `step` alone changes, the other values keep their version."""
    channels = {"step": [step], **values}
    versions = {name: f"{step + 1:08}.0" if name == "step" else "00000000.1" for name in channels}
    checkpoint = {
        "v": 4,
        "id": str(uuid6(clock_seq=step)),
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": channels,
        "channel_versions": versions,
        "versions_seen": {},
        "updated_channels": None,
    }
    metadata = {"source": "loop", "step": step, "parents": {}}
    new = versions if step == 0 else {"step": versions["step"]}
    return checkpoint, metadata, new


def put(saver: Any, thread: str, step: int, parent: Any = None, **values: Any) -> Any:
    """Put a checkpoint after a parent; returns the config that names it."""
    checkpoint, metadata, new = make_checkpoint(step, **values)
    return saver.put(parent or config(thread), checkpoint, metadata, new)


def put_chain(saver: Any, thread: str, steps: range, parent: Any = None, **values: Any) -> Any:
    for step in steps:
        parent = put(saver, thread, step, parent, **values)
    return parent


def stock_tuples(uri: str, thread: str = "t") -> list[Any]:
    """Return a thread's checkpoints as stock reads them, newest first."""
    with PostgresSaver.from_conn_string(uri) as stock:
        return list(stock.list({"configurable": {"thread_id": thread}}))


def stock_steps(uri: str, thread: str = "t") -> list[int]:
    return [found.metadata["step"] for found in stock_tuples(uri, thread)]


def is_open(uri: str, thread: str = "t") -> bool:
    with psycopg.connect(uri, autocommit=True) as conn:
        found = conn.execute("SELECT 1 FROM checkpoint_buffer_threads WHERE thread_id = %s", (thread,)).fetchone()
    return found is not None


def reachable(saver: Any) -> bool:
    """Tell whether Redis answers, without a word about a thread of the test."""
    try:
        saver.get_tuple(config("nobody", "0"))  # of a named checkpoint, Redis is asked first
    except ConnectionError:
        return False
    return True


def graph(saver: Any, *actions: Any) -> Any:
    """Return a chain of nodes, each of which calls one of the actions."""
    builder = StateGraph(State)
    names = [f"n{i}" for i in range(len(actions))]
    for i, (name, action) in enumerate(zip(names, actions, strict=True)):

        def node(state: Any, i: int = i, action: Any = action) -> Any:
            action()
            return {"xs": [i]}

        builder.add_node(name, node)
    for a, b in zip([START, *names], [*names, END], strict=True):
        builder.add_edge(a, b)
    return builder.compile(checkpointer=saver)
