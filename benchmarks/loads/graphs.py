"""Whole graphs, many at a time: what a user of LangGraph feels, with all that LangGraph does around the saver.

Each shape is run by `ainvoke` for a number of threads at once, and measured is the time until all have ended; ours
flushes meanwhile, as it does in production. No node waits for anything, so that the saver's share is as large as it can
be: a graph that calls a model gains less.
"""

from __future__ import annotations

import asyncio
import gc
import operator
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Send

from benchmarks.states import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

CHAIN = "10 nodes"
NODES = 10
BRANCHES = 20
CHANNELS = 100
CALLS = 5


class _Talk(TypedDict):
    messages: Annotated[list[AnyMessage], operator.add]


def chain(saver: Any) -> Any:
    """Make a graph of ten nodes in a row, each of which says something."""
    builder = StateGraph(_Talk)
    for i in range(NODES):

        async def node(state: _Talk, i: int = i) -> Any:
            return {"messages": [AIMessage(f"step {i}")]}

        builder.add_node(f"n{i}", node)
        builder.add_edge(f"n{i - 1}" if i else START, f"n{i}")
    builder.add_edge(f"n{NODES - 1}", END)
    return builder.compile(checkpointer=saver)


def fan_out(saver: Any) -> Any:
    """Make a graph that starts twenty tasks at once and joins them."""
    builder = StateGraph(_Talk)

    async def work(state: Any) -> Any:
        return {"messages": [AIMessage(f"part {state['part']}")]}

    async def join(state: _Talk) -> Any:
        return {"messages": [AIMessage("joined")]}

    builder.add_node("work", work)
    builder.add_node("join", join)
    builder.add_conditional_edges(START, lambda state: [Send("work", {"part": i}) for i in range(BRANCHES)], ["work"])
    builder.add_edge("work", "join")
    builder.add_edge("join", END)
    return builder.compile(checkpointer=saver)


def wide(saver: Any) -> Any:
    """Make a graph of ten nodes over a hundred channels of 1 KB, of which each node changes one."""
    channels = {f"c{i}": list[str] for i in range(CHANNELS)}
    builder = StateGraph(TypedDict("State", channels))  # type: ignore[operator]
    for i in range(NODES):

        async def node(state: Any, i: int = i) -> Any:
            return {f"c{i}": [f"{i}".ljust(250, "x")] * 4}

        builder.add_node(f"n{i}", node)
        builder.add_edge(f"n{i - 1}" if i else START, f"n{i}")
    builder.add_edge(f"n{NODES - 1}", END)
    return builder.compile(checkpointer=saver)


class _Model(BaseChatModel):
    """Calls a tool some times and then answers."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: list[Any], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        done = sum(isinstance(message, ToolMessage) for message in messages)
        call = {"name": "look_up", "args": {"city": "Paris"}, "id": f"call-{done}"}
        said = AIMessage("", tool_calls=[call]) if done < CALLS else AIMessage("11 degrees, rain")
        return ChatResult(generations=[ChatGeneration(message=said)])


@tool
async def look_up(city: str) -> str:
    """Look up the weather of a city."""
    return f"{city}: 11 degrees, rain"


def agent(saver: Any) -> Any:
    """Make an agent that calls a tool five times before it answers."""
    model = _Model()

    async def think(state: MessagesState) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("agent", think)
    builder.add_node("tools", ToolNode([look_up]))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", tools_condition)
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=saver)


def _talk() -> Any:
    return {"messages": messages()}


def _all_channels() -> Any:
    return {f"c{i}": [f"{i}".ljust(250, "x")] * 4 for i in range(CHANNELS)}


SHAPES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    CHAIN: (chain, _talk),
    "fan-out": (fan_out, _talk),
    "wide state": (wide, _all_channels),
    "tool agent": (agent, _talk),
}


async def run(lab: Lab) -> None:
    """Measure each shape."""
    keys = lab.usual()
    with lab.servers.place() as place:
        async with lab.lanes("graphs", place, keys, "async") as lanes:
            for shape in SHAPES:
                load = f"graph, {shape}"
                count = lab.scale.graphs if shape == CHAIN else lab.scale.other_graphs
                lab.say(f"{load}: {count} at once")
                await lab.warm_up(load, lanes, partial(_run, lab, place, shape, 1))
                turn = partial(_run, lab, place, shape, count)
                await lab.take_turns(load, lanes, lab.scale.graph_rounds, turn)


async def _run(lab: Lab, place: Place, shape: str, count: int, lane: Lane) -> None:
    build, make = SHAPES[shape]
    graph = build(lane.face.saver)
    inputs = [(make(), {"configurable": {"thread_id": place.thread()}}) for _ in range(count)]
    gc.collect()
    begin = time.perf_counter()
    await asyncio.gather(*(graph.ainvoke(given, config) for given, config in inputs))
    lab.results.note(f"graph, {shape}", lane.key, (time.perf_counter() - begin) * 1e3, at=count)
