"""Large batches go to Postgres by COPY, and mean what the upserts mean."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg import sql
from psycopg.conninfo import make_conninfo
from savers import NOTHING, Recording, config, make_checkpoint, put_chain, stock_steps, stock_tuples

from checkpointer.records import Address, Blob
from checkpointer.store import writes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MANY = 120
"""Checkpoints enough for COPY."""


class Copies:
    """Keeps what was copied, and with what outcome."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried = 0
        self.done = 0
        copy = writes.Batch.copy

        def counting(batch: writes.Batch, cur: Any) -> None:
            self.tried += 1
            copy(batch, cur)
            self.done += 1

        monkeypatch.setattr(writes.Batch, "copy", counting)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


def test_a_large_batch_is_copied_and_stock_reads_what_was_put(
    make: Callable[..., Recording], postgres_uri: str, copies: Copies, conn: psycopg.Connection[Any]
) -> None:
    saver = make()
    thread = "t ü \\ \" ' \N{SNOWMAN}"
    values = {"word": "Grüße \\ \t \N{SNOWMAN}", "none": None, "number": 1.5, "list": [b"\0\xff", None, "\0"]}
    parent = None
    for step in range(MANY):
        checkpoint, metadata, new = make_checkpoint(step, **values)
        metadata["said"] = "\N{SNOWMAN} \\u0041"
        parent = saver.put(parent or config(thread), checkpoint, metadata, new)
        saver.put_writes(parent, [("word", "ü"), ("list", [step]), ("none", None)], "task", "~path")
    assert saver.flush()
    assert (copies.tried, copies.done) == (1, 1)
    found = stock_tuples(postgres_uri, thread)
    assert [t.metadata["step"] for t in found] == [*reversed(range(MANY))]
    orphans = conn.execute("SELECT checkpoint_id FROM checkpoints WHERE parent_checkpoint_id IS NULL").fetchall()
    assert orphans == [(found[-1].checkpoint["id"],)]
    assert all(a.parent_config == b.config for a, b in pairwise(found))
    for each in found:
        step = each.metadata["step"]
        assert each.checkpoint["channel_values"] == {"step": [step], **values}
        assert each.metadata["said"] == "\N{SNOWMAN} \\u0041"
        assert each.pending_writes == [("task", "word", "ü"), ("task", "list", [step]), ("task", "none", None)]


def test_rows_that_are_there_already_keep_a_large_batch_from_being_copied_and_mean_the_same(
    make: Callable[..., Recording], postgres_uri: str, copies: Copies
) -> None:
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        stock.setup()
        checkpoint, metadata, new = make_checkpoint(0)
        first = stock.put(config(), {**checkpoint, "channel_values": {"step": ["theirs"]}}, metadata, new)
        stock.put_writes(first, [("step", "theirs")], "task")
    saver = make()
    # The same checkpoint, blob and write once more: the checkpoint is replaced, the others stay as they are.
    saver.put(config(), checkpoint, {**metadata, "source": "fork"}, new)
    saver.put_writes(first, [("step", "ours")], "task")
    put_chain(saver, "t", range(1, MANY), first)
    report = saver.flush()
    assert report
    assert report.checkpoints == MANY
    assert (copies.tried, copies.done) == (1, 0)
    found = stock_tuples(postgres_uri)
    assert len(found) == MANY
    assert found[-1].metadata["source"] == "fork"
    assert found[-1].checkpoint["channel_values"] == {"step": ["theirs"]}
    assert found[-1].pending_writes == [("task", "step", "theirs")]
    put_chain(saver, "u", range(MANY))
    assert saver.flush()
    assert (copies.tried, copies.done) == (2, 1), "the next batch is copied again"
    assert not saver.events


@pytest.fixture
def with_row_security(make: Callable[..., Recording], postgres_uri: str) -> Iterator[str]:
    """An address whose user row-level security concerns: Postgres refuses COPY to such a one."""
    make()
    name = f"role_{uuid4().hex}"
    role = sql.Identifier(name)
    with psycopg.connect(postgres_uri, autocommit=True) as admin:
        for text in (
            "CREATE ROLE {}",
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO {}",
            "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {}",
            "ALTER TABLE checkpoints ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY all_rows ON checkpoints TO {} USING (true) WITH CHECK (true)",
        ):
            admin.execute(sql.SQL(text).format(role))
        yield make_conninfo(postgres_uri, options=f"-c role={name}")
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
        admin.execute(sql.SQL("DROP ROLE {}").format(role))


def test_who_may_not_copy_flushes_all_the_same_and_tries_it_once(
    with_row_security: str, redis_url: str, prefix: str, postgres_uri: str, copies: Copies
) -> None:
    saver: Any = Recording(with_row_security, redis_url, prefix=prefix, hooks=(), triggers=NOTHING)
    with saver:
        for thread in "tu":
            put_chain(saver, thread, range(MANY))
            assert saver.flush()
            assert len(stock_steps(postgres_uri, thread)) == MANY
        assert (copies.tried, copies.done) == (1, 0)
        assert not saver.events


def test_a_connection_that_speaks_no_utf8_does_not_copy(
    make: Callable[..., Recording], postgres_uri: str, redis_url: str, prefix: str, copies: Copies
) -> None:
    make()
    saver: Any = Recording(
        make_conninfo(postgres_uri, client_encoding="LATIN1"), redis_url, prefix=prefix, hooks=(), triggers=NOTHING
    )
    with saver:
        put_chain(saver, "tü", range(MANY), word="ü")
        assert saver.flush()
    assert not copies.tried
    assert [t.checkpoint["channel_values"]["word"] for t in stock_tuples(postgres_uri, "tü")] == ["ü"] * MANY


def test_rows_are_packed_in_pieces_that_do_not_grow_with_their_number() -> None:
    batch = writes.Batch()
    for n in range(1_000):
        batch.add_blob(Address("t", ""), Blob("a", str(n), "bytes", bytes(5_000)))
    pieces = [len(piece) for piece in writes._packed(batch.blobs, is_json=False)]
    assert max(pieces) < 2 * writes._PIECE_BYTES
    assert sum(pieces) > 5_000 * 1_000


def test_many_large_threads_are_drained_in_parts_that_fill_a_batch_together(make: Callable[..., Recording]) -> None:
    """What a flush holds in memory is bounded by the batch, however many threads are large."""
    saver = make(batch_bytes=2_000_000)
    for thread in range(8):
        for step in range(20):
            checkpoint, metadata, new = make_checkpoint(step)
            checkpoint["channel_values"]["step"] = ["x" * 100_000]
            saver.put(config(f"t{thread}"), checkpoint, metadata, new)
    session: Any = saver._core.flusher._session
    drained: list[int] = []
    acknowledge = session._acknowledge

    def looking(found: Any, *args: Any) -> None:
        drained.append(sum(len(payload) for each in found.values() for _, payload in each.raw))
        acknowledge(found, *args)

    session._acknowledge = looking
    assert saver.flush()
    assert len(drained) > 1
    assert max(drained) < 2 * 2_000_000


def test_a_thread_that_is_flushed_whole_is_read_from_redis_with_its_cache_going_to_expire(
    make: Callable[..., Recording],
) -> None:
    saver = make()
    last = put_chain(saver, "t", range(1), word=["x"])
    saver.put_writes(last, [("word", "ü")], "task")
    keys = saver._core.commands.layout.thread("t")
    client: Any = saver._core.redis.client()
    assert saver.flush()
    assert client.exists(keys.dirty, keys.order) == 0
    assert client.hlen(keys.clean) == 4, "a checkpoint, two blobs, a write"
    assert client.ttl(keys.clean) > 0
    assert int(client.hget(keys.state, "bytes")) == 0
    assert saver.get_tuple(config()).pending_writes == [("task", "word", "ü")]  # type: ignore[union-attr]
    # The next one finds a cache that is there already, with the channel that has not changed.
    put_chain(saver, "t", range(1, 2), last, word=["x"])
    assert client.ttl(keys.dirty) == -1
    assert saver.flush()
    assert client.exists(keys.dirty, keys.order) == 0
    assert client.hlen(keys.clean) == 3, "a checkpoint, two blobs"
    assert int(client.hget(keys.state, "bytes")) == 0
    assert saver.get_tuple(config()).metadata["step"] == 1  # type: ignore[union-attr]
