"""What the processes do that the crash test kills. Started by a fork server, so that a start costs little."""

from __future__ import annotations

import asyncio
import operator
import os
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from checkpointer import BufferedPostgresSaver


class State(TypedDict):
    xs: Annotated[list[Any], operator.add]
    note: str


class Acknowledging(BufferedPostgresSaver):
    """Writes each acknowledgement to a pipe, which neither Redis nor Postgres knows of."""

    pipe: int

    def _tell(self, *what: Any) -> None:
        os.write(self.pipe, ("\t".join(map(str, what)) + "\n").encode())

    def put(self, config: Any, *args: Any) -> Any:
        saved = super().put(config, *args)
        self._tell("put", *saved["configurable"].values())
        return saved

    async def aput(self, config: Any, *args: Any) -> Any:
        saved = await super().aput(config, *args)
        self._tell("put", *saved["configurable"].values())
        return saved

    def put_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        super().put_writes(config, writes, task_id, task_path)
        self._told_writes(config, writes, task_id)

    async def aput_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        await super().aput_writes(config, writes, task_id, task_path)
        self._told_writes(config, writes, task_id)

    def _told_writes(self, config: Any, writes: Any, task_id: str) -> None:
        found = config["configurable"]
        self._tell("writes", found["thread_id"], found["checkpoint_ns"], found["checkpoint_id"], task_id, len(writes))


def build(saver: Any) -> Any:
    inner = StateGraph(State)
    inner.add_node("deep", lambda state: {"xs": [("deep", "x" * 500)]})
    inner.add_edge(START, "deep")
    inner.add_edge("deep", END)

    builder = StateGraph(State)
    builder.add_node("step", lambda state: {"xs": [len(state["xs"])], "note": "n" * 50})
    builder.add_node("part", lambda state: {"xs": [("part", state)]})
    builder.add_node("sub", inner.compile())
    builder.add_edge(START, "step")
    builder.add_conditional_edges("step", lambda state: [Send("part", i) for i in range(3)])
    builder.add_edge("part", "sub")
    builder.add_conditional_edges("sub", lambda state: "step" if len(state["xs"]) < 10_000 else END)
    return builder.compile(checkpointer=saver)


def run(postgres_uri: str, redis_url: str, prefix: str, pipe: Any, asynchronous: bool) -> None:
    """Run a graph that goes on until the process is killed."""
    saver = Acknowledging.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), flush_age=0.02, flush_size=40
    )
    saver.pipe = pipe.fileno()
    graph = build(saver)
    config: Any = {"configurable": {"thread_id": f"t{os.getpid()}"}, "recursion_limit": 100_000}
    if asynchronous:
        asyncio.run(graph.ainvoke({"xs": []}, config))
    else:
        graph.invoke({"xs": []}, config)
