"""A table is followed without losing a row, whenever its transaction commits."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from command_line import NOON, plant_error, plant_line
from helpers import await_until, wait_until

import observability
from checkpointer.errors import ClosedError
from checkpointer.hooks import HookContext
from checkpointer.store import schema
from observability import Observability
from observability.errors.reading import Filters
from observability.errors.statements import run
from observability.following import Follower, Following, errors_source, log_source
from observability.links import PostgresLink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointer import embedded

Connection = psycopg.Connection[Any]

LATE = 10.0


@pytest.fixture
def store(conn: Connection) -> Connection:
    schema.setup(conn)
    return conn


@pytest.fixture
def writers(postgres_uri: str, store: Connection) -> Iterator[list[Connection]]:
    """Connections whose transactions stay open until they are told to commit."""
    found = [psycopg.connect(postgres_uri) for _ in range(3)]
    yield found
    for writer in found:
        writer.close()


def looked(conn: Connection, following: Following, now: float) -> list[str]:
    """Look once, at a time, and return the messages found."""
    return [row["message"] for row in following.take(run(conn, following.look()), now)]


# -- the core --------------------------------------------------------------------------------------------------------


def test_it_begins_with_the_last_lines_in_the_order_of_their_times(store: Connection) -> None:
    for second, message in enumerate("abcde"):
        plant_line(store, "t", message, created_at=NOON.replace(second=30 - second))
    plant_line(store, "other", "x")
    assert looked(store, Following(log_source("t"), 3), 0) == ["e", "d", "c"]
    assert looked(store, Following(log_source("t"), 0), 0) == []
    following = Following(log_source("t"), 9)
    assert looked(store, following, 0) == ["e", "d", "c", "b", "a"]
    plant_line(store, "t", "f")
    plant_line(store, "other", "y")
    assert looked(store, following, 1) == ["f"]
    assert looked(store, following, 2) == []


def test_a_line_that_commits_long_after_later_ones_is_delivered_once(
    store: Connection, writers: list[Connection]
) -> None:
    following = Following(log_source("t"), 10)
    assert looked(store, following, 0) == []
    plant_line(writers[0], "t", "early")
    plant_line(store, "t", "late")
    assert looked(store, following, 1) == ["late"]
    # Hours pass, and others write, while the first transaction is open.
    for hour in range(1, 5):
        plant_line(store, "t", f"{hour}")
        assert looked(store, following, hour * 3_600) == [f"{hour}"]
    writers[0].commit()
    assert looked(store, following, 20_000) == ["early"]
    assert looked(store, following, 40_000) == []


def test_a_line_from_before_the_start_that_commits_after_it_is_delivered(
    store: Connection, writers: list[Connection]
) -> None:
    plant_line(writers[0], "t", "early")
    plant_line(store, "t", "late")
    following = Following(log_source("t"), 0)
    assert looked(store, following, 0) == []
    assert looked(store, following, 1_000) == []
    writers[0].commit()
    assert looked(store, following, 2_000) == ["early"]


def test_an_id_that_was_taken_before_its_transaction_had_a_number_is_waited_for(
    store: Connection, writers: list[Connection]
) -> None:
    # Of 32 ids only the first is logged, and makes the transaction get a number.
    plant_line(store, "t", "first")
    following = Following(log_source("t"), 0)
    looked(store, following, 0)
    row = writers[0].execute("SELECT nextval('thread_logs_id_seq'), txid_current_if_assigned()").fetchone()
    assert row is not None
    assert row[1] is None, "the transaction has no number yet"
    plant_line(store, "t", "late")
    assert looked(store, following, 100) == ["late"]
    assert looked(store, following, 100 + LATE - 1) == []
    plant_line(writers[0], "t", "early", id=row[0])
    writers[0].commit()
    assert looked(store, following, 100 + LATE - 0.5) == ["early"]


def test_what_can_no_longer_be_overtaken_is_forgotten(store: Connection) -> None:
    following = Following(log_source("t"), 0)
    looked(store, following, 0)
    last = [plant_line(store, "t", "line") for _ in range(20)][-1]
    assert len(looked(store, following, 1)) == 20
    assert len(following.look().params["seen"]) == 20
    for now in (5, 20):
        assert looked(store, following, now) == []
    assert following.look().params["floor"] == last
    assert following.look().params["seen"] == []
    plant_line(store, "t", "more")
    assert looked(store, following, 20_000) == ["more"]


def test_many_lines_at_once_come_whole_and_in_order(store: Connection) -> None:
    following = Following(log_source("t"), 5)
    looked(store, following, 0)
    store.execute(
        "INSERT INTO thread_logs (thread_id, level, message, created_at) "
        "SELECT 't', 'info', n::text, %s + n * interval '1 second' FROM generate_series(1, 1200) AS n",
        (NOON,),
    )
    found = looked(store, following, 100)
    assert following.pause == 0
    while following.pause == 0:
        found += looked(store, following, 200)
    assert found == [str(n) for n in range(1, 1_201)]


def test_a_transaction_that_ends_while_it_is_looked_is_seen_by_the_next_look(
    store: Connection, writers: list[Connection]
) -> None:
    following = Following(log_source("t"), 0)
    looked(store, following, 0)
    plant_line(writers[0], "t", "early")
    plant_line(store, "t", "late")
    assert looked(store, following, 1) == ["late"]
    seen = run(store, following.look())
    writers[0].commit()
    # It had not committed for the snapshot of this look, and held no lock any more when it was asked who does.
    assert following.take(dataclasses.replace(seen, writers=frozenset()), 1_000) == []
    assert looked(store, following, 2_000) == ["early"]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_order_of_commits_each_line_is_delivered_exactly_once(
    store: Connection, writers: list[Connection], seed: int
) -> None:
    choose = random.Random(seed)
    following = Following(log_source("t"), 0)
    looked(store, following, 0)
    written: list[str] = []
    found: list[str] = []
    now = 0.0
    for number in range(60):
        writer = choose.choice(writers)
        act = choose.random()
        if act < 0.5:
            plant_line(writer, "t", str(number))
            written.append(str(number))
        elif act < 0.7:
            writer.commit()
        else:
            now += choose.choice([0.5, LATE, 3_600])
            found += looked(store, following, now)
    for writer in writers:
        writer.commit()
    found += looked(store, following, now + 1)
    assert sorted(found) == sorted(written)


def test_errors_are_followed_by_what_they_are(store: Connection) -> None:
    following = Following(errors_source(Filters(state="all", severities=("critical",), thread_id="t")), 10)
    plant_error(store, severity="critical", thread_id="t", resolved_at=NOON, error_message="resolved")
    assert [row["error_message"] for row in following.take(run(store, following.look()), 0)] == ["resolved"]
    plant_error(store, severity="error", thread_id="t")
    plant_error(store, severity="critical", thread_id="other")
    number = plant_error(store, severity="critical", thread_id="t")
    store.execute("UPDATE system_errors SET created_at = NULL WHERE id = %s", (number,))
    (row,) = following.take(run(store, following.look()), 1)
    assert (row["id"], row["created_at"]) == (number, None)


def test_a_look_uses_the_index_of_the_thread(store: Connection) -> None:
    store.execute(
        "INSERT INTO thread_logs (thread_id, level, message) "
        "SELECT 't' || n % 500, 'info', 'm' FROM generate_series(1, 20000) AS n"
    )
    store.execute("ANALYZE thread_logs")
    following = Following(log_source("t7"), 10)
    for _ in range(2):
        statement = following.look()
        rows = store.execute(b"EXPLAIN " + statement.sql.encode(), statement.params).fetchall()
        plan = "\n".join(row[0] for row in rows)
        assert "idx_thread_logs_thread_id" in plan, plan
        following.take(run(store, statement), 0)


# -- the runners -----------------------------------------------------------------------------------------------------


def test_a_thread_is_followed_until_it_is_closed(target: Observability) -> None:
    observability.emit_log("one", thread_id="a\0b", level="info", observability=target)
    assert target.flush()
    found: list[dict[str, Any]] = []
    follower = observability.follow_thread_log("a\0b", observability=target)

    def read() -> None:
        with follower as lines:
            found.extend(lines)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(found) == 1)
    observability.emit_log("two", thread_id="a\0b", level="error", observability=target)
    observability.emit_log("not this", thread_id="a", level="info", observability=target)
    wait_until(lambda: len(found) == 2)
    follower.close()
    follower.close()
    reader.join(10)
    assert not reader.is_alive()
    assert [(line["message"], line["level"]) for line in found] == [("one", "info"), ("two", "error")]
    assert found == observability.read_thread_log("a\0b", observability=target)
    with pytest.raises(ClosedError), follower:
        pass


async def test_an_event_loop_follows_without_being_blocked(target: Observability) -> None:
    found: list[str] = []
    follower = observability.afollow_thread_log("t", lines=1, observability=target)

    async def read() -> None:
        async with follower:
            async for line in follower:
                found.append(line["message"])

    for message in ("one", "two"):
        observability.emit_log(message, thread_id="t", observability=target)
    assert target.flush()
    reader = asyncio.create_task(read())
    await await_until(lambda: found == ["two"])
    observability.emit_log("three", thread_id="t", observability=target)
    await await_until(lambda: found == ["two", "three"])
    await follower.aclose()
    await follower.aclose()
    await asyncio.wait_for(reader, 10)
    with pytest.raises(ClosedError):
        async with follower:
            pass


async def test_who_is_cancelled_loses_no_line(target: Observability) -> None:
    follower = observability.afollow_thread_log("t", observability=target)
    found: list[str] = []
    number = 0
    while len(found) < 20:
        observability.emit_log(str(number), thread_id="t", observability=target)
        number += 1
        try:
            async with asyncio.timeout(0.01):
                async for line in follower:
                    found.append(line["message"])
        except TimeoutError:
            continue
    await follower.aclose()
    assert found == [str(n) for n in range(len(found))]


def test_it_goes_on_after_an_outage_with_what_came_meanwhile(
    own_servers: embedded.Servers, own_context: HookContext, own_target: Observability
) -> None:
    uri = own_servers.postgres_uri
    with psycopg.connect(uri, autocommit=True) as conn:
        plant_line(conn, "t", "before")
    found: list[str] = []
    follower = observability.follow_thread_log("t", observability=own_target)
    reader = threading.Thread(target=lambda: found.extend(line["message"] for line in follower))
    reader.start()
    wait_until(lambda: found == ["before"])
    own_servers.postgres.stop()
    # It waits in Redis until Postgres is back.
    observability.emit_log("during", thread_id="t", observability=own_target)
    assert own_target.flush(30)
    own_servers.postgres.start()
    with psycopg.connect(uri, autocommit=True) as conn:
        plant_line(conn, "t", "after")
    wait_until(lambda: sorted(found) == ["after", "before", "during"])
    follower.close()
    reader.join(10)
    assert not reader.is_alive()


def test_a_follower_waits_for_a_table_that_is_not_there_yet(
    postgres_uri: str, redis_url: str, prefix: str, conn: Connection
) -> None:
    def no_redis() -> Any:
        raise ConnectionError

    link = PostgresLink(HookContext(lambda: psycopg.connect(postgres_uri, autocommit=True), no_redis, prefix, prefix))
    follower = Follower(Following(log_source("t"), 10), link, lambda row: row)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(follower))
    reader.start()
    schema.setup(conn)
    plant_line(conn, "t", "first")
    wait_until(lambda: [row["message"] for row in found] == ["first"])
    follower.close()
    reader.join(10)
    link.close()
