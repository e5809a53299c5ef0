"""A rolling deployment: stock savers and ours take turns on live threads, in the middle of their runs."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import pytest
from audit import RecordingStock
from fault_graph import build, config_of
from helpers import wait_until
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench import Bench


@pytest.fixture
def stock(bench: Bench) -> Iterator[Any]:
    with RecordingStock.from_conn_string(bench.postgres_uri) as saver:
        saver.log = bench.log  # type: ignore[attr-defined]  # made by the class method, of this class
        yield saver


def hand_over(saver: Any) -> None:
    """End a saver's turn; a stock one sees what is in Postgres, so ours flushes, as it does when it is shut down."""
    if hasattr(saver, "flush"):
        assert saver.flush()


def steps(savers: list[Any], after: Callable[[Any], None]) -> list[Any]:
    """Run a thread, each step under the next saver in turn; returns what was seen after each step.

    Static interrupts end a run before each node, so the thread is in the middle of a run whenever the savers change.
    """
    seen = []
    value: Any = {"xs": ["input"], "note": "begun"}
    for i in range(40):
        saver, following = savers[i % len(savers)], savers[(i + 1) % len(savers)]
        build(saver).invoke(value, config_of("t"), interrupt_before=["part", "sub", "ask"])
        after(saver)
        state = build(following).get_state(config_of("t"))
        asked = [found.value for task in state.tasks for found in task.interrupts]
        seen.append((state.values, state.next, asked))
        value = Command(resume=f"answer {i}") if asked else None
        if not state.next:
            if len(state.values["xs"]) > 12:
                return seen
            value = {"xs": ["again"], "note": "begun"}
    raise AssertionError("the thread never ended")


@pytest.mark.parametrize("order", ["stock ours", "ours stock other", "stock ours other stock", "ours other"])
def test_stock_and_ours_take_turns_within_a_run_and_the_thread_does_not_notice(
    bench: Bench, stock: Any, order: str
) -> None:
    known = {
        "stock": stock,
        "ours": bench.saver(triggers=frozenset()),
        "other": bench.saver(direct=True, triggers=frozenset()),
    }
    # Two of ours need no flush between them: they share the buffer.
    after = hand_over if "stock" in order else lambda saver: None
    seen = steps([known[name] for name in order.split()], after)
    assert seen == steps([InMemorySaver()], lambda saver: None)
    bench.audit()


class State(TypedDict):
    xs: Annotated[list[str], operator.add]


def _pending(saver: Any) -> Any:
    found = saver.get_tuple(config_of("t"))  # None as long as the run's first put is on its way
    return found and found.pending_writes


class NodeFailedError(Exception):
    """A node's failure, with which a run breaks off."""


@pytest.mark.parametrize("order", ["stock ours stock", "ours stock ours", "ours other ours"])
def test_what_a_broken_off_run_leaves_pending_is_taken_up_by_the_next_saver(
    bench: Bench, stock: Any, order: str
) -> None:
    known = {
        "stock": stock,
        "ours": bench.saver(triggers=frozenset()),
        "other": bench.saver(direct=True, triggers=frozenset()),
    }
    ran: list[str] = []

    def graph(saver: Any) -> Any:
        def first(state: State) -> State:
            ran.append("first")
            return {"xs": ["first"]}

        def second(state: State) -> State:
            if "second" not in ran:
                ran.append("second")
                wait_until(lambda: _pending(saver), message="the first node is done")
                raise NodeFailedError
            return {"xs": ["second"]}

        builder = StateGraph(State)
        for name, node in (("first", first), ("second", second)):
            builder.add_node(name, node)
            builder.add_edge(START, name)
            builder.add_edge(name, END)
        return builder.compile(checkpointer=saver)

    before, between, after = (known[name] for name in order.split())
    with pytest.raises(NodeFailedError):
        graph(before).invoke({"xs": ["input"]}, config_of("t"))
    if "stock" in order:
        hand_over(before)
    result = graph(between).invoke(None, config_of("t"))
    assert result["xs"] == ["input", "first", "second"]
    assert ran == ["first", "second"], "what was pending was done again"
    if "stock" in order:
        hand_over(between)
    assert graph(after).get_state(config_of("t")).values == result
    hand_over(after)
    bench.audit()
