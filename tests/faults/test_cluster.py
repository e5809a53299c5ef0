"""Redis and Valkey clusters: everything works on them, and what happens to a slot or a master loses nothing."""

from __future__ import annotations

import operator
import time
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import clusters
import psycopg
import pytest
import redis
import redis.asyncio
from clusters import Cluster
from helpers import await_until, wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph
from load import Load

from checkpointer import BufferedPostgresSaver, BufferUnavailableError, CheckpointEvent, ConfigurationError
from checkpointer.buffer.keys import KeyLayout, slot_of
from checkpointer.hooks import redis_client

if TYPE_CHECKING:
    from collections.abc import Iterator


class State(TypedDict):
    xs: Annotated[list[int], operator.add]


def config(thread: str = "t") -> Any:
    return {"configurable": {"thread_id": thread}}


def graph(saver: Any) -> Any:
    inner = StateGraph(State)
    inner.add_node("deep", lambda state: {"xs": [2]})
    inner.add_edge(START, "deep")
    inner.add_edge("deep", END)
    builder = StateGraph(State)
    builder.add_node("one", lambda state: {"xs": [1]})
    builder.add_node("inner", inner.compile())
    builder.add_edge(START, "one")
    builder.add_edge("one", "inner")
    builder.add_edge("inner", END)
    return builder.compile(checkpointer=saver)


@pytest.fixture(scope="module", params=["valkey", "redis"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cluster(engine: str) -> Iterator[Cluster]:
    with clusters.fleet(engine) as servers:
        yield Cluster(servers, masters=3, replicas=0)


@pytest.fixture
def make(postgres_uri: str) -> Iterator[Any]:
    savers = []

    def _make(url: Any, **options: Any) -> Any:
        options = {"hooks": (), "close_timeout": 5.0, "redis_timeout": 1.0, **options}
        saver: Any = BufferedPostgresSaver(postgres_uri, url, **options)
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


def stock_history(uri: str, thread: str) -> list[Any]:
    with PostgresSaver.from_conn_string(uri) as stock:
        return list(stock.list(config(thread)))


def thread_in(saver: Any, partition: int, number: int = 0) -> str:
    """Return the id of a thread in this partition."""
    layout: KeyLayout = saver._core.commands.layout
    found = (f"p{partition}-{i}" for i in range(1_000_000) if layout.partition_of(f"p{partition}-{i}") == partition)
    return next(thread for n, thread in enumerate(found) if n == number)


def slot_of_partition(saver: Any, partition: int) -> int:
    key: bytes = saver._core.commands.layout.state(partition)
    return slot_of(key[key.index(b"{") + 1 : key.index(b"}")])


def puts_to_buffer(saver: Any, thread: str) -> bool:
    """Put a checkpoint and tell whether it went to the buffer."""
    before = saver._core.ledger.debt(thread)
    count = before.records if before else 0
    graph(saver).update_state(config(thread), {"xs": [0]}, as_node="inner")
    after = saver._core.ledger.debt(thread)
    return after is not None and after.records > count


# -- it works ------------------------------------------------------------------------------------------------------


def test_synchronous_runs_work_on_a_cluster_and_stock_reads_what_was_flushed(
    cluster: Cluster, make: Any, postgres_uri: str, prefix: str
) -> None:
    saver = make(cluster.url, prefix=prefix, triggers=frozenset())
    run = graph(saver)
    threads = [thread_in(saver, partition) for partition in range(32)]
    for thread in threads:
        assert run.invoke({"xs": [0]}, config(thread))["xs"] == [0, 1, 0, 1, 2]
    for node in cluster.masters:
        with node.client() as client:
            assert any(True for _ in client.scan_iter(f"{prefix}:*")), "every master has some of the threads"
    assert sorted(saver._core.flusher.submit(lambda session: session.dirty_threads()).result()) == sorted(threads)
    assert saver.flush()
    for thread in threads:
        ours = [t.config["configurable"]["checkpoint_id"] for t in saver.list(config(thread))]
        assert ours == [t.config["configurable"]["checkpoint_id"] for t in stock_history(postgres_uri, thread)]
        assert len(ours) >= 4
    saver.copy_thread(threads[0], "copied")
    saver.prune([threads[1]])
    saver.delete_thread(threads[2])
    assert run.get_state(config("copied")).values == run.get_state(config(threads[0])).values
    assert len(list(saver.list({"configurable": {"thread_id": threads[1], "checkpoint_ns": ""}}))) == 1
    assert saver.get_tuple(config(threads[2])) is None
    assert not saver.events


async def test_asynchronous_runs_work_on_a_cluster(cluster: Cluster, make: Any, postgres_uri: str, prefix: str) -> None:
    saver = make(cluster.url, prefix=prefix)
    run = graph(saver)
    threads = [thread_in(saver, partition) for partition in range(0, 32, 3)]
    for thread in threads:
        assert (await run.ainvoke({"xs": [0]}, config(thread)))["xs"] == [0, 1, 0, 1, 2]
    assert await saver.aflush()
    for thread in threads:
        assert (await run.aget_state(config(thread))).values["xs"] == [0, 1, 0, 1, 2]
        assert len(stock_history(postgres_uri, thread)) >= 4
    await saver.adelete_thread(threads[0])
    assert await saver.aget_tuple(config(threads[0])) is None
    assert not [event for event in saver.events if event.severity != "info"]
    await saver.aclose()


@pytest.mark.parametrize("given", ["sync", "async"])
async def test_a_cluster_client_of_the_user_is_enough_for_both_worlds_and_is_left_open(
    cluster: Cluster, make: Any, prefix: str, given: str
) -> None:
    port = cluster.masters[0].port
    client: Any = (redis if given == "sync" else redis.asyncio).RedisCluster(host="127.0.0.1", port=port)
    saver = make(client, prefix=prefix)
    run = graph(saver)
    assert run.invoke({"xs": []}, config("a"))["xs"] == (await run.ainvoke({"xs": []}, config("b")))["xs"]
    assert await saver.aflush()
    await saver.aclose()
    if given == "sync":
        assert client.ping()
        client.close()
    else:
        assert await client.ping()
        await client.aclose()


def test_scripts_that_a_master_has_forgotten_are_sent_again(cluster: Cluster, make: Any, prefix: str) -> None:
    saver = make(cluster.url, prefix=prefix, triggers=frozenset())
    threads = [thread_in(saver, partition) for partition in range(0, 32, 4)]
    for thread in threads:
        assert puts_to_buffer(saver, thread)
    for node in cluster.masters:
        with node.client() as client:
            client.script_flush()
    report = saver.flush()
    assert report
    assert report.checkpoints == len(threads)


def test_the_standard_hooks_work_on_a_cluster(cluster: Cluster, make: Any, postgres_uri: str, prefix: str) -> None:
    saver = make(cluster.url, prefix=prefix, hooks=("thread_log", "run_events", "system_errors"))
    saver.hooks.emit(
        CheckpointEvent(
            name="a.trouble",
            error_type="checkpoint_buffer_error",
            severity="warning",
            message="Something that the user should know.",
            thread_id="t",
            user_notice=True,
        )
    )
    assert saver.hooks.flush(10)
    with redis.RedisCluster(host="127.0.0.1", port=cluster.masters[0].port) as client:
        rings = [key for key in client.scan_iter(f"{prefix}:*") if b"}" not in key]
    assert len(rings) >= 2, "the thread's log and its run events"
    with psycopg.connect(postgres_uri) as conn:
        assert conn.execute("SELECT thread_id FROM system_errors").fetchall() == [("t",)]


def test_what_reports_errors_without_a_saver_takes_the_same_url(cluster: Cluster, prefix: str) -> None:
    client = redis_client(cluster.url, timeout=2)
    assert client.xadd(f"{prefix}:ev:errors", {"row": b"1"})
    client.close()
    with pytest.raises(redis.ConnectionError):
        redis_client("redis+cluster://127.0.0.1:1", timeout=2)


def test_the_url_of_a_single_server_for_a_node_of_a_cluster_is_refused_at_setup(
    cluster: Cluster, postgres_uri: str
) -> None:
    url = f"redis://127.0.0.1:{cluster.masters[0].port}"
    with (
        BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=url, hooks=()) as saver,
        pytest.raises(
            (ConfigurationError, BufferUnavailableError), match=r"a node of a cluster: use redis\+cluster://"
        ),
    ):
        saver.setup()


# -- a slot moves --------------------------------------------------------------------------------------------------


def test_a_slot_that_moves_there_and_back_under_load_loses_no_acknowledged_put(
    cluster: Cluster, engine: str, make: Any, postgres_uri: str, prefix: str
) -> None:
    # Valkey can also be asked to have written its file, on the same connection, wherever the slot is.
    saver = make(cluster.url, prefix=prefix, flush_age=0.1, ack="fsynced" if engine == "valkey" else "buffered")
    moving, staying = 5, 20
    slot = slot_of_partition(saver, moving)
    home = cluster.owner(slot)
    away = next(node for node in cluster.masters if node is not home)
    threads = [thread_in(saver, moving, n) for n in range(6)] + [thread_in(saver, staying, n) for n in range(2)]
    with Load(saver, threads) as load:
        for target in (away, home, away, home):
            count = load.count()
            wait_until(lambda count=count: load.count() > count + 100)
            cluster.migrate(slot, target, batch=1)
            assert cluster.owner(slot) is target
        count = load.count()
        wait_until(lambda: load.count() > count + 100)
    assert not load.failures
    assert wait_until(saver.flush, timeout=30)
    assert load.missing(postgres_uri) == []
    assert load.slowest < 5
    # It goes on with the buffer, in both worlds.
    wait_until(lambda: puts_to_buffer(saver, threads[0]))
    with saver._core.redis.dedicated() as client:
        assert client.exists(saver._core.commands.layout.state(moving))


def test_while_a_slot_is_half_moved_its_puts_go_around_and_the_others_stay_in_the_buffer(
    cluster: Cluster, make: Any, postgres_uri: str, prefix: str
) -> None:
    saver = make(cluster.url, prefix=prefix, triggers=frozenset())
    slot = slot_of_partition(saver, 1)
    source = cluster.owner(slot)
    target = next(node for node in cluster.masters if node is not source)
    here, there = thread_in(saver, 1), thread_in(saver, 17)
    assert puts_to_buffer(saver, here)
    with source.client() as a, target.client() as b:
        b.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", clusters.node_id(source))
        a.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", clusters.node_id(target))
        keys = a.execute_command("CLUSTER GETKEYSINSLOT", slot, 2)
        a.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        new = thread_in(saver, 1, 1)
        with Load(saver, [new, there]) as load:
            wait_until(lambda: load.count(new) > 20 and load.count(there) > 20)
        assert not load.failures
        (around,) = {event.thread_id for event in named(saver, "put.around")}
        assert around == new, "the other partition was not given up"
        assert len(named(saver, "backend.down")) == 1
        with pytest.raises(BufferUnavailableError):
            saver.get_tuple(config(here))
        report = saver.flush()
        assert not report
        assert there not in report.waiting_threads, "a part that is away holds up no other"
        assert saver.flush(there)
        while keys := a.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            a.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source):
            with node.client() as client:
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", clusters.node_id(target))
    assert wait_until(saver.flush)
    assert load.missing(postgres_uri) == []
    assert len(stock_history(postgres_uri, here)) == 1
    assert wait_until(lambda: puts_to_buffer(saver, here))
    wait_until(lambda: len(named(saver, "backend.up")) == len(named(saver, "backend.down")) == 1)


# -- a master dies -------------------------------------------------------------------------------------------------


async def test_a_master_that_is_killed_under_load_is_followed_by_its_replica_without_a_loss(
    engine: str, make: Any, postgres_uri: str
) -> None:
    with clusters.fleet(engine) as servers:
        cluster = Cluster(servers, masters=3, replicas=1)
        level = "replicated" if engine == "redis" else "buffered"
        saver = make(cluster.url, flush_age=0.5, ack=level, redis_timeout=0.5)
        dying, living = 2, 30
        slot = slot_of_partition(saver, dying)
        master = cluster.owner(slot)
        replica = cluster.replicas[cluster.masters.index(master)]
        first = [thread_in(saver, dying, n) for n in range(4)]
        with Load(saver, first) as before:
            wait_until(lambda: before.count() > 100)
        wait_until(lambda: clusters.replicated(master, replica))
        # The process goes on by itself: first around the dead master, then with the replica.
        second = [thread_in(saver, dying, n) for n in range(4, 8)] + [thread_in(saver, living, n) for n in range(2)]
        with Load(saver, second) as load:
            await await_until(lambda: load.count() > 100)
            if level == "buffered":
                # Writes at rest for a moment, so that what was acknowledged is known to be replicated.
                with master.client() as client:
                    client.execute_command("CLIENT PAUSE", 60_000, "WRITE")
                await await_until(lambda: clusters.replicated(master, replica))
            master.kill()
            begun = time.monotonic()
            await await_until(lambda: cluster.owner(slot) is replica, timeout=30)
            print(f"{engine}: failed over after {time.monotonic() - begun:.1f} s, slowest put {load.slowest:.2f} s")
            count = load.count()
            await await_until(lambda: load.count() > count + 50, timeout=30)
        assert not load.failures
        assert await await_until(saver.aflush, timeout=30)
        assert before.missing(postgres_uri) == load.missing(postgres_uri) == []
        assert {event.thread_id for event in named(saver, "put.around")} <= {*first, *second[:4]}
        puts_to_buffer(saver, second[0])
        with replica.client() as client:
            assert client.exists(saver._core.commands.layout.thread(second[0]).facts), "back in the buffer"
        await await_until(lambda: named(saver, "backend.up"), timeout=30)
        assert len(named(saver, "backend.down")) == len(named(saver, "backend.up")) == 1
        saver.close()
