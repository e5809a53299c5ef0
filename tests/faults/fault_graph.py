"""The graph of the fault tests: fan-out, a subgraph and an interrupt; its nodes are functions of the state alone."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

if TYPE_CHECKING:
    from collections.abc import Callable


class State(TypedDict):
    xs: Annotated[list[Any], operator.add]
    note: str


class Inner(TypedDict):
    note: str
    own: list[str]


def build(saver: Any, between: Callable[[], object] = lambda: None) -> Any:
    """Compile the graph; `between` is called in the first step of each run, and has no part in the state."""

    def step(state: State) -> Any:
        between()
        return {"xs": [len(state["xs"])], "note": f"step {len(state['xs'])}"}

    inner = StateGraph(Inner)
    inner.add_node("deep", lambda state: {"own": ["deep", "x" * 300]})
    inner.add_node("deeper", lambda state: {"note": f"{state['note']} {len(state['own'])}"})
    inner.add_edge(START, "deep")
    inner.add_edge("deep", "deeper")
    inner.add_edge("deeper", END)

    def ask(state: State) -> Any:
        if len(state["xs"]) % 4 == 1:
            return {"xs": [interrupt({"at": len(state["xs"])})]}
        return {"note": "not asked"}

    builder = StateGraph(State)
    builder.add_node("step", step)
    builder.add_node("part", lambda state: {"xs": [f"part {state}"]})
    builder.add_node("sub", inner.compile())
    builder.add_node("ask", ask)
    builder.add_edge(START, "step")
    builder.add_conditional_edges("step", lambda state: [Send("part", i) for i in range(3)])
    builder.add_edge("part", "sub")
    builder.add_edge("sub", "ask")
    builder.add_edge("ask", END)
    return builder.compile(checkpointer=saver)


def config_of(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def next_input(state: Any) -> Any:
    """Return what the thread's next run is to be given: an answer, nothing (it broke off), or a new input."""
    if state.next:
        asked = [found for task in state.tasks for found in task.interrupts]
        return Command(resume="answer") if asked else None
    return {"xs": [f"input {len(state.values.get('xs', ()))}"], "note": "begun"}


def turn(saver: Any, thread: str, between: Callable[[], object] = lambda: None) -> Any:
    """Run the graph on a thread from wherever it stands to its next stop."""
    graph, config = build(saver, between), config_of(thread)
    return graph.invoke(next_input(graph.get_state(config)), config)


async def aturn(saver: Any, thread: str, between: Callable[[], object] = lambda: None) -> Any:
    """See `turn`."""
    graph, config = build(saver, between), config_of(thread)
    return await graph.ainvoke(next_input(await graph.aget_state(config)), config)
