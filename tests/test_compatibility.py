"""Ours and the stock saver on the same tables and threads, by turns and behind each other's back."""

from __future__ import annotations

import asyncio
import itertools
import operator
import threading
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import psycopg
import pytest
from graphs import (
    SCENARIOS,
    Call,
    Run,
    assert_equal,
    database_with_tables,
    exactly,
    make_calls,
    plain,
    sorted_interrupts,
)
from helpers import wait_until
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Addresses
    from langgraph.checkpoint.base import CheckpointTuple


class State(TypedDict):
    xs: Annotated[list[int], operator.add]
    name: str


def config(thread: str = "t", ns: str = "", checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": thread, "checkpoint_ns": ns}
    if checkpoint_id:
        found["checkpoint_id"] = checkpoint_id
    return {"configurable": found}


@pytest.fixture(scope="module")
def database(servers: Addresses) -> Iterator[str]:
    with database_with_tables(servers.postgres_uri, servers.redis_url) as uri:
        yield uri


@pytest.fixture
def postgres_uri(database: str) -> str:
    """The one database of this file, emptied."""
    with psycopg.connect(database) as conn:
        conn.execute("TRUNCATE checkpoints, checkpoint_blobs, checkpoint_writes")
    return database


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
    assert not saver._core.redis.client().exists(saver._core.commands.layout.thread("t").clean), "nothing to be read"
    assert saver.get_tuple(config()) is None
    assert list(saver.list(config())) == []


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_a_deletion_wins_over_a_flush_that_waits_for_its_lock(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, isolation: str
) -> None:
    """What the flush sees is from after the deletion, whatever isolation is the database's default."""
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute(f"ALTER DATABASE {conn.info.dbname} SET default_transaction_isolation = '{isolation}'")
        saver._core.flusher.submit(lambda session: session.close()).result()  # the setting is for new connections
        put(saver, config(), a=[1])
        with BufferedPostgresSaver.from_conn_string(
            postgres_uri, redis_url=redis_url, prefix=saver.options.prefix, hooks=(), triggers=frozenset()
        ) as other:
            session = other._core.flusher._session
            bury, pipeline = session.bury, session.pipeline
            flushing = threading.Thread(target=saver.flush)
            waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

            def with_the_lock(*args: Any) -> Any:
                found = bury(*args)
                flushing.start()
                wait_until(lambda: conn.execute(waits).fetchone() is not None)
                return found

            def too_late(calls: Any) -> Any:
                flushing.join()  # all that is to keep the flush from saving the thread is the tombstone
                return pipeline(calls)

            session.bury, session.pipeline = with_the_lock, too_late
            other.delete_thread("t")
        assert conn.execute("SELECT FROM checkpoints").fetchone() is None
    assert saver.get_tuple(config()) is None


# -- whole graphs by turns ---------------------------------------------------------------------------------------


class Api:
    """Calls ours through one of its two APIs."""

    def __init__(self, kind: str, runner: asyncio.Runner) -> None:
        self._kind = kind
        self._runner = runner

    def __call__(self, target: Any, method: str, *args: Any, **named: Any) -> Any:
        if self._kind == "sync":
            found = getattr(target, method)(*args, **named)
            return list(found) if method in ("list", "get_state_history") else found

        async def call() -> Any:
            found = getattr(target, f"a{method}")(*args, **named)
            return [item async for item in found] if method in ("list", "get_state_history") else await found

        return self._runner.run(call())


@pytest.fixture(params=["sync", "async"])
def api(request: pytest.FixtureRequest, saver: BufferedPostgresSaver) -> Iterator[Api]:
    with asyncio.Runner() as runner:
        yield Api(request.param, runner)
        if request.param == "async":
            runner.run(saver.aclose())


# The others count their failures in the graph, of which there are two here.
BY_TURNS = sorted(SCENARIOS.keys() - {"node_error", "retries"})


@pytest.mark.parametrize("first", ["stock first", "ours first"])
@pytest.mark.parametrize("name", BY_TURNS)
def test_a_graph_that_runs_by_turns_under_both_does_the_same_as_under_stock_alone(
    name: str, first: str, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    scenario = SCENARIOS[name]
    turns = itertools.cycle([stock, saver] if first == "stock first" else [saver, stock])
    graphs = {which: scenario.build(which) for which in (stock, saver)}
    reader: list[Any] = [stock]
    used = set()

    def by_turns(call: Call) -> Any:
        # Who reads is the one that did not write last, so that each sees what the other has done.
        which = next(turns) if call.method in ("invoke", "update_state") else reader[0]
        reader[0] = stock if which is saver else saver
        used.add(which)
        if which is stock:
            return by_stock(call)
        found = api(graphs[saver], call.method, *call.args, **call.named)
        assert api(saver, "flush", "thread by turns")
        return found

    def by_stock(call: Call) -> Any:
        found = getattr(graphs[stock], call.method)(*call.args, **call.named)
        return list(found) if call.method == "get_state_history" else found

    outcomes: dict[str, list[Any]] = {"thread by turns": [], "thread of stock": []}
    for thread, make in (("thread by turns", by_turns), ("thread of stock", by_stock)):
        calls = scenario.script(Run(graphs[stock], thread, "async"))
        result = None
        while True:
            try:
                call = calls.send(result)
            except StopIteration:
                break
            result = make(call)
            outcomes[thread].append(sorted_interrupts(result))
    assert used == {stock, saver}
    mixed, always_stock = (plain(found, thread) for thread, found in outcomes.items())
    assert_equal(mixed, always_stock)
    rows = {thread: list(stock.list(thread_only(thread))) for thread in outcomes}
    mixed, always_stock = (plain(by_age(found), thread) for thread, found in rows.items())
    assert_equal(mixed, always_stock)
    assert_equal(exactly(api(saver, "list", thread_only("thread by turns"))), exactly(rows["thread by turns"]))
    for row in rows["thread by turns"]:
        assert_equal(exactly(api(saver, "get_tuple", row.config)), exactly(row))


def thread_only(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def by_age(rows: list[CheckpointTuple]) -> list[CheckpointTuple]:
    """Order rows by namespace, those by their first checkpoint."""
    oldest = {row.config["configurable"]["checkpoint_ns"]: row.config["configurable"]["checkpoint_id"] for row in rows}
    return sorted(rows, key=lambda row: oldest[row.config["configurable"]["checkpoint_ns"]])


# -- behind our back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_by", ["ours", "stock"])
@pytest.mark.parametrize("channel", ["__resume__", "__interrupt__", "__error__"])
def test_a_control_write_that_a_stock_writer_replaces_is_seen_at_once(
    channel: str, first_by: str, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    saved = put(saver, config(), a=[1])
    if first_by == "ours":
        saver.put_writes(saved, [(channel, ["first"])], "task")
    assert saver.flush()
    if first_by == "stock":
        stock.put_writes(saved, [(channel, ["first"])], "task")
    assert saver.get_tuple(config()).pending_writes == [("task", channel, ["first"])]
    stock.put_writes(saved, [(channel, ["second"])], "task")
    assert stock.get_tuple(config()).pending_writes == [("task", channel, ["second"])]
    assert saver.get_tuple(saved).pending_writes == [("task", channel, ["second"])]
    assert saver.get_tuple(config()).pending_writes == [("task", channel, ["second"])]


def test_the_next_question_to_a_stock_process_is_seen_at_once(
    saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    def ask(state: State) -> Any:
        return {"name": "".join(interrupt(question) for question in ("first?", "second?", "third?"))}

    def build(which: Any) -> Any:
        builder = StateGraph(State)
        builder.add_node("ask", ask)
        builder.add_edge(START, "ask")
        return builder.compile(checkpointer=which)

    def asked(which: Any) -> list[Any]:
        return [i.value for i in build(which).get_state(config()).interrupts]

    build(saver).invoke({"xs": [1]}, config())
    build(saver).invoke(Command(resume="a"), config())
    assert saver.flush()
    assert asked(saver) == asked(stock) == ["second?"]
    build(stock).invoke(Command(resume="b"), config())
    assert asked(stock) == ["third?"]
    assert asked(saver) == ["third?"]
    assert build(saver).invoke(Command(resume="c"), config())["name"] == "abc"


def test_a_checkpoint_that_a_stock_writer_puts_again_is_seen_by_its_id(
    saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    parent = put(saver, config(), a=[0])
    found = checkpoint(a=[1])
    saved = saver.put(parent, found, {"source": "loop", "step": 1, "parents": {}}, found["channel_versions"])
    assert saver.flush()
    assert saver.get_tuple(config()).metadata["step"] == 1
    stock.put(parent, found, {"source": "update", "step": 2, "parents": {}}, {})
    assert saver.get_tuple(saved) == stock.get_tuple(saved)


@pytest.mark.parametrize("strategy", ["keep_latest", "delete"])
def test_a_prune_by_a_stock_saver_is_seen_at_once(
    strategy: str, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    ours = graph(saver)
    for turn in range(3):
        api(ours, "invoke", {"xs": [turn]}, config())
    old = [found.config for found in api(saver, "list", config())][1:]
    assert api(saver, "get_tuple", config()).parent_config is not None
    stock.prune(["t"], strategy=strategy)
    assert api(saver, "get_tuple", config()) == stock.get_tuple(config())
    for gone in old:
        assert api(saver, "get_tuple", gone) is None
    assert api(saver, "list", config()) == list(stock.list(config()))
    # And the thread goes on from there, under both.
    api(ours, "invoke", {"xs": [9]}, config())
    assert api(saver, "flush")
    assert graph(stock).get_state(config()).values == api(ours, "get_state", config()).values


def test_a_thread_that_a_stock_saver_has_deleted_can_be_used_again(
    api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    api(graph(saver), "invoke", {"xs": [1]}, config())
    assert api(saver, "flush")
    stock.delete_thread("t")
    api(graph(saver), "invoke", {"xs": [2]}, config())
    assert api(saver, "get_tuple", config()).checkpoint["channel_values"]["xs"] == [2, 1, -1]
    assert api(saver, "flush")
    assert api(saver, "list", config()) == list(stock.list(config()))
    assert graph(stock).get_state(config()).values["xs"] == [2, 1, -1]


# -- the order of things -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed_between", [False, True])
def test_pending_writes_that_arrive_before_their_checkpoint_are_kept(
    flushed_between: bool, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    parent = put(stock, config(), a=[0])
    found = checkpoint(a=[1])
    saved = config("t", "", found["id"])
    api(saver, "put_writes", saved, [("a", "early"), ("b", 2)], "task")
    api(saver, "put_writes", saved, [("a", "too late"), ("b", 3), ("c", 4)], "task")
    api(saver, "put_writes", saved, [("__interrupt__", [1])], "task")
    api(saver, "put_writes", saved, [("__interrupt__", [2])], "task")
    if flushed_between:
        assert api(saver, "flush")
    assert api(saver, "get_tuple", config()).config == parent
    assert api(saver, "get_tuple", saved) is None
    api(saver, "put", parent, found, {"source": "loop", "step": 1, "parents": {}}, found["channel_versions"])
    writes = [("task", "__interrupt__", [2]), ("task", "a", "early"), ("task", "b", 2), ("task", "c", 4)]
    for _ in ("buffered", "flushed"):
        assert api(saver, "get_tuple", config()).pending_writes == writes
        assert api(saver, "get_tuple", saved).pending_writes == writes
        assert api(saver, "flush")
    assert stock.get_tuple(config()) == api(saver, "get_tuple", config())


@pytest.mark.parametrize("first_by", ["ours", "ours, flushed", "stock"])
def test_a_checkpoint_that_is_put_again_is_what_stock_would_have_made_of_it(
    first_by: str, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    parents = {thread: put(stock, config(thread), a=[0]) for thread in ("mixed", "always stock")}
    first, again = checkpoint(a=[1], kept="x"), checkpoint(a=[1], kept="y", new=[2])
    again |= {"id": first["id"], "channel_versions": {**first["channel_versions"], "new": str(uuid6())}}

    def by_ours(method: str, *args: Any) -> Any:
        return api(saver, method, *args)

    def by_stock(method: str, *args: Any) -> Any:
        return getattr(stock, method)(*args)

    def put_first(thread: str, do: Any) -> None:
        saved = do("put", parents[thread], first, {"step": 1, "old": True}, first["channel_versions"])
        do("put_writes", saved, [("a", 7), ("kept", 8)], "task", "path")

    def put_again(thread: str, do: Any) -> None:
        do("put", config(thread), again, {"step": 2}, again["channel_versions"])

    put_first("always stock", by_stock)
    put_again("always stock", by_stock)
    put_first("mixed", by_stock if first_by == "stock" else by_ours)
    if first_by == "ours, flushed":
        assert api(saver, "flush")
    put_again("mixed", by_ours)
    expected = stock.get_tuple(config("always stock"))
    for _ in ("buffered", "flushed"):
        found = api(saver, "get_tuple", config("mixed"))
        assert found.parent_config == parents["mixed"]
        assert [value for _, _, value in found.pending_writes] == [7, 8]
        assert found.metadata == {"step": 2}
        assert_equal(exactly(found.checkpoint), exactly(expected.checkpoint))
        assert found.pending_writes == expected.pending_writes
        assert api(saver, "flush")
    assert stock.get_tuple(config("mixed")) == found


@pytest.mark.parametrize("flushed", [False, True])
def test_putting_an_old_checkpoint_again_does_not_make_it_the_latest(
    flushed: bool, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    old = checkpoint(a=[1])
    metadata = {"source": "loop", "step": 0, "parents": {}}
    saved = api(saver, "put", config(), old, metadata, old["channel_versions"])
    latest = put(saver, saved, a=[2])
    if flushed:
        assert api(saver, "flush")
    api(saver, "put", config(), old, {**metadata, "step": 7}, {})
    for _ in ("buffered", "flushed"):
        assert api(saver, "get_tuple", saved).metadata["step"] == 7
        assert api(saver, "get_tuple", config()).config == latest
        assert api(saver, "flush")
    assert stock.get_tuple(config()) == api(saver, "get_tuple", config())


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("flushed", ["nothing", "the parent", "all"])
def test_pending_sends_of_old_checkpoints_are_found_as_stock_finds_them(
    flushed: str, version: int, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    parent, child = checkpoint(a=[1]) | {"v": version}, checkpoint(a=[2]) | {"v": version}
    sends = {"one": [Send("node", {"n": 1}), Send("node", {"n": 2})], "two": [Send("other", [3])]}

    def put_parent(thread: str, do: Any) -> Any:
        saved = do("put", config(thread), parent, {"step": 1}, parent["channel_versions"])
        for task, values in reversed(sends.items()):
            do("put_writes", saved, [*(("__pregel_tasks", value) for value in values), ("a", 0)], task, f"path {task}")
        return saved

    def put_child(saved: Any, do: Any) -> Any:
        return do("put", saved, child, {"step": 2}, child["channel_versions"])

    def by_stock(method: str, *args: Any) -> Any:
        return getattr(stock, method)(*args)

    def by_ours(method: str, *args: Any) -> Any:
        return api(saver, method, *args)

    put_child(put_parent("always stock", by_stock), by_stock)
    saved = put_parent("t", by_ours)
    if flushed == "the parent":
        assert api(saver, "flush")
    saved = put_child(saved, by_ours)
    if flushed == "all":
        assert api(saver, "flush")
    for where in (config(), saved):
        found = api(saver, "get_tuple", where)
        assert found.checkpoint["channel_values"]["__pregel_tasks"] == [*sends["one"], *sends["two"]]
        assert_equal(exactly(found.checkpoint), exactly(stock.get_tuple(config("always stock")).checkpoint))
    listed = api(saver, "list", config())
    assert listed == list(stock.list(config()))
    assert listed[0] == found


# -- ids ---------------------------------------------------------------------------------------------------------

CRAFTED = (
    "",
    "u",
    "u:1",
    "u:1:n",
    "1",
    "1:n",
    "n",
    "}{",
    "{",
    "}",
    "*",
    "?",
    "[a]",
    "\\",
    "\\\\",
    "a\\n",
    "|",
    "n|1:2",
)
STRANGE = (" ", "  ", "a ", " a", "a\tb\r\n", "\x01", "é", "e\u0301", "🦜", "%s", "%(x)s", "$1", '"', "'", "None")
LONG = ("x" * 500, "x" * 499 + "y", "🦜" * 500)


def test_each_pair_of_crafted_thread_and_namespace_keeps_what_was_put_there(
    api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    namespaces = ("", "n", "1", "1:n", "n|1:2", "}{", "\\", " ", "é", "e\u0301", "x" * 400)
    places = list(itertools.product((*CRAFTED, *STRANGE, *LONG), namespaces))
    saved = {}
    for mine in map(list, places):
        thread, ns = mine
        found = checkpoint(mine=mine, text=f"{thread}/{ns}")
        where = api(saver, "put", config(thread, ns), found, {"step": 0, "mine": mine}, found["channel_versions"])
        api(saver, "put_writes", where, [("mine", mine)], "task")
        api(saver, "put_writes", where, [("__interrupt__", mine)], "task")
        saved[thread, ns] = where

    def check(get: Any) -> None:
        for mine in map(list, places):
            thread, ns = mine
            for where in (config(thread, ns), saved[thread, ns]):
                found = get(where)
                assert found.config == saved[thread, ns]
                assert found.checkpoint["channel_values"] == {"mine": mine, "text": f"{thread}/{ns}"}
                assert found.metadata == {"step": 0, "mine": mine}
                assert found.pending_writes == [("task", "__interrupt__", mine), ("task", "mine", mine)]

    check(lambda where: api(saver, "get_tuple", where))
    report = api(saver, "flush")
    assert report
    assert report.checkpoints == len(places)
    check(lambda where: api(saver, "get_tuple", where))
    check(stock.get_tuple)


def test_crafted_checkpoint_ids_task_ids_and_channels_keep_what_was_put_there(
    api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    ids = [name for name in (*CRAFTED, *STRANGE, *LONG) if name]
    # Stock casts channels and task ids to bytea, where a backslash begins an escape: those are for ours alone.
    threads = {"all": ids, "without backslashes": [name for name in ids if "\\" not in name]}

    def tasks_of(checkpoint_id: str, channels: list[str]) -> list[str]:
        # A key holds at most 2,600 bytes.
        return sorted(task for task in channels if len((checkpoint_id + task).encode()) < 2_500)

    for thread, channels in threads.items():
        for checkpoint_id in ids:
            found = checkpoint(**{name: [name] for name in channels}) | {"id": checkpoint_id}
            found["channel_versions"] = {name: f"{number} {name[:20]}" for number, name in enumerate(channels)}
            saved = api(saver, "put", config(thread), found, {"step": 0}, found["channel_versions"])
            for task in tasks_of(checkpoint_id, channels):
                api(saver, "put_writes", saved, [(task, [checkpoint_id, task])], task)

    def check(get: Any, thread: str) -> None:
        channels = threads[thread]
        for checkpoint_id in ids:
            found = get(config(thread, "", checkpoint_id))
            assert found.checkpoint["id"] == found.config["configurable"]["checkpoint_id"] == checkpoint_id
            assert found.checkpoint["channel_values"] == {name: [name] for name in channels}
            expected = [(task, task, [checkpoint_id, task]) for task in tasks_of(checkpoint_id, channels)]
            assert found.pending_writes == expected
        assert get(config(thread)).checkpoint["id"] == max(ids)

    for _ in ("buffered", "flushed"):
        for thread in threads:
            check(lambda where: api(saver, "get_tuple", where), thread)
        assert api(saver, "flush")
    check(stock.get_tuple, "without backslashes")


# -- pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flushed", [False, True])
def test_after_a_prune_of_a_delta_thread_old_checkpoints_are_gone_and_the_thread_goes_on(
    flushed: bool, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    def build(which: Any) -> Any:
        builder = StateGraph(DeltaState)
        builder.add_node("one", lambda state: {"xs": [len(state["xs"])]})
        builder.add_edge(START, "one")
        return builder.compile(checkpointer=which)

    for turn in range(7):
        api(build(saver), "invoke", {"xs": [100 + turn]}, config())
        build(stock).invoke({"xs": [100 + turn]}, config("always stock"))
    if flushed:
        assert api(saver, "flush")
    before = api(build(saver), "get_state", config()).values
    ids = [found.config for found in stock.list(config())]
    api(saver, "prune", ["t"])
    assert api(build(saver), "get_state", config()).values == before
    assert build(stock).get_state(config()).values == before
    kept = [found.config for found in stock.list(config())]
    assert kept == [found.config for found in api(saver, "list", config())]
    gone = [where for where in ids if where not in kept]
    assert len(kept) < len(gone), "most are older than the last snapshot"
    for where in gone:
        assert api(saver, "get_tuple", where) is None
        assert stock.get_tuple(where) is None
    api(build(saver), "invoke", {"xs": [999]}, config())
    build(stock).invoke({"xs": [999]}, config("always stock"))
    expected = build(stock).get_state(config("always stock")).values
    assert api(build(saver), "get_state", config()).values == expected
    assert api(saver, "flush")
    assert build(stock).get_state(config()).values == expected


@pytest.mark.parametrize(
    "name", ["tool_agent", "subgraph", "subgraph_with_memory", "interrupts_in_subgraph", "time_travel", "functions"]
)
def test_prune_keeps_the_rows_that_a_stock_prune_keeps(
    name: str, api: Api, saver: BufferedPostgresSaver, stock: PostgresSaver
) -> None:
    scenario = SCENARIOS[name]
    for thread, which in (("thread-ours", saver), ("thread-stock", stock)):
        make_calls(scenario.script(Run(scenario.build(which), thread, "sync")))
    api(saver, "prune", ["thread-ours"])
    stock.prune(["thread-stock"])
    ours, theirs = (list(stock.list(thread_only(thread))) for thread in ("thread-ours", "thread-stock"))
    assert_equal(plain(by_age(ours), "thread-ours"), plain(by_age(theirs), "thread-stock"))
    assert_equal(exactly(api(saver, "list", thread_only("thread-ours"))), exactly(ours))
