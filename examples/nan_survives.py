"""A NaN in the state: the stock saver fails the run, the buffered one stores None and says so, or keeps the NaN.

Run it: python examples/nan_survives.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypedDict

import psycopg
from _agent import addresses, thread
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

    from checkpointer import CheckpointEvent


class Report(TypedDict, total=False):
    """The state: a score that is not a number, alone and inside a dict."""

    question: str
    score: float
    details: dict[str, Any]


def build_graph(saver: BaseCheckpointSaver[Any]) -> CompiledStateGraph[Report, None, Report, Report]:
    """Build a graph whose one node divides nothing by nothing."""

    def rate(state: Report) -> Report:
        return {"score": math.nan, "details": {"answers": 0, "mean": math.inf}}

    builder = StateGraph(Report)
    builder.add_node("rate", rate)
    builder.add_edge(START, "rate")
    builder.add_edge("rate", END)
    return builder.compile(checkpointer=saver)


def main() -> None:
    """Run the example."""
    with addresses() as at:
        print("1. PostgresSaver")
        with PostgresSaver.from_conn_string(at.postgres_uri) as stock:
            stock.setup()
            try:
                build_graph(stock).invoke({"question": "How good?"}, thread("nan-stock"))
            except psycopg.Error as exc:
                print(f"   the run raises {type(exc).__name__}: {str(exc).splitlines()[0]}")

        print("2. BufferedPostgresSaver")
        config = thread("nan")
        with BufferedPostgresSaver.from_conn_string(at.postgres_uri, redis_url=at.redis_url) as saver:
            saver.setup()
            reports: list[CheckpointEvent] = []
            saver.hooks.add(reports.append)
            graph = build_graph(saver)
            graph.invoke({"question": "How good?"}, config)
            saver.hooks.flush()
            values = graph.get_state(config).values
            print(f"   the run completes; stored: score={values['score']} details={values['details']}")
            paths = [change["path"] for event in reports for change in event.context.get("changes", ())]
            print(f"   reported: {', '.join(dict.fromkeys(paths))}")

        print('3. BufferedPostgresSaver(..., non_finite="keep")')
        config = thread("nan-keep")
        with BufferedPostgresSaver.from_conn_string(
            at.postgres_uri, redis_url=at.redis_url, non_finite="keep"
        ) as saver:
            graph = build_graph(saver)
            graph.invoke({"question": "How good?"}, config)
            values = graph.get_state(config).values
            print(f"   the run completes; stored: score={values['score']} details={values['details']}")
        with PostgresSaver.from_conn_string(at.postgres_uri) as stock:
            values = build_graph(stock).get_state(config).values
            print(f"   PostgresSaver reads:       score={values['score']} details={values['details']}")


if __name__ == "__main__":
    main()
