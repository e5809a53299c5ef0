"""LangGraph's tables, made as partitioned ones with the SQL of docs/scaling.md before `setup()`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from load import Load, steps

from checkpointer import BufferedPostgresSaver
from checkpointer.store import schema

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


def documented(name: str) -> str:
    """Return the SQL of docs/scaling.md that begins with this comment."""
    (sql,) = re.findall(rf"```sql\n-- {name}\n(.*?)```", Path("docs/scaling.md").read_text(), re.DOTALL)
    return str(sql)


@pytest.fixture(params=["hash", "range"])
def partitioned(request: pytest.FixtureRequest, postgres_uri: str) -> str:
    """A database with the three tables partitioned, by hash or by ranges of thread ids."""
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute(documented("By hash") if request.param == "hash" else documented("By range"))
    return postgres_uri


@pytest.fixture
def saver(partitioned: str, redis_url: str, prefix: str) -> Iterator[Any]:
    made: Any = BufferedPostgresSaver.from_conn_string(
        partitioned, redis_url=redis_url, prefix=prefix, hooks=(), flush_age=0.1
    )
    made.events = []
    made.hooks.add(made.events.append)
    with made:
        made.setup()
        yield made


async def test_the_whole_saver_works_on_them_and_stock_reads_them(saver: Any, partitioned: str) -> None:
    threads = [f"{letter}-thread" for letter in "0afmz~"]
    with Load(saver, threads) as load:
        wait_until(lambda: load.count() > 200)
    assert not load.failures
    assert saver.flush()
    assert load.missing(partitioned) == []
    for thread in threads:
        assert (await saver.aget_tuple(config(thread))).checkpoint == saver.get_tuple(config(thread)).checkpoint
    saved = saver.put(*next(steps("writes")))
    saver.put_writes(saved, [("x", [1]), ("y", [2])], "task")
    saver.put_writes(saved, [("__interrupt__", [3])], "task")
    assert saver.flush("writes")
    saver.put_writes(saved, [("x", ["another"])], "task")
    saver.put_writes(saved, [("__interrupt__", [4])], "task")
    assert saver.flush("writes")
    saver.copy_thread(threads[0], "copied")
    saver.prune([threads[1]])
    saver.delete_thread(threads[2])
    with PostgresSaver.from_conn_string(partitioned) as stock:
        found = stock.get_tuple(config("writes"))
        assert found is not None
        assert sorted(found.pending_writes or ()) == [
            ("task", "__interrupt__", [4]),
            ("task", "x", [1]),
            ("task", "y", [2]),
        ]
        assert len(list(stock.list(config("copied")))) == len(list(stock.list(config(threads[0]))))
        assert len(list(stock.list(config(threads[1])))) == 1
        assert stock.get_tuple(config(threads[2])) is None
        # The reverse: what stock writes there, ours reads.
        stock.put(*next(steps("by-stock")))
    assert saver.get_tuple(config("by-stock")) is not None
    assert not saver.events


def test_the_rows_are_spread_over_the_partitions(saver: Any, partitioned: str) -> None:
    for i in range(64):
        saver.put(*next(steps(f"{i:x}-thread")))
    assert saver.flush()
    with psycopg.connect(partitioned) as conn:
        parts = conn.execute("SELECT tableoid::regclass, count(*) FROM checkpoints GROUP BY 1").fetchall()
    assert len(parts) == 4


def test_neither_ours_nor_stocks_setup_has_anything_left_to_do(saver: Any, partitioned: str) -> None:
    with PostgresSaver.from_conn_string(partitioned) as stock:
        stock.setup()
    with psycopg.connect(partitioned, autocommit=True) as conn:
        assert schema.pending(conn) == []
        indexes = conn.execute(
            "SELECT count(*) FROM pg_class WHERE relkind = 'I' AND relname = ANY(%s)",
            ([f"{table}_thread_id_idx" for table in TABLES],),
        ).fetchone()
    assert indexes == (3,)


def test_a_statement_about_one_thread_touches_one_partition_of_each_table(saver: Any, partitioned: str) -> None:
    with psycopg.connect(partitioned) as conn:
        for table in TABLES:
            plan = conn.execute(
                f"EXPLAIN (COSTS OFF) SELECT * FROM {table} WHERE thread_id = 't' AND checkpoint_ns = ''".encode()
            ).fetchall()
            assert len(re.findall(rf"{table}_\w+", " ".join(line for (line,) in plan if " on " in line))) >= 1
            scanned = {name for (line,) in plan for name in re.findall(rf" on ({table}_\w+)", line)}
            assert len({name for name in scanned if "idx" not in name and "pkey" not in name}) == 1
