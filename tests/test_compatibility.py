"""Ours and the stock saver on the same tables and threads, by turns and behind each other's back."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Iterator


class State(TypedDict):
    xs: Annotated[list[int], operator.add]
    name: str


def config(thread: str = "t", ns: str = "", checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ns}
    if checkpoint_id:
        found["checkpoint_id"] = checkpoint_id
    return {"configurable": found}


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
    ) as found:
        found.setup()
        yield found


@pytest.fixture
def stock(saver: BufferedPostgresSaver, postgres_uri: str) -> Iterator[PostgresSaver]:
    with PostgresSaver.from_conn_string(postgres_uri) as found:
        yield found


def graph(saver: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("one", lambda state: {"xs": [len(state["xs"])], "name": f"n{len(state['xs'])}"})
    builder.add_node("two", lambda state: {"xs": [-1]})
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    builder.add_edge("two", END)
    return builder.compile(checkpointer=saver)


def checkpoint(**values: Any) -> Any:
    return {
        "v": 4,
        "id": str(uuid6()),
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": values,
        "channel_versions": dict.fromkeys(values, str(uuid6())),
        "versions_seen": {},
        "updated_channels": None,
    }


def put(saver: Any, where: Any, **values: Any) -> Any:
    found = checkpoint(**values)
    return saver.put(where, found, {"source": "loop", "step": 0, "parents": {}}, found["channel_versions"])


def test_a_thread_goes_from_stock_to_ours_and_back_as_if_it_had_always_been_stock(
    saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    for turn in range(6):
        which = stock if turn % 2 == 0 else saver
        graph(which).invoke({"xs": [100 + turn]}, config("mixed"))
        graph(stock).invoke({"xs": [100 + turn]}, config("always stock"))
        if which is saver:
            assert saver.flush("mixed")
    mixed, plain = (graph(stock).get_state(config(thread)) for thread in ("mixed", "always stock"))
    assert mixed.values == plain.values
    assert graph(saver).get_state(config("mixed")).values == plain.values
    histories = [[s.values for s in graph(stock).get_state_history(config(t))] for t in ("mixed", "always stock")]
    assert histories[0] == histories[1]


async def test_the_asynchronous_side_continues_a_stock_thread(
    saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    graph(stock).invoke({"xs": [1]}, config())
    await graph(saver).ainvoke({"xs": [2]}, config())
    assert await saver.aflush()
    assert graph(stock).get_state(config()).values["xs"] == [1, 1, -1, 2, 4, -1]
    await saver.aclose()


@pytest.mark.parametrize("flushed", [False, True])
def test_a_newer_checkpoint_of_a_stock_writer_is_seen_at_once(
    saver: BufferedPostgresSaver, stock: PostgresSaver, flushed: bool
) -> None:
    first = put(saver, config(), a=[1])
    if flushed:
        assert saver.flush()
    assert saver.get_tuple(config()).checkpoint["channel_values"] == {"a": [1]}
    put(stock, first, a=[2])
    assert saver.get_tuple(config()).checkpoint["channel_values"] == {"a": [2]}


@pytest.mark.parametrize("flushed", [False, True])
def test_a_pending_write_of_a_stock_writer_is_seen_at_once(
    saver: BufferedPostgresSaver, stock: PostgresSaver, flushed: bool
) -> None:
    saved = put(saver, config(), a=[1])
    saver.put_writes(saved, [("a", 1)], "ours")
    if flushed:
        assert saver.flush()
    assert len(saver.get_tuple(config()).pending_writes) == 1
    stock.put_writes(saved, [("a", 2)], "theirs")
    assert saver.get_tuple(config()).pending_writes == [("ours", "a", 1), ("theirs", "a", 2)]


def test_a_deletion_by_a_stock_saver_is_seen_at_once(saver: BufferedPostgresSaver, stock: PostgresSaver) -> None:
    put(saver, config(), a=[1])
    assert saver.flush()
    assert saver.get_tuple(config()) is not None
    stock.delete_thread("t")
    assert saver.get_tuple(config()) is None


@pytest.mark.parametrize("flushed", [False, True])
def test_a_put_of_the_same_id_keeps_parent_and_pending_writes(
    saver: BufferedPostgresSaver, stock: PostgresSaver, flushed: bool
) -> None:
    parent = put(saver, config(), a=[0])
    found = checkpoint(a=[1])
    saved = saver.put(parent, found, {"source": "loop", "step": 1, "parents": {}}, found["channel_versions"])
    saver.put_writes(saved, [("a", 7)], "task")
    if flushed:
        assert saver.flush()
    again = {**found, "updated_channels": ["a"]}
    saver.put(config(), again, {"source": "update", "step": 9, "parents": {}}, {})
    for _ in range(2):
        now = saver.get_tuple(config())
        assert now.parent_config == parent
        assert now.pending_writes == [("task", "a", 7)]
        assert now.metadata["step"] == 9
        assert now.checkpoint["updated_channels"] == ["a"]
        assert saver.flush()
    assert stock.get_tuple(config()) == saver.get_tuple(config())


@pytest.mark.parametrize("flushed", [False, True])
def test_reading_an_old_checkpoint_does_not_change_what_latest_is(saver: BufferedPostgresSaver, flushed: bool) -> None:
    old = put(saver, config(), a=[1])
    put(saver, old, a=[2])
    if flushed:
        assert saver.flush()
    assert saver.get_tuple(old).checkpoint["channel_values"] == {"a": [1]}
    assert saver.get_tuple(config()).checkpoint["channel_values"] == {"a": [2]}


NASTY = [
    ("u:1", "n"),
    ("u", "1:n"),
    ("u", "1"),
    ("u:1:n", ""),
    ("}{", ""),
    ("{a}", "b"),
    ("{", "a}b"),
    ("*", "*"),
    ("a\\b", "c\\d"),
    ("a|b", "c|d"),
    ("ünï ☃ 𝄞", "ñs"),
    (" ", " "),
    ("x" * 500, "y" * 500),
    ("", ""),
    ("%s", "%b"),
    ("a\x01b", "\x01"),
    ("'; DROP TABLE checkpoints; --", '"'),
]


@pytest.mark.parametrize("flushed", [False, True])
def test_nasty_ids_never_meet(saver: BufferedPostgresSaver, stock: PostgresSaver, flushed: bool) -> None:
    for number, (thread, ns) in enumerate(NASTY):
        saved = put(saver, config(thread, ns), mine=[number])
        saver.put_writes(saved, [("mine", number)], f"task:{thread[:20]}")
    if flushed:
        assert saver.flush()
    for number, (thread, ns) in enumerate(NASTY):
        found = saver.get_tuple(config(thread, ns))
        assert found.checkpoint["channel_values"] == {"mine": [number]}
        assert found.pending_writes == [(f"task:{thread[:20]}", "mine", number)]
        if flushed and "\\" not in thread + ns:  # the stock saver cannot read a task's id with a backslash
            assert stock.get_tuple(config(thread, ns)) == found
    saver.delete_thread("u")
    assert saver.get_tuple(config("u", "1:n")) is None
    assert saver.get_tuple(config("u", "1")) is None
    assert saver.get_tuple(config("u:1", "n")) is not None
    assert saver.get_tuple(config("u:1:n", "")) is not None


def test_another_prefix_sees_nothing_that_is_not_flushed(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str
) -> None:
    put(saver, config(), a=[1])
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=saver.options.prefix + "2", hooks=(), triggers=frozenset()
    ) as other:
        other.setup()
        assert other.get_tuple(config()) is None
        assert other.flush().checkpoints == 0


def _extend(current: list[int], updates: list[list[int]]) -> list[int]:
    return [*current, *(x for update in updates for x in update)]


class DeltaState(TypedDict):
    xs: Annotated[list[int], DeltaChannel(_extend, snapshot_frequency=4)]


def test_prune_keeps_what_a_delta_channel_is_rebuilt_from(saver: BufferedPostgresSaver, stock: PostgresSaver) -> None:
    def build(which: Any) -> Any:
        builder = StateGraph(DeltaState)
        builder.add_node("one", lambda state: {"xs": [len(state["xs"])]})
        builder.add_edge(START, "one")
        builder.add_edge("one", END)
        return builder.compile(checkpointer=which)

    for turn in range(7):
        build(saver).invoke({"xs": [100 + turn]}, config())
        before = build(saver).get_state(config()).values
        saver.prune(["t"])
        assert build(saver).get_state(config()).values == before
        assert build(stock).get_state(config()).values == before
    assert len(before["xs"]) == 14
    assert len(list(saver.list(config()))) < 3 * 7 - 3, "checkpoints before the last snapshot are gone"


def test_a_thread_id_can_be_used_again_after_its_deletion(saver: BufferedPostgresSaver, stock: PostgresSaver) -> None:
    put(saver, config(), a=[1])
    saver.delete_thread("t")
    assert saver.get_tuple(config()) is None
    put(saver, config(), a=[2])
    assert saver.flush()
    assert stock.get_tuple(config()).checkpoint["channel_values"] == {"a": [2]}
    assert len(list(saver.list(config()))) == 1


def test_a_deletion_wins_over_a_flush_that_has_read_before_it(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str
) -> None:
    """The tombstone is read under the partition's lock, so buffered records of a deleted life never come back."""
    put(saver, config(), a=[1])
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=saver.options.prefix, hooks=(), triggers=frozenset()
    ) as other:
        pipeline = other._core.flusher._session.pipeline
        # The deleting process dies after its commit, before Redis has forgotten the thread.
        other._core.flusher._session.pipeline = lambda calls: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            other.delete_thread("t")
        other._core.flusher._session.pipeline = pipeline
    assert saver.flush()
    assert saver.get_tuple(config()) is None
    assert list(saver.list(config())) == []
