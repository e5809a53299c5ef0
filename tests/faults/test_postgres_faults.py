"""Postgres dies, shuts down, refuses or loses races: what is buffered waits for it, and arrives once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from bench import Bench
from fault_graph import config_of, turn
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import FlushIncompleteError, TierUnavailableError, embedded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench import BenchSaver


def told_of_failed_flush(saver: BenchSaver) -> None:
    """Check that the thread's user and the operators were told, once for each outage."""
    assert saver.hooks.flush(5)
    failed = saver.named("flush.failed", thread_id="t", error_type="checkpoint_flush_error")
    assert failed
    assert all((e.severity, e.outcome, e.user_notice) == ("critical", "retrying", True) for e in failed)
    assert failed[0].checkpoint_count is not None
    down = saver.named("backend.down", error_type="postgres_connection_error")
    assert down


def kill(server: embedded.PostgresServer) -> None:
    server.kill()


def shut_down_at_once(server: embedded.PostgresServer) -> None:
    assert server.pid
    os.kill(server.pid, signal.SIGQUIT)
    wait_until(lambda: not server.is_alive())


@pytest.mark.parametrize("end", [kill, shut_down_at_once])
def test_postgres_ended_again_and_again_under_load_gets_everything_in_the_end(
    own_bench: Bench, own_servers: embedded.Servers, end: Any
) -> None:
    saver = own_bench.saver()

    def ends() -> None:
        for number in range(1, 4):
            told = len(saver.named("flush.failed"))
            own_bench.wait_for_puts()
            end(own_servers.postgres)
            # Something is put while it is away, for which a flush is tried.
            wait_until(lambda: len(saver.named("flush.failed")) > told)  # noqa: B023 - called at once
            own_servers.postgres.start()
            wait_until(lambda: len(saver.named("backend.up")) >= number)  # noqa: B023 - called at once
            wait_until(lambda: len(saver.named("flush.recovered")) == len(saver.named("flush.failed")))

    own_bench.under_load(saver, ends)
    own_bench.recovered(saver)
    told_of_failed_flush(saver)
    # On a loaded machine a connection may come too late once more.
    wait_until(lambda: len(saver.named("backend.down")) == len(saver.named("backend.up")) >= 3)
    own_bench.audit()


def test_with_no_connection_to_be_had_puts_go_on_and_the_flush_waits(tmp_path: Path) -> None:
    settings = {"max_connections": "10", "superuser_reserved_connections": "0"}
    with embedded.servers(postgres_settings=settings) as servers, ExitStack() as stack:
        bench = Bench(servers.postgres_uri, servers.redis_url, "checkpointer", tmp_path)
        stack.callback(bench.close)
        saver = bench.saver()
        turn(saver, "warm")
        bench.recovered(saver)

        with ExitStack() as hogs:

            def hog() -> None:
                # The saver's own connections end, and others take their places, all of them.
                held: list[psycopg.Connection[Any]] = []
                while not held or count(held[0]) > len(held):
                    bench.postgres.cut()
                    with contextlib.suppress(psycopg.OperationalError):
                        while True:
                            conn = psycopg.connect(servers.postgres_uri, autocommit=True)
                            held.append(hogs.enter_context(conn))

            def count(conn: psycopg.Connection[Any]) -> int:
                row = conn.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
                return int(row.fetchone()[0])  # type: ignore[index]  # a count has a row

            turn(saver, "t", hog)
            wait_until(lambda: saver.named("flush.failed", thread_id="t"))
            report = saver.flush("t")
            assert not report
            assert report.error is not None
            assert any("too many clients" in cause for cause in report.error.causes), report.error.causes
            assert saver.get_tuple(config_of("t"))
            with pytest.raises(TierUnavailableError):
                list(saver.list(config_of("t")))
        bench.recovered(saver)
        told_of_failed_flush(saver)
        bench.audit()


@contextmanager
def statement_timeout(bench: Bench) -> Iterator[str]:
    with psycopg.connect(bench.postgres_uri, autocommit=True) as admin, psycopg.connect(bench.postgres_uri) as other:
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET statement_timeout = '200ms'")
        # Every statement on it waits until its time is over.
        other.execute("LOCK TABLE checkpoint_writes IN ACCESS EXCLUSIVE MODE")
        try:
            bench.postgres.cut()  # the setting is for new connections
            yield "statement timeout"
        finally:
            admin.execute(f"ALTER DATABASE {admin.info.dbname} RESET statement_timeout")


@contextmanager
def disk_full(bench: Bench) -> Iterator[str]:
    # A full disk cannot be had everywhere; this is how a statement meets it.
    with psycopg.connect(bench.postgres_uri, autocommit=True) as admin:
        admin.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$"
        )
        admin.execute("CREATE TRIGGER full_disk BEFORE INSERT ON checkpoint_writes EXECUTE FUNCTION full_disk()")
        try:
            yield "No space left"
        finally:
            admin.execute("DROP TRIGGER full_disk ON checkpoint_writes")


@pytest.mark.parametrize("refused", [statement_timeout, disk_full])
def test_a_flush_that_postgres_refuses_for_now_is_tried_again_until_it_succeeds(bench: Bench, refused: Any) -> None:
    saver = bench.saver()
    turn(saver, "t")
    bench.recovered(saver)
    latest = saver.get_tuple(config_of("t"))
    assert latest
    with refused(bench) as message:
        saver.put_writes(latest.config, [("xs", ["w"])], "task-of-the-test")
        # One that waits for locks: the flush in the background leaves the thread for later without a word.
        report = saver.flush("t")
        wait_until(lambda: saver.named("flush.failed", thread_id="t"))
        assert not report
        assert report.waiting
        assert report.error is not None
        assert any(message in cause for cause in (report.error.message, *report.error.causes)), report.error.causes
    bench.recovered(saver)
    told_of_failed_flush(saver)
    assert saver.named("flush.recovered", thread_id="t")
    bench.audit()


def test_where_serializable_is_the_default_concurrent_writers_lose_nothing(bench: Bench) -> None:
    with psycopg.connect(bench.postgres_uri, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET default_transaction_isolation = 'serializable'")
    savers = [bench.saver(flush_size=5, flush_age=0.01, postgres_timeout=30.0) for _ in range(2)]
    trouble: list[BaseException] = []

    def ours(saver: BenchSaver, number: int) -> None:
        try:
            for i in range(6):
                thread = f"{number}-{i % 2}"
                turn(saver, thread)
                if i % 3 == 2:
                    list(saver.list(config_of(thread)))
                    saver.prune([thread])
                if i % 4 == 3:
                    saver.delete_thread(thread)
        except FlushIncompleteError:
            pass  # a lost race; what was not changed is checked by the audit
        except BaseException as exc:  # noqa: BLE001 - the test fails for it
            trouble.append(exc)

    def stock() -> None:
        # It does not repeat what loses a race.
        with contextlib.suppress(psycopg.Error), PostgresSaver.from_conn_string(bench.postgres_uri) as saver:
            for _ in range(4):
                turn(saver, "stock")

    workers = [threading.Thread(target=ours, args=pair) for pair in zip(savers * 2, range(4), strict=True)]
    workers.append(threading.Thread(target=stock))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not trouble, [(one, one.__cause__) for one in trouble]
    for saver in savers:
        bench.recovered(saver)
    with psycopg.connect(bench.postgres_uri, autocommit=True) as admin:
        admin.execute("SET default_transaction_isolation = 'read committed'")
        for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
            admin.execute(f"DELETE FROM {table} WHERE thread_id = 'stock'")
    bench.audit()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_more_callers_than_a_slow_postgres_can_answer_in_time_are_no_outage(bench: Bench, asynchronous: bool) -> None:
    saver = bench.saver(triggers=frozenset(), pool_size=2, postgres_timeout=0.5)
    assert saver.get_tuple(config_of("t")) is None
    bench.postgres.reply_delay = 0.1
    many = 24  # the last of them waits for twice as long as a connection is waited for

    async def read_all() -> list[Any]:
        found = await asyncio.gather(*(saver.aget_tuple(config_of(f"t{n}")) for n in range(many)))
        await saver._core._aclose_loop()
        return found

    if asynchronous:
        assert asyncio.run(read_all()) == [None] * many
    else:
        with ThreadPoolExecutor(many) as threads:
            assert list(threads.map(lambda n: saver.get_tuple(config_of(f"t{n}")), range(many))) == [None] * many
    bench.postgres.reply_delay = 0.0
    assert not saver.named("backend.down")


_RACES = """
CREATE SEQUENCE races;
CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('races') <= 3 THEN
        RAISE EXCEPTION 'could not serialize access' USING ERRCODE = '40001';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER lose BEFORE INSERT ON checkpoint_buffer_threads FOR EACH ROW EXECUTE FUNCTION lose();
"""


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
async def test_a_read_that_loses_a_race_in_postgres_is_repeated_and_no_outage(bench: Bench, asynchronous: bool) -> None:
    saver = bench.saver(triggers=frozenset(), pool_size=1)
    with psycopg.connect(bench.postgres_uri, autocommit=True) as admin:
        admin.execute(_RACES)
        of_a_run: Any = {"configurable": {**config_of("t")["configurable"], "__pregel_runtime": None}}
        assert (await saver.aget_tuple(of_a_run) if asynchronous else saver.get_tuple(of_a_run)) is None
        assert admin.execute("SELECT last_value FROM races").fetchone() == (4,)
    assert saver.hooks.flush(5)
    assert "backend.down" not in [event.name for event in saver.events]
    if asynchronous:
        await saver.aclose()
