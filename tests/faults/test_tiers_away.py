"""What goes on while Redis or Postgres is away, and that nothing of it is silent."""

from __future__ import annotations

import asyncio
import operator
import time
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from helpers import await_until, wait_until
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph

from checkpointer import (
    BufferedPostgresSaver,
    BufferUnavailableError,
    CheckpointLostError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer import CheckpointEvent
    from checkpointer.embedded import Servers


class State(TypedDict):
    xs: Annotated[list[int], operator.add]


def config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}}


def one(state: State) -> State:
    return {"xs": [1]}


def graph(saver: Any, between: Callable[[], Any], *, subgraph: bool) -> Any:
    """Four steps; `between` is called in the second one."""

    def interferes(state: State) -> State:
        between()
        return {"xs": [2]}

    inner = StateGraph(State)
    inner.add_node("i0", one)
    inner.add_node("i1", one)
    inner.add_edge(START, "i0")
    inner.add_edge("i0", "i1")
    builder = StateGraph(State)
    builder.add_node("first", one)
    builder.add_node("second", interferes)
    builder.add_node("third", inner.compile() if subgraph else one)
    builder.add_node("fourth", one)
    for a, b in ((START, "first"), ("first", "second"), ("second", "third"), ("third", "fourth"), ("fourth", END)):
        builder.add_edge(a, b)
    return builder.compile(checkpointer=saver)


@pytest.fixture
def make(own_servers: Servers) -> Iterator[Any]:
    savers = []

    def _make(**options: Any) -> BufferedPostgresSaver:
        options = {"hooks": (), "postgres_timeout": 1.0, "redis_timeout": 1.0, "close_timeout": 2.0, **options}
        saver = BufferedPostgresSaver.from_conn_string(
            own_servers.postgres_uri, redis_url=own_servers.redis_url, **options
        )
        saver.setup()
        saver.events = []
        saver.hooks.add(saver.events.append)
        savers.append(saver)
        return saver

    yield _make
    for saver in savers:
        saver.close()


def named(saver: Any, name: str) -> list[CheckpointEvent]:
    return [event for event in saver.events if event.name == name]


def stock_history(uri: str, thread: str = "t") -> list[Any]:
    with PostgresSaver.from_conn_string(uri) as stock:
        return list(stock.list(config(thread)))


def put_one(saver: Any, thread: str, step: int = 0) -> Any:
    return graph(saver, lambda: None, subgraph=False).update_state(config(thread), {"xs": [step]})


# -- Postgres away ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subgraph", [False, True])
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_a_run_completes_while_postgres_is_killed_and_its_checkpoints_arrive_when_it_is_back(
    make: Any, own_servers: Servers, subgraph: bool, durability: Any
) -> None:
    saver = make()
    run = graph(saver, own_servers.postgres.kill, subgraph=subgraph)
    result = run.invoke({"xs": []}, config(), durability=durability)
    assert result["xs"] == ([1, 2, 1, 2, 1, 1, 1] if subgraph else [1, 2, 1, 1])
    (failed,) = wait_until(lambda: named(saver, "flush.failed"))
    assert (failed.thread_id, failed.severity, failed.error_type) == ("t", "critical", "checkpoint_flush_error")
    assert failed.checkpoint_count > 0
    assert failed.outcome == "retrying"
    assert failed.user_notice
    assert failed.error.stack
    own_servers.postgres.start()
    wait_until(lambda: named(saver, "flush.recovered"))
    wait_until(lambda: not saver._core.ledger.records)
    root = [t for t in stock_history(own_servers.postgres_uri) if t.config["configurable"]["checkpoint_ns"] == ""]
    assert len(root) == 6
    assert len(named(saver, "backend.down")) == len(named(saver, "backend.up")) == 1
    assert len(named(saver, "flush.failed")) == 1, "one notice for each thread and outage"
    assert run.get_state(config()).values == result


def test_a_run_whose_first_put_is_still_on_its_way_enters_a_subgraph_while_postgres_is_away(
    make: Any, own_servers: Servers
) -> None:
    saver = make(redis_timeout=60.0)
    with redis.Redis.from_url(own_servers.redis_url) as client:

        def let_puts_through(state: State) -> State:
            assert not saver._core.ledger.records, "no put has arrived yet"
            client.client_unpause()
            return {"xs": [3]}

        inner = StateGraph(State)
        inner.add_node("i0", let_puts_through)
        inner.add_edge(START, "i0")
        builder = StateGraph(State)
        builder.add_node("kills", lambda state: own_servers.postgres.kill())
        builder.add_node("calls", inner.compile())
        builder.add_edge(START, "kills")
        builder.add_edge("kills", "calls")
        # A script that is not loaded yet would wait too. Of a named checkpoint, Redis is asked first.
        assert saver.get_tuple({"configurable": {"thread_id": "other", "checkpoint_id": "0"}}) is None
        client.client_pause(60_000, all=False)  # reads go on, what writes waits
        result = builder.compile(checkpointer=saver).invoke({"xs": []}, config(), durability="async")
    assert result["xs"] == [3]
    own_servers.postgres.start()
    wait_until(lambda: not saver._core.ledger.records)
    assert stock_history(own_servers.postgres_uri)[0].checkpoint["channel_values"]["xs"] == [3]


def test_an_answer_of_redis_that_a_put_overtakes_does_not_look_like_a_loss(make: Any, own_servers: Servers) -> None:
    saver = make(triggers=frozenset())
    at = put_one(saver, "t")
    own_servers.postgres.kill()
    run = saver._core.redis.run

    def overtaken(call: Any) -> Any:
        reply = run(call)
        if call.script.name == "read":
            saver._core.redis.run = run
            saver.put_writes(at, [("a", 1)], "task")
        return reply

    saver._core.redis.run = overtaken
    assert saver.get_tuple(config()).pending_writes == []
    assert not saver._core.ledger.is_suspect("t")
    assert saver.get_tuple(config()).pending_writes == [("task", "a", 1)]


def test_what_a_read_has_learned_of_a_thread_is_no_answer_for_long_nor_for_namespaces_that_exist(
    make: Any, own_servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, other = make(triggers=frozenset()), make(triggers=frozenset())
    same_of_another: Any = {"configurable": {"thread_id": "u", "checkpoint_ns": "calls:1"}}
    put_one(saver, "t")
    put_one(saver, "u")
    saver.put(same_of_another, empty_checkpoint(), {}, {})
    saver.flush()
    with redis.Redis.from_url(own_servers.redis_url) as client:
        client.flushall()
    fresh = make(triggers=frozenset())
    assert fresh.get_tuple(config()) is not None
    assert fresh.get_tuple(config("u")) is not None
    own_servers.postgres.kill()
    inner: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": "calls:1"}}
    assert fresh.get_tuple(inner) is None
    for reader, where in ((fresh, config()), (other, inner), (fresh, same_of_another)):
        with pytest.raises(StoreUnavailableError, match="does not hold all of thread"):
            reader.get_tuple(where)
    monkeypatch.setattr("checkpointer.puts._LEARNED_SECONDS", 0.0)
    with pytest.raises(StoreUnavailableError, match="does not hold all of thread 't'"):
        fresh.get_tuple(inner)


async def test_an_asynchronous_run_completes_while_postgres_is_away(make: Any, own_servers: Servers) -> None:
    saver = make()
    run = graph(saver, own_servers.postgres.kill, subgraph=True)
    result = await run.ainvoke({"xs": []}, config())
    await await_until(lambda: named(saver, "flush.failed"))
    await asyncio.to_thread(own_servers.postgres.start)
    await await_until(lambda: not saver._core.ledger.records)
    assert (
        len([t for t in stock_history(own_servers.postgres_uri) if not t.config["configurable"]["checkpoint_ns"]]) == 6
    )
    assert (await run.aget_state(config())).values == result
    await saver.aclose()


def test_while_postgres_is_away_hot_threads_are_read_and_unknown_ones_raise(make: Any, own_servers: Servers) -> None:
    saver = make()
    put_one(saver, "hot")
    own_servers.postgres.kill()
    run = graph(saver, lambda: None, subgraph=False)
    assert run.get_state(config("hot")).values == {"xs": [0]}
    with pytest.raises(StoreUnavailableError, match="does not hold all of thread 'cold'"):
        run.get_state(config("cold"))
    with pytest.raises(StoreUnavailableError):
        list(saver.list(config("hot")))


def test_on_unverifiable_serve_answers_from_what_is_there(make: Any, own_servers: Servers) -> None:
    saver = make(on_unverifiable="serve")
    put_one(saver, "hot")
    own_servers.postgres.kill()
    for _ in range(3):
        assert saver.get_tuple(config("cold")) is None
        assert saver.get_tuple(config("hot")) is not None
    assert saver.hooks.flush(5)
    told = [e for e in saver.events if e.name == "read.unverified"]
    assert [e.thread_id for e in told] == ["cold"], "once, and not of the thread that Redis knows completely"
    assert told[0].user_notice
    assert told[0].error is not None


def test_a_read_from_postgres_alone_that_may_be_old_is_told_of(make: Any, own_servers: Servers) -> None:
    saver = make(on_unverifiable="serve", triggers=frozenset())
    put_one(saver, "flushed")
    assert saver.flush()
    put_one(saver, "open")
    own_servers.valkey.kill()
    saver.get_tuple(config("open"))
    assert saver.get_tuple(config("nobody")) is None
    list(saver.list(None))
    assert saver.hooks.flush(5)
    told = [(e.thread_id, e.operation, e.user_notice) for e in saver.events if e.name == "read.unverified"]
    assert told == [("open", "get_tuple", True), (None, "list", False)]


def test_a_flush_during_an_outage_is_false_and_says_why(make: Any, own_servers: Servers) -> None:
    saver = make(triggers=frozenset())
    put_one(saver, "t")
    own_servers.postgres.kill()
    report = saver.flush("t")
    assert not report
    assert report.error is not None
    assert report.waiting > 0
    assert report.waiting_threads == ["t"]
    everything = saver.flush()
    assert not everything
    assert everything.waiting_threads == ["t"]
    own_servers.postgres.start()
    assert wait_until(saver.flush)
    assert saver.hooks.flush(5)
    assert [e.name for e in saver.events if e.thread_id] == ["flush.failed", "flush.recovered"]


def test_an_outage_costs_the_readers_one_time_out_not_one_each(make: Any, own_servers: Servers) -> None:
    saver = make(triggers=frozenset())
    put_one(saver, "t")
    own_servers.postgres.kill()
    assert saver.get_tuple(config()) is not None
    assert saver._core.postgres_tier.is_down
    pool = saver._core.postgres.pool()
    asked = []
    connection = pool.connection
    pool.connection = lambda *a: asked.append(1) or connection(*a)
    for _ in range(50):
        assert saver.get_tuple(config()) is not None
    assert len(asked) <= 10


def test_after_a_restart_of_postgres_no_read_fails_for_a_stale_connection(make: Any, own_servers: Servers) -> None:
    saver = make(pool_size=5, triggers=frozenset())
    put_one(saver, "t")
    saver.flush()
    pool = saver._core.postgres.pool()
    # One more is in the hand of the readers.
    held = [pool.getconn() for _ in range(4)]
    for conn in held:
        pool.putconn(conn)
    own_servers.postgres.restart()
    for _ in range(10):
        assert saver.get_tuple(config()) is not None
    assert not named(saver, "backend.down")


def test_after_a_restart_of_postgres_no_flush_and_no_put_around_redis_fails_for_a_stale_connection(
    make: Any, own_servers: Servers
) -> None:
    saver = make(triggers=frozenset())
    put_one(saver, "t")
    assert saver.flush()
    put_one(saver, "t", 1)
    own_servers.postgres.restart()
    assert saver.flush()
    put_one(saver, "t", 2)
    own_servers.postgres.restart()
    own_servers.valkey.kill()
    saver.put_writes(
        {"configurable": {"thread_id": "u", "checkpoint_ns": "", "checkpoint_id": "1"}}, [("a", 1)], "task"
    )
    saver.hooks.flush(5)
    assert not named(saver, "flush.failed")
    assert [event.context["backend"] for event in named(saver, "backend.down")] == ["redis"]


# -- Redis away ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subgraph", [False, True])
def test_a_run_completes_while_redis_is_killed_and_nothing_of_it_is_lost(
    make: Any, own_servers: Servers, subgraph: bool
) -> None:
    saver = make()
    run = graph(saver, own_servers.valkey.kill, subgraph=subgraph)
    result = run.invoke({"xs": []}, config())
    assert result["xs"] == ([1, 2, 1, 2, 1, 1, 1] if subgraph else [1, 2, 1, 1])
    (around,) = wait_until(lambda: named(saver, "put.around"))
    assert (around.thread_id, around.severity, around.error_type) == ("t", "warning", "checkpoint_buffer_error")
    assert around.user_notice
    assert len(wait_until(lambda: named(saver, "backend.down"))) == 1
    own_servers.valkey.start()
    wait_until(lambda: not saver._core.ledger.records)
    root = [t for t in stock_history(own_servers.postgres_uri) if t.config["configurable"]["checkpoint_ns"] == ""]
    assert len(root) == 6
    wait_until(lambda: named(saver, "backend.up"))
    assert run.get_state(config()).values == result
    # It comes back to the buffer by itself.
    before = len(named(saver, "put.around"))
    put_one(saver, "later")
    assert saver._core.redis.client().exists(saver._core.commands.layout.thread("later").facts)
    assert len(named(saver, "put.around")) == before


async def test_an_asynchronous_run_completes_while_redis_is_away(make: Any, own_servers: Servers) -> None:
    saver = make()
    run = graph(saver, own_servers.valkey.kill, subgraph=True)
    result = await run.ainvoke({"xs": []}, config())
    assert result["xs"] == [1, 2, 1, 2, 1, 1, 1]
    await asyncio.to_thread(own_servers.valkey.start)
    await await_until(lambda: not saver._core.ledger.records)
    assert (
        len([t for t in stock_history(own_servers.postgres_uri) if not t.config["configurable"]["checkpoint_ns"]]) == 6
    )
    await saver.aclose()


def test_while_redis_is_away_a_read_raises_rather_than_answering_from_less(make: Any, own_servers: Servers) -> None:
    saver = make(triggers=frozenset())
    put_one(saver, "t")
    own_servers.valkey.kill()
    with pytest.raises(BufferUnavailableError, match="may hold checkpoints of thread 't'"):
        saver.get_tuple(config())
    with pytest.raises(BufferUnavailableError):
        list(saver.list(config()))
    with pytest.raises(BufferUnavailableError):
        saver.delete_thread("t")
    own_servers.valkey.start()
    found = wait_until(lambda: _tuple_or_none(saver))
    assert found.checkpoint["channel_values"]["xs"] == [0]


def _tuple_or_none(saver: Any) -> Any:
    try:
        return saver.get_tuple(config())
    except BufferUnavailableError:
        return None


def test_a_paused_redis_costs_one_time_out_not_one_for_each_put(make: Any, own_servers: Servers) -> None:
    saver = make(redis_timeout=0.5, triggers=frozenset())
    put_one(saver, "t")
    run = saver._core.redis.client
    asked = []
    saver._core.redis.client = lambda: asked.append(1) or run()
    own_servers.valkey.pause()
    try:
        begun = time.monotonic()
        for i in range(20):
            saver.put_writes(
                {"configurable": {"thread_id": "t", "checkpoint_ns": "", "checkpoint_id": "1"}}, [("a", i)], f"task{i}"
            )
        spent = time.monotonic() - begun
        assert len(asked) <= 2 + spent / 0.1, "between probes the dead server is left alone"
        assert len(asked) < 20
    finally:
        own_servers.valkey.resume()


def test_redis_killed_under_load_has_all_that_it_acknowledged_after_its_restart(
    make: Any, own_servers: Servers
) -> None:
    saver = make(triggers=frozenset())
    for i in range(50):
        put_one(saver, "t", i)
    own_servers.valkey.kill()
    own_servers.valkey.start()
    report = wait_until(saver.flush)
    assert report.checkpoints == 50
    assert len(stock_history(own_servers.postgres_uri)) == 50


def test_a_full_redis_lets_puts_go_around_and_still_drains(make: Any, own_servers: Servers) -> None:
    saver = make(triggers=frozenset())
    put_one(saver, "t", 1)
    client = saver._core.redis.client()
    client.config_set("maxmemory", "1")
    put_one(saver, "t", 2)
    (around,) = wait_until(lambda: named(saver, "put.around"))
    assert "OOM" in around.error.message or "memory" in around.error.message
    report = wait_until(saver.flush)
    assert report
    client.config_set("maxmemory", "0")
    assert len(stock_history(own_servers.postgres_uri)) == 2
    wait_until(lambda: _tuple_or_none(saver) is not None)
    assert saver.get_tuple(config()).checkpoint["channel_values"]["xs"] == [1, 2]


# -- both away ----------------------------------------------------------------------------------------------------


def test_with_both_away_the_put_raises_and_an_event_says_from_which_step_the_run_is_lost(
    make: Any, own_servers: Servers
) -> None:
    saver = make()

    def kill_both() -> None:
        own_servers.valkey.kill()
        own_servers.postgres.kill()

    run = graph(saver, kill_both, subgraph=False)
    with pytest.raises(CheckpointLostError, match="Neither Redis nor Postgres"):
        run.invoke({"xs": []}, config(), durability="sync")
    lost = wait_until(lambda: [e for e in named(saver, "put.failed") if e.operation == "put"])
    assert (lost[0].severity, lost[0].error_type, lost[0].outcome) == ("critical", "checkpoint_lost", "lost")
    assert lost[0].lost_from_step == 2
    assert lost[0].thread_id == "t"
    own_servers.valkey.start()
    own_servers.postgres.start()
    wait_until(lambda: not saver._core.ledger.records)
    assert max(t.metadata["step"] for t in stock_history(own_servers.postgres_uri)) == 1


# -- the four hooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["postgres", "valkey"])
@pytest.mark.parametrize("subgraph", [False, True])
async def test_console_thread_log_run_events_and_error_table_all_know_of_an_outage(
    make: Any,
    own_servers: Servers,
    away: str,
    subgraph: bool,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import observability

    monkeypatch.setenv("CHECKPOINTER_SPOOL_DIR", str(tmp_path))
    saver = make(hooks=("console", "thread_log", "run_events", "system_errors"))
    seen: list[dict[str, Any]] = []

    async def watch() -> None:
        async for event in observability.subscribe_run_events("t"):
            seen.append(event)

    watching = asyncio.create_task(watch())
    server = getattr(own_servers, away)
    name = {"postgres": "flush.failed", "valkey": "put.around"}[away]
    error_type = {"postgres": "checkpoint_flush_error", "valkey": "checkpoint_buffer_error"}[away]
    with caplog.at_level("INFO", logger="checkpointer.events"):
        await graph(saver, server.kill, subgraph=subgraph).ainvoke({"xs": []}, config())
        await await_until(lambda: named(saver, name))
        await await_until(lambda: [e for e in seen if e["type"] == error_type], message="the user's notice")
        await await_until(lambda: name in caplog.text, message="the console")
        await asyncio.to_thread(server.start)

    def stored() -> bool:
        with psycopg.connect(own_servers.postgres_uri, autocommit=True) as conn:
            row = conn.execute(
                "SELECT (SELECT count(*) FROM system_errors WHERE error_type = %s AND thread_id = 't'),"
                " (SELECT count(*) FROM thread_logs WHERE thread_id = 't'),"
                " (SELECT count(*) FROM checkpoints WHERE thread_id = 't' AND checkpoint_ns = '')",
                (error_type,),
            ).fetchone()
        return row is not None and row[0] == 1 and row[1] >= 1 and row[2] == 6

    await await_until(stored, message="error row, log and checkpoints are in Postgres")
    watching.cancel()
    notice = next(e for e in seen if e["type"] == error_type)
    assert notice["thread_id"] == "t"
    assert notice["severity"] in ("warning", "critical")
    assert "127.0.0.1" not in notice["message"]
    await saver.aclose()
