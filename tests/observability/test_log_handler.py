"""The application's log records get into the log of the thread whose node made them."""

from __future__ import annotations

import asyncio
import logging
import operator
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import pytest
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph

import observability
from observability import ThreadLogHandler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from observability import Observability

THREADS = ("t", "u", "v")


class State(TypedDict):
    xs: Annotated[list[int], operator.add]


@pytest.fixture
def logger(target: Observability) -> Iterator[logging.Logger]:
    found = logging.getLogger("shop.checkout")
    handler = ThreadLogHandler(logging.INFO, observability=target)
    found.setLevel(logging.DEBUG)
    found.addHandler(handler)
    yield found
    found.removeHandler(handler)


def lines(target: Observability, thread: str = "t") -> list[tuple[str, str]]:
    assert target.flush(10)
    found = observability.read_thread_log(thread, observability=target)
    return [(line["level"], line["message"]) for line in found]


def graph(*nodes: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for number, node in enumerate(nodes):
        builder.add_node(f"n{number}", node)
        builder.add_edge(before, f"n{number}")
        before = f"n{number}"
    builder.add_edge(before, END)
    return builder.compile()


def config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}}


def test_a_node_and_what_it_calls_log_to_their_thread(logger: logging.Logger, target: Observability) -> None:
    @tool
    def price(item: str) -> int:
        """Look a price up."""
        logger.warning("no price for %s", item)
        return 1

    def node(state: State) -> State:
        logger.info("looking")
        return {"xs": [price.invoke({"item": "tea"})]}

    def fails(state: State) -> State:
        try:
            raise ValueError("sold out")
        except ValueError:
            logger.exception("cannot order")
        return {"xs": []}

    graph(node, fails).invoke({"xs": []}, config())
    logger.info("outside of any run")
    found = lines(target)
    assert found[:2] == [("info", "looking"), ("warning", "no price for tea")]
    level, message = found[2]
    assert level == "error"
    assert message.startswith("cannot order\nTraceback")
    assert message.endswith("ValueError: sold out")
    assert len(found) == 3


async def test_runs_at_the_same_time_do_not_mix(logger: logging.Logger, target: Observability) -> None:
    together = asyncio.Barrier(len(THREADS))

    async def node(state: State) -> State:
        await together.wait()
        logger.info("number %d", state["xs"][0])
        await together.wait()
        await asyncio.create_task(deeper(state["xs"][0]))
        return {"xs": []}

    async def deeper(number: int) -> None:
        logger.info("deeper %d", number)

    run = graph(node)
    await asyncio.gather(*(run.ainvoke({"xs": [n]}, config(thread)) for n, thread in enumerate(THREADS)))
    for number, thread in enumerate(THREADS):
        assert lines(target, thread) == [("info", f"number {number}"), ("info", f"deeper {number}")]


def test_levels_and_formats_are_those_of_the_handler(logger: logging.Logger, target: Observability) -> None:
    logger.handlers[-1].setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def node(state: State) -> State:
        logger.debug("too low")
        logger.critical("high")
        return {"xs": []}

    graph(node).invoke({"xs": []}, config())
    assert lines(target) == [("critical", "shop.checkout: high")]


def test_a_record_can_name_its_thread(logger: logging.Logger, target: Observability) -> None:
    logger.info("by hand", extra={"thread_id": "t"})
    assert lines(target) == [("info", "by hand")]


@pytest.mark.parametrize("name", ["checkpointer.hooks", "observability.spool", "psycopg.pool", "redis"])
def test_what_storing_a_line_logs_is_not_stored_again(target: Observability, name: str) -> None:
    handler = ThreadLogHandler(observability=target)
    handler.handle(logging.LogRecord(name, logging.ERROR, "f", 1, "cannot store a line", None, None))
    record = logging.LogRecord(name, logging.ERROR, "f", 1, "cannot store a line", None, None)
    record.thread_id = "t"
    handler.handle(record)
    assert lines(target) == []


def test_hostile_text_and_ids_are_kept_as_text(
    logger: logging.Logger, target: Observability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", False)  # what pytest captures has to be UTF-8
    hostile = "t\x00\r\n\ud800'; DROP TABLE thread_logs; --"
    logger.info("a\x00b\ud800 password=hunter2 %s", "{}%", extra={"thread_id": hostile})
    [(level, message)] = lines(target, hostile)
    assert level == "info"
    assert "hunter2" not in message
    assert message.endswith("{}%")
    assert lines(target, "t") == []


def test_a_record_that_cannot_be_formatted_does_not_end_the_node(
    logger: logging.Logger, target: Observability, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", False)  # the handler of the tests' own raises

    def node(state: State) -> State:
        logger.info("%d", "no number")
        return {"xs": [1]}

    assert graph(node).invoke({"xs": []}, config()) == {"xs": [1]}
    assert "Logging error" in capsys.readouterr().err
    assert lines(target) == []
