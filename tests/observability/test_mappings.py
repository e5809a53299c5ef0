"""Events in the formats of others, and in the stream of a run."""

from __future__ import annotations

import json
import operator
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict
from uuid import UUID

import pytest
from langgraph.graph import END, START, StateGraph

from checkpointer import BufferedPostgresSaver
from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.hooks import STANDARD_HOOKS
from checkpointer.run_streams import RunStreams
from observability import ag_ui_event, cloud_event, stream_chunk
from observability.projections import operator_view, user_view

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "postgresql://bob:hunter2@db.internal/app"


def event(**facts: Any) -> CheckpointEvent:
    values: dict[str, Any] = {
        "name": "flush.failed",
        "severity": "critical",
        "message": f"It failed at {SECRET}.",
        "thread_id": "t\x00\ud800",
        "occurred_at": datetime(2026, 3, 4, 5, 6, 7, 891_000, timezone(timedelta(hours=2))),
        "error": describe_error(RuntimeError(SECRET)),
        "context": {"numbers": {float("nan")}, "raw": b"\xff"},
        "user_notice": True,
    }
    return CheckpointEvent(**(values | facts))


def test_a_cloud_event_has_what_the_format_requires() -> None:
    told = event()
    found = cloud_event(told, source="/shop/checkpoints")
    assert {name: found[name] for name in ("specversion", "id", "source", "type", "time", "datacontenttype")} == {
        "specversion": "1.0",
        "id": str(told.event_id),
        "source": "/shop/checkpoints",
        "type": "langgraph.checkpoint.flush.failed",
        "time": "2026-03-04T03:06:07.891000+00:00",
        "datacontenttype": "application/json",
    }
    assert found["data"] == operator_view(told)
    assert all(isinstance(found[name], str) and found[name] for name in found if name != "data")
    assert "\x00" not in found["subject"]
    json.dumps(found, allow_nan=False).encode()


def test_a_cloud_event_without_a_thread_has_no_subject() -> None:
    assert "subject" not in cloud_event(event(thread_id=None), source="/")


def test_what_goes_to_browsers_holds_the_users_view_alone() -> None:
    told = event()
    assert ag_ui_event(told) == {
        "type": "CUSTOM",
        "name": "checkpoint_health",
        "value": user_view(told),
        "timestamp": 1_772_593_567_891,
    }
    assert stream_chunk(told) == {"name": "checkpoint_health", "payload": user_view(told)}
    for found in (ag_ui_event(told), stream_chunk(told), cloud_event(told, source="/", audience="user")):
        assert "hunter2" not in json.dumps(found)
        assert "RuntimeError" not in json.dumps(found)


# -- the stream of a run ---------------------------------------------------------------------------------------------


class State(TypedDict):
    xs: Annotated[list[int], operator.add]


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=("run_stream",)
    ) as found:
        found.setup()
        yield found


def graph(saver: BufferedPostgresSaver, *told: CheckpointEvent) -> Any:
    """Make a graph in whose run something happens that events tell of."""

    def node(state: State) -> State:
        for one in told:
            saver.hooks.emit(one)
        assert saver.hooks.flush(20)
        return {"xs": [1]}

    builder = StateGraph(State)
    builder.add_node("node", node)
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    return builder.compile(checkpointer=saver)


def config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}}


def health(chunks: list[Any]) -> list[str]:
    assert all(chunk["name"] == "checkpoint_health" for chunk in chunks)
    return [chunk["payload"]["event_id"] for chunk in chunks]


def test_a_run_streams_what_its_user_is_to_know_and_nothing_of_others(saver: BufferedPostgresSaver) -> None:
    told = event(thread_id="t")
    others = [event(thread_id="u"), event(thread_id=None), event(thread_id="t", user_notice=False)]
    run = graph(saver, *others, told)
    chunks = list(run.stream({"xs": [0]}, config(), stream_mode="custom"))
    assert chunks == [stream_chunk(told)]
    assert list(run.stream({"xs": [0]}, config(), stream_mode="values")) == [{"xs": [0, 1, 0]}, {"xs": [0, 1, 0, 1]}]


async def test_an_asynchronous_run_streams_it_too(saver: BufferedPostgresSaver) -> None:
    told = event(thread_id="t")
    run = graph(saver, told)
    assert [chunk async for chunk in run.astream({"xs": [0]}, config(), stream_mode="custom")] == [stream_chunk(told)]


@pytest.mark.parametrize("subgraphs", [False, True])
def test_what_happens_in_a_subgraph_is_streamed_at_the_root(saver: BufferedPostgresSaver, subgraphs: bool) -> None:
    told = event(thread_id="t")
    builder = StateGraph(State)
    builder.add_node("inner", graph(saver, told))
    builder.add_edge(START, "inner")
    builder.add_edge("inner", END)
    outer = builder.compile(checkpointer=saver)
    chunks = list(outer.stream({"xs": [0]}, config(), stream_mode="custom", subgraphs=subgraphs))
    assert [chunk[1] if subgraphs else chunk for chunk in chunks] == [stream_chunk(told)]


def test_runs_at_the_same_time_each_get_their_own(saver: BufferedPostgresSaver) -> None:
    told = {thread: event(thread_id=thread) for thread in ("t", "u")}
    streams = {
        thread: graph(saver, told[thread]).stream({"xs": [0]}, config(thread), stream_mode=["custom", "values"])
        for thread in told
    }
    for stream in streams.values():
        next(stream)  # both are going on now
    for thread, stream in streams.items():
        assert [chunk for mode, chunk in stream if mode == "custom"] == [stream_chunk(told[thread])]


def test_after_the_run_nobody_is_written_to(saver: BufferedPostgresSaver) -> None:
    list(graph(saver).stream({"xs": [0]}, config(), stream_mode="custom"))
    saver.hooks.emit(event(thread_id="t"))
    assert saver.hooks.flush(20)
    assert not saver._core.run_streams.write("t", "late")
    assert saver.hooks.stats()["run_stream"].failed == 0


def test_it_is_not_among_the_standard_hooks(postgres_uri: str, redis_url: str, prefix: str) -> None:
    assert "run_stream" not in STANDARD_HOOKS
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, hooks=()) as saver:
        saver.setup()
        chunks = list(graph(saver, event(thread_id="t")).stream({"xs": [0]}, config(), stream_mode="custom"))
        assert chunks == []
        assert not saver._core.run_streams._writers


# -- LangGraph's private place, as it might become -------------------------------------------------------------------


@pytest.mark.parametrize("runtime", [None, object(), SimpleNamespace(stream_writer="no function")])
def test_a_run_without_a_writer_has_no_stream_and_goes_on(saver: BufferedPostgresSaver, runtime: Any) -> None:
    found: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "__pregel_runtime": runtime}}
    assert saver.get_tuple(found) is None
    assert not saver._core.run_streams.write("t", "chunk")


def test_a_writer_that_raises_is_the_hooks_failure_alone(saver: BufferedPostgresSaver) -> None:
    def refuse(chunk: Any) -> None:
        raise TypeError("another signature")

    runtime = SimpleNamespace(stream_writer=refuse)
    found: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "", "__pregel_runtime": runtime}}
    assert saver.get_tuple(found) is None
    saver.hooks.emit(event(thread_id="t"))
    assert saver.hooks.flush(20)
    assert saver.hooks.stats()["run_stream"].failed == 1


def test_writers_are_bounded_and_the_latest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpointer.run_streams._KNOWN_RUNS", 2)
    streams, written = RunStreams(), []
    streams.watch()
    for thread in ("a", "b", "a", "c"):
        runtime = SimpleNamespace(stream_writer=written.append)
        streams.note({"configurable": {"thread_id": thread, "__pregel_runtime": runtime}})
    assert [streams.write(thread, thread) for thread in "abc"] == [True, False, True]
    assert written == ["a", "c"]
    streams.run_ended("a", frozenset({"c"}))
    assert [streams.write(thread, thread) for thread in "ac"] == [False, True]
    streams.close()
    streams.close()
    assert not streams.write("c", "c")


def test_an_event_keeps_its_id_in_every_format() -> None:
    told = event(event_id=UUID(int=7), occurred_at=datetime.now(UTC))
    ids = {cloud_event(told, source="/")["id"], ag_ui_event(told)["value"]["event_id"]}
    assert ids == {str(UUID(int=7))} == set(health([stream_chunk(told)]))
