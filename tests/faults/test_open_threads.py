"""While Redis is away, Postgres alone answers for every thread of which the buffer has nothing, and for no other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.types import Send
from savers import (
    NOTHING,
    config,
    graph,
    is_open,
    make_checkpoint,
    put,
    put_chain,
    reachable,
    stock_steps,
    stock_tuples,
)

from checkpointer import BufferUnavailableError, StoreUnavailableError, puts
from checkpointer.flush.session import Progress
from checkpointer.run_streams import RUNTIME

if TYPE_CHECKING:
    from checkpointer.embedded import Servers


def test_a_thread_whose_run_has_ended_is_closed_and_read_while_redis_is_away(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, other = open_saver(), open_saver(triggers=NOTHING)
    graph(saver, lambda: None).invoke({"xs": []}, config("done"))
    wait_until(lambda: not is_open(own_servers.postgres_uri, "done"))
    put(other, "open", 0)
    checkpoint, metadata, versions = make_checkpoint(0)
    other.put(config("open", checkpoint_ns="sub:put"), checkpoint, metadata, versions)
    assert is_open(own_servers.postgres_uri, "open")
    own_servers.valkey.kill()
    for reader in (saver, other):
        assert reader.get_tuple(config("done")).checkpoint["channel_values"]["xs"] == [0]
        assert [t.metadata["step"] for t in reader.list(config("done"))] == [1, 0, -1]
        assert reader.get_tuple(config("never seen")) is None
        with pytest.raises(BufferUnavailableError, match="may hold checkpoints of thread 'open'"):
            reader.get_tuple(config("open"))
        with pytest.raises(BufferUnavailableError):
            list(reader.list(config("open")))
        with pytest.raises(BufferUnavailableError, match="checkpoints of threads"):
            list(reader.list(None))
        with pytest.raises(BufferUnavailableError):
            reader.get_tuple(config("open", checkpoint_ns="sub:put"))
    # Only the process that runs the thread knows that nothing of a subgraph's call is buffered.
    assert other.get_tuple(config("open", checkpoint_ns="sub:not put")) is None
    with pytest.raises(BufferUnavailableError):
        saver.get_tuple(config("open", checkpoint_ns="sub:not put"))


def test_a_checkpoint_of_an_old_version_is_read_with_its_parents_sends_while_redis_is_away(
    open_saver: Any, own_servers: Servers
) -> None:
    saver = open_saver(triggers=NOTHING)
    with PostgresSaver.from_conn_string(own_servers.postgres_uri) as stock:
        parent, child = make_checkpoint(0), make_checkpoint(1)
        saved = stock.put(config("old"), {**parent[0], "v": 3}, *parent[1:])
        stock.put_writes(saved, [("__pregel_tasks", Send("node", 1))], "task")
        stock.put(saved, {**child[0], "v": 3}, *child[1:])
        own_servers.valkey.kill()
        found = saver.get_tuple(config("old"))
        assert found == stock.get_tuple(config("old"))
    assert found.checkpoint["channel_values"]["__pregel_tasks"] == [Send("node", 1)]


async def test_the_same_for_asynchronous_readers(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver()
    await graph(saver, lambda: None).ainvoke({"xs": []}, config("done"))
    wait_until(lambda: not is_open(own_servers.postgres_uri, "done"))
    put(saver, "open", 0)
    own_servers.valkey.kill()
    assert (await saver.aget_tuple(config("done"))).checkpoint["channel_values"]["xs"] == [0]
    with pytest.raises(BufferUnavailableError):
        await saver.aget_tuple(config("open"))
    await saver.aclose()


def test_a_flushed_thread_stays_open_while_its_run_goes_on(open_saver: Any, own_servers: Servers) -> None:
    """Otherwise each step that takes longer than the flush would have to open the thread again."""
    saver = open_saver()
    seen = []

    def flush_and_look() -> None:
        saver.flush()
        seen.append(is_open(own_servers.postgres_uri))

    graph(saver, flush_and_look, flush_and_look).invoke({"xs": []}, config(), durability="sync")
    assert seen == [True, True]


def test_closing_does_not_undo_a_later_opening(open_saver: Any, own_servers: Servers) -> None:
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put(saver, "t", 0)
    saver.flush()
    session = saver._core.flusher._session
    close = session.pipeline

    def opened_meanwhile(calls: Any) -> Any:
        replies = close(calls)
        put(other, "t", 1, parent)  # after Redis has forgotten that the thread is open, before Postgres has
        return replies

    session.pipeline = opened_meanwhile
    with psycopg.connect(own_servers.postgres_uri) as conn:
        row = conn.execute("SELECT token FROM checkpoint_buffer_threads").fetchone()
    assert row is not None
    session.close_threads({"t": row[0]})
    session.pipeline = close
    assert is_open(own_servers.postgres_uri)
    own_servers.valkey.kill()
    with pytest.raises(BufferUnavailableError):
        saver.get_tuple(config())


def test_a_runs_first_read_opens_what_is_closed_and_leaves_alone_what_is_open(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, reader = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    put(saver, "t", 0)
    before = tokens(own_servers)
    assert reader.get_tuple(in_a_run("t")).metadata["step"] == 0
    assert tokens(own_servers) == before
    assert reader.get_tuple(in_a_run("new")) is None
    assert tokens(own_servers).keys() == {"t", "new"}


def test_a_thread_that_is_flushed_and_closed_while_a_read_opens_it_is_read_anew(
    open_saver: Any, own_servers: Servers
) -> None:
    """What the statement has read is from before it opened the thread."""
    saver, reader = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put(saver, "t", 0)
    saver.flush()
    put(saver, "t", 1, parent)
    reader.get_tuple(in_a_run("another"))
    found: list[Any] = []
    reading = threading.Thread(target=lambda: found.append(reader.get_tuple(in_a_run("t"))))
    with psycopg.connect(own_servers.postgres_uri) as conn, psycopg.connect(own_servers.postgres_uri) as looking:
        conn.execute("DELETE FROM checkpoint_buffer_threads WHERE thread_id = 't'")
        reading.start()
        looking.autocommit = True
        wait_until(lambda: looking.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchone())
        saver.flush()
    reading.join(20)
    assert [tuple_.metadata["step"] for tuple_ in found] == [1]
    assert tokens(own_servers).keys() == {"another", "t"}


def in_a_run(thread: str) -> Any:
    return config(thread, **{RUNTIME: None})


def tokens(servers: Servers) -> dict[str, int]:
    with psycopg.connect(servers.postgres_uri) as conn:
        return dict(conn.execute("SELECT thread_id, token FROM checkpoint_buffer_threads").fetchall())


def test_a_thread_with_dirty_records_is_not_closed(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    put(saver, "t", 0)
    put(saver, "flushed", 0)
    saver.flush("flushed")
    opened_long_ago(own_servers)
    saver._core.flusher._session.close_idle()
    assert is_open(own_servers.postgres_uri)
    assert not is_open(own_servers.postgres_uri, "flushed")
    saver.flush()
    saver._core.flusher._session.close_idle()
    assert not is_open(own_servers.postgres_uri)
    put(saver, "t", 1)
    assert is_open(own_servers.postgres_uri)


def opened_long_ago(servers: Servers) -> None:
    with psycopg.connect(servers.postgres_uri) as conn:
        conn.execute("UPDATE checkpoint_buffer_threads SET opened_at = now() - interval '1 hour'")


def test_an_idle_thread_is_closed_without_a_runs_end(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=frozenset({"age"}), flush_age=0.1)
    put(saver, "t", 0)
    wait_until(lambda: stock_steps(own_servers.postgres_uri))
    assert is_open(own_servers.postgres_uri)
    opened_long_ago(own_servers)
    saver._core.flusher._next_sweep = 0.0
    wait_until(lambda: not is_open(own_servers.postgres_uri))


def test_an_opening_that_a_read_made_long_ago_is_not_relied_on(
    open_saver: Any, own_servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puts, "_OPENING_SECONDS", 0.0)
    saver = open_saver(triggers=NOTHING)
    saver.get_tuple(config(__pregel_runtime=None))
    assert is_open(own_servers.postgres_uri)
    opened_long_ago(own_servers)
    saver._core.flusher.submit(lambda session: session.close_idle()).result()
    assert not is_open(own_servers.postgres_uri)
    put(saver, "t", 0)
    assert is_open(own_servers.postgres_uri)


def test_a_put_while_postgres_cannot_be_told_is_taken_and_told_later(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put(saver, "t", 0)
    saver.flush()
    opened_long_ago(own_servers)
    saver._core.flusher._session.close_idle()
    own_servers.postgres.kill()
    parent = put_chain(saver, "t", range(1, 4), parent)
    assert saver.get_tuple(config()).metadata["step"] == 3
    own_servers.valkey.kill()
    with pytest.raises((BufferUnavailableError, StoreUnavailableError)):
        saver.get_tuple(config())
    own_servers.postgres.start()
    with pytest.raises(BufferUnavailableError):  # this process knows that it owes something
        wait_until(lambda: saver.get_tuple(config()) is None)
    own_servers.valkey.start()
    assert wait_until(saver.flush, timeout=30)
    assert stock_steps(own_servers.postgres_uri) == [3, 2, 1, 0]
    put(saver, "t", 4, parent)
    assert is_open(own_servers.postgres_uri)


def abandon(servers: Servers, *more: str) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("checkpointer")), "buffer", "abandon", *more],
        env={"POSTGRES_URI": servers.postgres_uri, "REDIS_URL": servers.redis_url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_an_operator_can_give_up_a_redis_that_is_gone_for_good(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(2))
    saver.flush()
    put(saver, "t", 2, parent)
    own_servers.valkey.kill()
    fresh = open_saver_without_redis(own_servers)
    with pytest.raises(BufferUnavailableError, match="buffer abandon"):
        fresh.get_tuple(config())
    assert abandon(own_servers).splitlines() == [
        "t",
        "1 threads are open. What only Redis has of them is lost with --yes.",
    ]
    with pytest.raises(BufferUnavailableError):
        fresh.get_tuple(config())
    assert abandon(own_servers, "--yes").splitlines() == ["t", "1 threads were given up."]
    assert fresh.get_tuple(config()).metadata["step"] == 1
    with psycopg.connect(own_servers.postgres_uri) as conn:
        rows = conn.execute("SELECT error_type, severity, thread_id FROM system_errors").fetchall()
        logged = conn.execute("SELECT count(*) FROM thread_logs WHERE thread_id = 't'").fetchone()
    assert rows == [("checkpoint_lost", "critical", "t")]
    assert logged == (1,)
    # It comes back nevertheless: what it has is saved, and replaces nothing.
    own_servers.valkey.start()
    put(fresh, "t", 2, parent)
    assert wait_until(fresh.flush, timeout=30)
    assert stock_steps(own_servers.postgres_uri) == [2, 2, 1, 0]
    fresh.close()


def open_saver_without_redis(servers: Servers) -> Any:
    from savers import Recording

    return Recording(servers.postgres_uri, servers.redis_url, hooks=(), redis_timeout=1.0, triggers=NOTHING)


def test_a_put_around_redis_has_the_channels_that_did_not_change(open_saver: Any, own_servers: Servers) -> None:
    saver = open_saver(triggers=NOTHING)
    parent = put_chain(saver, "t", range(2), big=["x"])
    own_servers.valkey.kill()
    put(saver, "t", 2, parent, big=["x"])
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert stored.checkpoint["channel_values"] == {"step": [2], "big": ["x"]}


class Revisions:
    """Puts one checkpoint, and one control write if wanted, again and again, as revisions."""

    def __init__(self, *, writes: bool = True) -> None:
        self._put = make_checkpoint(0)
        self._writes = writes

    def save(self, saver: Any, revision: str) -> None:
        checkpoint, metadata, new = self._put
        at = saver.put(config(), checkpoint, {**metadata, "revision": revision}, new)
        if self._writes:
            saver.put_writes(at, [("__resume__", revision)], "task")

    def are(self, found: Any, revision: str) -> bool:
        writes = [value for _, _, value in found.pending_writes]
        return (found.metadata["revision"], writes) == (revision, [revision] * self._writes)


@pytest.mark.parametrize("then", ["read", "read a checkpoint", "put", "put after a hiccup"])
def test_what_redis_had_when_something_went_around_it_replaces_nothing_newer(
    open_saver: Any, own_servers: Servers, then: str
) -> None:
    saver, revisions = open_saver(triggers=NOTHING), Revisions(writes=then != "read a checkpoint")
    revisions.save(saver, "old")
    own_servers.valkey.kill()
    revisions.save(saver, "new")
    own_servers.valkey.start()
    wait_until(lambda: reachable(saver))
    if then == "put after a hiccup":
        tier = saver._core.redis_tier
        tier.failed(ConnectionError("a call that had waited for long"))
        # The next call may try; that it succeeds does not make what Redis has any newer.
        wait_until(lambda: time.monotonic() >= tier._down[None].probe_at)
    elif then != "put":
        assert revisions.are(wait_until(lambda: _answer(saver)), "new")
    revisions.save(saver, "newest")
    assert wait_until(saver.flush)
    assert revisions.are(saver.get_tuple(config()), "newest")
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert revisions.are(stored, "newest")
    with psycopg.connect(own_servers.postgres_uri) as conn:
        row = conn.execute("SELECT count(*) FROM checkpoint_buffer_threads WHERE replay").fetchone()
    assert row == (0,)


def test_a_head_that_was_passed_by_is_forgotten_even_if_the_process_that_did_it_has_died(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, other = open_saver(triggers=NOTHING), open_saver(triggers=NOTHING)
    parent = put(saver, "t", 0)
    saver.flush()
    own_servers.valkey.kill()
    put(saver, "t", 1, parent)
    own_servers.valkey.start()
    clean = other._core.commands.layout.thread("t").clean
    assert wait_until(lambda: _exists(other, clean))
    other._core.flusher._session.flush(other._core.flusher._session.passed_by(), None, Progress())
    assert not _exists(other, clean)
    assert other._core.flusher._session.passed_by() == []
    own_servers.postgres.kill()
    with pytest.raises(StoreUnavailableError):
        other.get_tuple(config())


def _answer(saver: Any) -> Any:
    try:
        return saver.get_tuple(config())
    except BufferUnavailableError:
        return None  # it is on its way back


def _exists(saver: Any, key: bytes) -> Any:
    try:
        return saver._core.redis.client().exists(key)
    except redis.RedisError:
        return None


def test_what_is_put_before_all_from_before_the_outage_is_flushed_is_not_taken_for_older(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, revisions = open_saver(triggers=NOTHING), Revisions()
    revisions.save(saver, "old")
    own_servers.valkey.kill()
    revisions.save(saver, "new")
    own_servers.valkey.start()
    wait_until(lambda: reachable(saver))
    session = saver._core.flusher._session
    flush = session.flush

    def fails_once(*args: Any) -> None:
        session.flush = flush
        raise saver._core.redis_tier.unavailable(None)

    session.flush = fails_once
    revisions.save(saver, "newest")
    assert wait_until(saver.flush)
    assert revisions.are(saver.get_tuple(config()), "newest")
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert revisions.are(stored, "newest")


def answers(saver: Any) -> bool:
    try:
        saver._core.flusher.submit(lambda session: session.open_dead_letters()).result()
    except StoreUnavailableError:
        return False
    return True


def test_what_was_put_while_postgres_could_not_be_told_replaces_nothing_newer(
    open_saver: Any, own_servers: Servers
) -> None:
    saver, revisions = open_saver(triggers=NOTHING), Revisions()
    own_servers.postgres.kill()
    revisions.save(saver, "old")
    own_servers.valkey.kill()
    own_servers.postgres.start()
    wait_until(lambda: answers(saver))
    revisions.save(saver, "new")
    own_servers.valkey.start()
    assert wait_until(saver.flush, timeout=30)
    (stored,) = stock_tuples(own_servers.postgres_uri)
    assert revisions.are(stored, "new")
