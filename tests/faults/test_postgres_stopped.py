"""A Postgres that neither answers nor hangs up blocks nothing for ever: SIGSTOP, black holes, half-open ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import await_until, wait_until
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from proxy import proxied
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from checkpointer import BufferedPostgresSaver, StoreUnavailableError, embedded
from checkpointer.flush.session import Progress
from checkpointer.store.reads import Query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer import CheckpointEvent
    from checkpointer.embedded import Servers

# Without the deadlines the calls below would not return at all; with them they take some seconds.
PATIENCE = 20.0


def begin(work: Callable[[], Any]) -> Future[Any]:
    """Call `work` in a thread that does not keep the tests from ending if it hangs."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


def within(work: Callable[[], Any]) -> tuple[Any, float]:
    """Call `work`; its result and the seconds that it took, or the test fails."""
    begun = time.monotonic()
    return begin(work).result(PATIENCE), time.monotonic() - begun


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def put(saver: Any, thread: str, value: int = 0) -> Any:
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"] = {"xs": [value]}
    checkpoint["channel_versions"] = {"xs": f"{value}"}
    return saver.put(config(thread), checkpoint, {"step": value}, {"xs": f"{value}"})


def xs(found: Any) -> list[int]:
    return found.checkpoint["channel_values"]["xs"]  # type: ignore[no-any-return]


def named(saver: Any, name: str) -> list[CheckpointEvent]:
    return [event for event in saver.events if event.name == name]


def watch(saver: BufferedPostgresSaver) -> Any:
    saver.events = []  # type: ignore[attr-defined]
    saver.hooks.add(saver.events.append)  # type: ignore[attr-defined]
    return saver


@pytest.fixture(scope="module")
def pair() -> Iterator[Servers]:
    with embedded.servers() as pair:
        yield pair


@pytest.fixture
def own_servers(pair: Servers) -> Iterator[Servers]:
    """The servers of this file, with an empty database and an empty Redis for each test."""
    with psycopg.connect(pair.postgres_uri, autocommit=True) as admin:
        admin.execute("DROP SCHEMA public CASCADE")
        admin.execute("CREATE SCHEMA public")
    with redis.Redis.from_url(pair.redis_url) as client:
        client.flushall()
    yield pair
    pair.postgres.resume()


@pytest.fixture
def make(own_servers: Servers) -> Iterator[Any]:
    savers = []

    def _make(conn: Any = None, **options: Any) -> Any:
        options = {
            "hooks": (),
            "query_timeout": 0.5,
            "postgres_timeout": 1.0,
            "redis_timeout": 5.0,
            "close_timeout": 1.0,
            "triggers": frozenset(),
            **options,
        }
        saver = watch(BufferedPostgresSaver(conn or own_servers.postgres_uri, own_servers.redis_url, **options))
        saver.setup()
        savers.append(saver)
        return saver

    yield _make
    own_servers.postgres.resume()
    for saver in savers:
        saver.close()


# -- reads --------------------------------------------------------------------------------------------------------


def test_a_hot_read_is_answered_by_redis_once_postgres_is_silent_and_the_next_ones_at_once(
    make: Any, own_servers: Servers
) -> None:
    saver = make()
    put(saver, "hot", 7)
    assert xs(saver.get_tuple(config("hot"))) == [7]
    own_servers.postgres.pause()
    found, seconds = within(lambda: saver.get_tuple(config("hot")))
    assert xs(found) == [7]
    assert seconds >= 0.5
    assert wait_until(lambda: named(saver, "backend.down"))[0].error.type.endswith("NoAnswerError")
    asked = []
    pool = saver._core.postgres.pool()
    connection = pool.connection
    pool.connection = lambda *a: asked.append(1) or connection(*a)
    for _ in range(20):
        within(lambda: saver.get_tuple(config("hot")))
    assert len(asked) < 15, "between probes the silent server is left alone"
    own_servers.postgres.resume()
    wait_until(lambda: saver.get_tuple(config("hot")) and not saver._core.postgres_tier.is_down, timeout=30)
    assert saver.flush()
    wait_until(lambda: named(saver, "backend.up"))
    assert len(named(saver, "backend.down")) == 1


@pytest.mark.parametrize("kind", ["made by the saver", "the user's, with transactions"])
def test_a_cold_read_of_a_stopped_postgres_raises_and_works_again_afterwards(
    make: Any, own_servers: Servers, kind: str
) -> None:
    with contextlib.ExitStack() as stack:
        pool = None
        if kind != "made by the saver":
            pool = stack.enter_context(ConnectionPool(own_servers.postgres_uri, min_size=1, open=True))
        saver = make(pool)
        put(saver, "cold", 1)
        assert saver.flush()
        saver._core.redis.client().flushall()
        assert xs(saver.get_tuple(config("cold"))) == [1]
        saver._core.redis.client().flushall()
        own_servers.postgres.pause()
        with pytest.raises(StoreUnavailableError):
            within(lambda: saver.get_tuple(config("cold")))
        with pytest.raises(StoreUnavailableError):
            within(lambda: list(saver.list(config("cold"))))
        own_servers.postgres.resume()
        wait_until(lambda: not saver._core.postgres_tier.is_down or _tuple_or_none(saver, "cold"), timeout=30)
        assert xs(saver.get_tuple(config("cold"))) == [1]
        if pool is not None:
            with pool.connection() as conn:
                assert "wait" not in vars(conn), "the user's connections are given back as they were"


def _tuple_or_none(saver: Any, thread: str) -> Any:
    with contextlib.suppress(StoreUnavailableError):
        return saver.get_tuple(config(thread))


@pytest.mark.parametrize("kind", ["made by the saver", "the user's, with transactions"])
async def test_asynchronous_reads_of_a_stopped_postgres_behave_alike(
    make: Any, own_servers: Servers, kind: str
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        pool = None
        if kind != "made by the saver":
            pool = AsyncConnectionPool(own_servers.postgres_uri, min_size=1, open=False)
            await stack.enter_async_context(pool)
        saver = watch(
            BufferedPostgresSaver(
                pool or own_servers.postgres_uri,
                own_servers.redis_url,
                hooks=(),
                query_timeout=0.5,
                postgres_timeout=1.0,
                close_timeout=1.0,
                triggers=frozenset(),
            )
        )
        await saver.asetup()
        await asyncio.to_thread(put, saver, "hot", 7)
        await asyncio.to_thread(put, saver, "cold", 1)
        assert xs(await saver.aget_tuple(config("hot"))) == [7]
        assert await saver.aflush("cold")
        await asyncio.to_thread(lambda: saver._core.redis.client().delete(*_keys_of(saver, "cold")))
        own_servers.postgres.pause()
        try:
            assert xs(await asyncio.wait_for(saver.aget_tuple(config("hot")), PATIENCE)) == [7]
            assert saver._core.postgres_tier.is_down
            with pytest.raises(StoreUnavailableError):
                await asyncio.wait_for(saver.aget_tuple(config("cold")), PATIENCE)
        finally:
            own_servers.postgres.resume()

        async def answered() -> Any:
            with contextlib.suppress(StoreUnavailableError):
                return await saver.aget_tuple(config("cold"))

        assert xs(await await_until(answered, timeout=30)) == [1]
        await saver.aclose()


def _keys_of(saver: Any, thread: str) -> list[Any]:
    keys = saver._core.commands.layout.thread(thread)
    return [keys.dirty, keys.clean, keys.facts]


def test_a_cut_connection_costs_one_read_a_time_out_and_the_pool_forgets_the_others(
    make: Any, own_servers: Servers
) -> None:
    with proxied(own_servers.postgres_uri) as (uri, proxy):
        saver = make(uri, query_timeout=1.0, pool_size=5)
        put(saver, "hot", 7)
        pool = saver._core.postgres.pool()
        for conn in [pool.getconn() for _ in range(4)]:  # one more is in the hand of the readers
            pool.putconn(conn)
        tier = saver._core.postgres_tier
        failures: list[BaseException] = []
        failed = tier.failed
        tier.failed = lambda exc: failures.append(exc) or failed(exc)
        proxy.silence()
        assert xs(within(lambda: saver.get_tuple(config("hot")))[0]) == [7]
        wait_until(lambda: named(saver, "backend.down"))
        wait_until(lambda: saver.get_tuple(config("hot")) and not saver._core.postgres_tier.is_down)
        for _ in range(10):
            assert xs(saver.get_tuple(config("hot"))) == [7]
        assert [type(exc).__name__ for exc in failures].count("NoAnswerError") == 1


def test_the_commit_of_a_read_in_the_users_pool_is_given_up_too(make: Any, own_servers: Servers) -> None:
    armed = threading.Event()
    with proxied(own_servers.postgres_uri) as (uri, proxy):

        class SilentAtCommit(psycopg.Connection[Any]):
            def commit(self) -> None:
                if armed.is_set():
                    proxy.silence()
                super().commit()

        with ConnectionPool(uri, connection_class=SilentAtCommit, min_size=1, open=True) as pool:
            saver = make(pool)
            put(saver, "hot", 7)
            armed.set()
            assert xs(within(lambda: saver.get_tuple(config("hot")))[0]) == [7]
            assert wait_until(lambda: named(saver, "backend.down"))


# -- the flusher --------------------------------------------------------------------------------------------------


def test_the_flusher_leaves_a_batch_that_postgres_stopped_in_and_brings_everything_once_it_goes_on(
    make: Any, own_servers: Servers
) -> None:
    saver = make(query_timeout=1.0, triggers=frozenset({"age"}), flush_age=0.05)
    saver.get_tuple(config("t"))
    with psycopg.connect(own_servers.postgres_uri) as blocker:
        assert saver.flush()
        # The flusher waits for a row inside a batch when the server stops.
        blocker.execute("SELECT 1 FROM checkpoint_buffer_partitions FOR UPDATE")
        put(saver, "t", 0)
        future = saver._core.flusher.submit(lambda session: session.flush(["t"], 600.0, Progress()))
        wait_until(lambda: _waiting(own_servers.postgres_uri))
        own_servers.postgres.pause()
        for value in range(1, 20):
            put(saver, "t", value)
        with pytest.raises(StoreUnavailableError) as raised:
            future.result(PATIENCE)
        assert type(raised.value.__cause__).__name__ == "NoAnswerError"
        failed = wait_until(lambda: named(saver, "flush.failed"), timeout=PATIENCE)
        assert [e.thread_id for e in failed] == ["t"]
        assert named(saver, "backend.down")
        put(saver, "t", 20)
        own_servers.postgres.resume()
    wait_until(lambda: not saver._core.ledger.records, timeout=30)
    with PostgresSaver.from_conn_string(own_servers.postgres_uri) as stock:
        assert sorted(xs(t)[0] for t in stock.list(config("t"))) == list(range(21))
    assert wait_until(lambda: named(saver, "flush.recovered"))


def _waiting(uri: str) -> bool:
    with psycopg.connect(uri, autocommit=True) as conn:
        row = conn.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchone()
    return row is not None and row[0] > 0


# -- what is slow, and alive --------------------------------------------------------------------------------------


def test_a_statement_that_is_answered_in_time_or_bit_by_bit_is_not_cut(make: Any) -> None:
    saver = make(query_timeout=2.0)

    def fetch(sql: str) -> list[Any]:
        return saver._core.postgres.fetch(Query(sql))

    assert len(fetch("SELECT pg_sleep(0.5)")) == 1
    assert len(fetch("SELECT repeat('x', 20000), pg_sleep(0.6) FROM generate_series(1, 5)")) == 5


def test_a_flush_and_a_list_may_be_slow_while_postgres_answers_others(make: Any, own_servers: Servers) -> None:
    saver = make(postgres_timeout=10.0)
    put(saver, "t", 3)
    for work in (lambda: bool(saver.flush()), lambda: [xs(t) for t in saver.list(config("t"))] == [[3]]):
        with psycopg.connect(own_servers.postgres_uri) as blocker:
            blocker.execute("LOCK TABLE checkpoints")
            worker = begin(work)
            wait_until(lambda: _waiting(own_servers.postgres_uri))
            time.sleep(1.5)  # three times the silence after which a read is given up
            assert not worker.done()
            blocker.rollback()
        assert worker.result(PATIENCE)
    assert not named(saver, "backend.down")


# -- closing and connecting ---------------------------------------------------------------------------------------


def test_close_returns_in_its_time_while_postgres_is_stopped_in_a_batch(make: Any, own_servers: Servers) -> None:
    saver = make(query_timeout=600.0, triggers=frozenset({"close"}), close_timeout=2.0)
    put(saver, "t", 1)
    saver.get_tuple(config("t"))
    flusher = saver._core.flusher._thread
    own_servers.postgres.pause()
    _, seconds = within(saver.close)
    assert seconds < 2.0 + 5.0
    wait_until(lambda: not flusher.is_alive(), message="the flusher's thread ends")
    own_servers.postgres.resume()
    saver = make()
    assert saver.flush()
    assert xs(saver.get_tuple(config("t"))) == [1]


async def test_aclose_returns_in_its_time_while_postgres_is_stopped(make: Any, own_servers: Servers) -> None:
    saver = make(query_timeout=600.0, triggers=frozenset({"close"}), close_timeout=2.0)
    await asyncio.to_thread(put, saver, "t", 1)
    await saver.aget_tuple(config("t"))
    own_servers.postgres.pause()
    begun = time.monotonic()
    await asyncio.wait_for(saver.aclose(), PATIENCE)
    assert time.monotonic() - begun < 2.0 + 5.0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_takes_connections_and_never_answers_is_a_postgres_that_cannot_be_reached(
    own_servers: Servers, asynchronous: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        uri = f"postgresql://postgres@127.0.0.1:{deaf.getsockname()[1]}/postgres"
        saver = BufferedPostgresSaver.from_conn_string(
            uri, redis_url=own_servers.redis_url, hooks=(), postgres_timeout=1.0, query_timeout=0.5, close_timeout=0.5
        )

        async def use() -> None:
            async with saver:
                with pytest.raises(StoreUnavailableError):
                    await saver.asetup()
                with pytest.raises(StoreUnavailableError):
                    await saver.aget_tuple(config("t"))

        def use_blocking() -> None:
            with saver:
                with pytest.raises(StoreUnavailableError):
                    saver.setup()
                with pytest.raises(StoreUnavailableError):
                    saver.get_tuple(config("t"))

        within((lambda: asyncio.run(use())) if asynchronous else use_blocking)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_migration_may_take_long_but_not_for_ever_once_postgres_is_stopped(
    make: Any, own_servers: Servers, asynchronous: bool
) -> None:
    saver = make()
    setup = (lambda: asyncio.run(saver.asetup())) if asynchronous else saver.setup
    with psycopg.connect(own_servers.postgres_uri) as blocker:
        blocker.execute("DELETE FROM checkpointer_migrations")
        blocker.commit()
        blocker.execute("LOCK TABLE system_errors")
        future = begin(setup)
        wait_until(lambda: _waiting(own_servers.postgres_uri))
        time.sleep(1.5)  # three times the silence after which a read is given up
        assert not future.done()
        own_servers.postgres.pause()
        with pytest.raises(StoreUnavailableError):
            future.result(PATIENCE)
        own_servers.postgres.resume()
    saver.setup()
