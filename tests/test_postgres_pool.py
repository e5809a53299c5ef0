"""A connection stays in hand between reads, and nobody misses it: limits hold, and what is closed is closed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import wait_until
from psycopg.conninfo import make_conninfo
from savers import config, put

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "checkpointer-pool-test"


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    named = make_conninfo(postgres_uri, application_name=NAME)
    with BufferedPostgresSaver.from_conn_string(
        named, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset(), pool_size=2
    ) as found:
        found.setup()
        yield found


def sessions(uri: str) -> int:
    with psycopg.connect(uri) as conn:
        row = conn.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", (NAME,)).fetchone()
    assert row is not None
    return int(row[0])


def test_reads_share_a_connection_that_the_pool_sees_now_and_then(saver: BufferedPostgresSaver) -> None:
    pool = saver._core.postgres.pool()
    saver.get_tuple(config())
    before = pool.get_stats()["requests_num"]
    for _ in range(250):
        saver.get_tuple(config())
    assert 2 <= pool.get_stats()["requests_num"] - before <= 3


async def test_asynchronous_reads_too(saver: BufferedPostgresSaver) -> None:
    await saver.aget_tuple(config())
    pool = await saver._core.postgres.apool()
    before = pool.get_stats()["requests_num"]
    for _ in range(250):
        await saver.aget_tuple(config())
    assert 2 <= pool.get_stats()["requests_num"] - before <= 3
    await saver.aclose()


def test_many_at_a_time_use_no_more_connections_than_the_pool_may_have(
    saver: BufferedPostgresSaver, postgres_uri: str
) -> None:
    put(saver, "t", 0)
    saver.flush()
    dedicated = 1  # the flusher's
    most = 0
    with ThreadPoolExecutor(20) as threads:
        for _ in range(5):
            reads = [threads.submit(saver.get_tuple, config()) for _ in range(100)]
            most = max(most, sessions(postgres_uri))
            assert all(read.result(20) is not None for read in reads)
    assert most <= 2 + dedicated

    async def read_many() -> list[Any]:
        found = await asyncio.gather(*(saver.aget_tuple(config()) for _ in range(100)))
        assert sessions(postgres_uri) <= 2 * 2 + dedicated
        await saver.aclose()
        return found

    assert None not in asyncio.run(read_many())


def test_a_pool_of_one_serves_those_who_want_a_cursor_as_well(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset(), pool_size=1
    ) as saver:
        saver.setup()
        saver.get_tuple(config())
        with saver._cursor() as cursor:
            assert cursor.execute("SELECT 1 AS one").fetchone() == {"one": 1}
        assert saver.get_tuple(config()) is None


def test_a_connection_whose_use_failed_does_not_stay_in_hand(saver: BufferedPostgresSaver) -> None:
    side = saver._core.postgres

    def begin_and_fail() -> None:
        with side.connection() as conn:
            conn.execute("BEGIN")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_and_fail()
    with side.connection() as conn:
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_what_is_closed_leaves_no_session(saver: BufferedPostgresSaver, postgres_uri: str) -> None:
    saver.get_tuple(config())

    async def read() -> None:
        await saver.aget_tuple(config())
        await saver.aclose()

    asyncio.run(read())
    saver.close()
    wait_until(lambda: sessions(postgres_uri) == 0)
