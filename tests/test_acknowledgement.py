"""When a put returns: what `ack` promises is so at that moment, or the put says that it is not."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import await_until, wait_until
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt
from savers import NOTHING, Recording, State, config, make_checkpoint, put, stock_steps

from checkpointer import AcknowledgementError, InvalidConfigError, UnsupportedServerError, embedded

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def make(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Any]:
    opened = []

    def _make(url: str = redis_url, **options: Any) -> Recording:
        options = {"hooks": (), "triggers": NOTHING, "close_timeout": 1.0, **options}
        saver = Recording(postgres_uri, url, prefix=prefix, **options)
        opened.append(saver)
        return saver

    yield _make
    for saver in opened:
        saver.close()


def count(uri: str, table: str) -> int:
    with psycopg.connect(uri) as conn:
        row = conn.execute(f"SELECT count(*) FROM {table}").fetchone()  # type: ignore[arg-type]  # names in this file
    assert row is not None
    return int(row[0])


def test_flushed_means_that_postgres_has_it(make: Any, postgres_uri: str) -> None:
    saver = make(ack="flushed")
    saver.setup()
    at = put(saver, "t", 0)
    assert stock_steps(postgres_uri) == [0]
    saver.put_writes(at, [("a", 1), ("b", 2)], "task")
    assert count(postgres_uri, "checkpoint_writes") == 2


def test_a_call_chooses_its_level_in_its_config(make: Any, postgres_uri: str) -> None:
    saver = make()
    saver.setup()
    at = put(saver, "t", 0)
    assert stock_steps(postgres_uri) == []
    checkpoint, metadata, new = make_checkpoint(1)
    saved = saver.put({"configurable": {**at["configurable"], "ack": "flushed"}}, checkpoint, metadata, new)
    assert "ack" not in saved["configurable"]
    assert stock_steps(postgres_uri) == [1, 0]
    with pytest.raises(InvalidConfigError, match="buffered, replicated, fsynced, flushed"):
        saver.put(config(ack="certainly"), checkpoint, metadata, new)


async def test_the_levels_of_asynchronous_puts(make: Any, postgres_uri: str) -> None:
    saver = make()
    await saver.asetup()
    for step, level in enumerate(["buffered", "flushed"]):
        checkpoint, metadata, new = make_checkpoint(step)
        await saver.aput(config(f"t{step}", ack=level), checkpoint, metadata, new)
    assert [stock_steps(postgres_uri, f"t{i}") for i in range(2)] == [[], [1]]
    await saver.aclose()


async def test_fsynced_is_acknowledged_by_redis_or_refused_by_one_that_is_too_old(
    make: Any, postgres_uri: str, redis_url: str
) -> None:
    saver = make()
    await saver.asetup()
    checkpoint, metadata, new = make_checkpoint(0)
    putting = saver.aput(config(ack="fsynced"), checkpoint, metadata, new)
    with redis.Redis.from_url(redis_url) as client:
        known = client.command_list(pattern="waitaof")
    if known:
        await putting
        make(ack="fsynced").setup()
    else:
        with pytest.raises(UnsupportedServerError, match=r"Redis 7\.2 or Valkey .* The put is in the buffer\."):
            await putting
        with pytest.raises(UnsupportedServerError, match=r"needs Redis 7\.2 .*; this is Redis 7\.0"):
            make(ack="fsynced").setup()
    assert (await saver.aget_tuple(config())).metadata["step"] == 0
    assert stock_steps(postgres_uri) == []
    assert await saver.aflush()
    assert stock_steps(postgres_uri) == [0]
    await saver.aclose()


def test_control_writes_can_have_a_stronger_level(make: Any, postgres_uri: str) -> None:
    saver = make(control_ack="flushed")
    saver.setup()
    builder = StateGraph(State)
    builder.add_node("ask", lambda state: {"xs": [interrupt("?")]})
    builder.add_edge(START, "ask")
    builder.add_edge("ask", END)
    builder.compile(checkpointer=saver).invoke({"xs": []}, config())
    with psycopg.connect(postgres_uri) as conn:
        found = conn.execute("SELECT channel FROM checkpoint_writes WHERE idx < 0").fetchall()
    assert found == [("__interrupt__",)]
    at = put(saver, "u", 0)
    saver.put_writes(at, [("a", 1)], "task")
    assert stock_steps(postgres_uri, "u") == []


def test_many_flushed_puts_share_transactions(make: Any, postgres_uri: str) -> None:
    saver = make(ack="flushed")
    saver.setup()
    session = saver._core.flusher._session
    locked, transactions = session.locked, []
    session.locked = lambda *args: transactions.append(1) or locked(*args)
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda i: put(saver, f"t{i}", 0), range(60)))
    assert count(postgres_uri, "checkpoints") == 60
    assert len(transactions) < 60


def test_what_cannot_be_flushed_is_said_and_stays_buffered(make: Any, postgres_uri: str) -> None:
    saver = make(postgres_timeout=0.3)
    saver.setup()
    partition = saver._core.commands.layout.partition_of("t")
    with psycopg.connect(postgres_uri) as other:
        other.execute("SELECT 1 FROM checkpoint_buffer_partitions WHERE partition = %s FOR UPDATE", (partition,))
        checkpoint, metadata, new = make_checkpoint(0)
        with pytest.raises(AcknowledgementError, match="in the buffer, but could not be acknowledged as 'flushed'"):
            saver.put(config(ack="flushed"), checkpoint, metadata, new)
    (event,) = saver.named("put.unacknowledged")
    assert event.outcome == "buffered"
    assert saver.get_tuple(config()).metadata["step"] == 0
    assert saver.flush()
    assert [event.thread_id for event in saver.named("flush.recovered")] == ["t"]
    assert stock_steps(postgres_uri) == [0]


def test_without_an_append_only_file_fsynced_is_refused_and_the_put_is_in_the_buffer(
    make: Any, postgres_uri: str, own_servers: embedded.Servers
) -> None:
    with redis.Redis.from_url(own_servers.redis_url) as client:
        client.config_set("appendonly", "no")
    with pytest.raises(UnsupportedServerError, match="appendonly no"):
        make(own_servers.redis_url, ack="fsynced").setup()
    saver = make(own_servers.redis_url)
    saver.setup()
    checkpoint, metadata, new = make_checkpoint(0)
    with pytest.raises(UnsupportedServerError, match=r"ack='fsynced' .* The put is in the buffer\."):
        saver.put(config(ack="fsynced"), checkpoint, metadata, new)
    assert saver.get_tuple(config()).metadata["step"] == 0
    assert saver._core.ledger.debt("t"), "it is flushed at the next occasion"
    assert saver.flush()
    assert stock_steps(postgres_uri) == [0]


def test_without_replicas_replicated_is_refused_at_setup_and_flushed_later(make: Any, postgres_uri: str) -> None:
    saver = make(ack="replicated", redis_timeout=2.0)
    with pytest.raises(UnsupportedServerError, match="needs as many connected replicas"):
        saver.setup()
    put(saver, "t", 0)
    assert stock_steps(postgres_uri) == [0]
    (event,) = saver.named("put.unconfirmed")
    assert "replicated" in event.message


def test_replicated_waits_for_the_replica(make: Any, postgres_uri: str, own_servers: embedded.Servers) -> None:
    with (
        embedded.servers() as second,
        redis.Redis.from_url(own_servers.redis_url) as primary,
        redis.Redis.from_url(second.redis_url) as replica,
    ):
        replica.replicaof("127.0.0.1", str(own_servers.valkey.port))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", timeout=30)
        saver = make(own_servers.redis_url, ack="replicated", redis_timeout=1.0)
        saver.setup()
        at = put(saver, "t", 0)
        assert replica.exists(saver._core.commands.layout.thread("t").dirty)
        assert stock_steps(postgres_uri) == []
        # It has all that was put so far, and confirms nothing more: of what is put now, Postgres has to be sure.
        wait_until(lambda: (found := primary.info("replication"))["slave0"]["offset"] == found["master_repl_offset"])
        second.valkey.pause()
        try:
            put(saver, "t", 1, at)
        finally:
            second.valkey.resume()
        assert stock_steps(postgres_uri) == [1, 0]
        (event,) = saver.named("put.unconfirmed")
        assert "replicated" in event.message


def test_fsynced_waits_for_the_disk(make: Any, postgres_uri: str, own_servers: embedded.Servers) -> None:
    saver = make(own_servers.redis_url, ack="fsynced", redis_timeout=0.4)
    with redis.Redis.from_url(own_servers.redis_url) as client:
        if not client.command_list(pattern="waitaof"):
            with pytest.raises(UnsupportedServerError, match=r"needs Redis 7\.2"):
                saver.setup()
            return
        saver.setup()
        client.config_set("appendfsync", "always")
        at = put(saver, "t", 0)
        assert stock_steps(postgres_uri) == []
        client.config_set("appendfsync", "no")  # from here on nobody knows what is on the disk
        put(saver, "t", 1, at)
    assert stock_steps(postgres_uri) == [1, 0]
    (event,) = saver.named("put.unconfirmed")
    assert "fsynced" in event.message


def test_a_cancelled_put_leaves_the_saver_usable(make: Any, postgres_uri: str) -> None:
    saver = make(ack="flushed")
    saver.setup()

    async def run() -> None:
        for step in range(20):
            checkpoint, metadata, new = make_checkpoint(step)
            task = asyncio.create_task(saver.aput(config(), checkpoint, metadata, new))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        checkpoint, metadata, new = make_checkpoint(99)
        await saver.aput(config(), checkpoint, metadata, new)
        await saver.aclose()

    asyncio.run(run())
    assert 99 in stock_steps(postgres_uri)


def test_a_put_that_is_cancelled_during_its_flush_strands_nobody(make: Any, postgres_uri: str) -> None:
    saver = make(ack="flushed", postgres_timeout=20.0)
    saver.setup()
    waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    async def run() -> None:
        with psycopg.connect(postgres_uri) as holder, psycopg.connect(postgres_uri, autocommit=True) as conn:
            holder.execute("SELECT 1 FROM checkpoint_buffer_partitions FOR UPDATE")
            puts = [asyncio.create_task(saver.aput(config(f"t{n}"), *make_checkpoint(0))) for n in range(2)]
            await await_until(lambda: conn.execute(waits).fetchone() is not None)
            puts[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await puts[0]
            holder.rollback()
            await puts[1]
        await saver.aput(config("t2"), *make_checkpoint(0))
        await saver.aclose()

    asyncio.run(run())
    assert [stock_steps(postgres_uri, f"t{n}") for n in range(3)] == [[0], [0], [0]]
