"""A process is killed at a chosen point of the flush, stopped, cancelled, or lives on with another loop or clock."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import flush_child
import psycopg
import pytest
from audit import Books, key_of
from fault_graph import aturn, build, config_of, turn
from helpers import await_until, wait_until
from langgraph.checkpoint.base.id import uuid6

from checkpointer import BufferUnavailableError
from checkpointer.buffer import scripts

if TYPE_CHECKING:
    from bench import Bench

DRAIN, ACK = scripts.DRAIN.sha.encode(), scripts.ACK.sha.encode()
LOCK, ROWS = b"FOR UPDATE", b"INSERT INTO checkpoints "


def started(bench: Bench, *, asynchronous: bool = False) -> Any:
    """Start a process that runs a graph for ever and flushes often."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flush_child"])
    child = context.Process(
        target=flush_child.run,
        args=(bench.postgres_through, bench.redis_through, bench.prefix, str(bench.log.path), asynchronous),
    )
    child.start()
    return child


# -- killed and stopped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tier", "text", "on"),
    [
        pytest.param("postgres", LOCK, "request", id="before the lock"),
        pytest.param("postgres", LOCK, "reply", id="with the lock"),
        pytest.param("redis", DRAIN, "reply", id="after a drain"),
        pytest.param("postgres", ROWS, "reply", id="after the rows"),
        pytest.param("postgres", b"COMMIT", "request", id="before the commit"),
        pytest.param("postgres", b"COMMIT", "reply", id="after the commit"),
        pytest.param("redis", ACK, "request", id="before the acknowledgement"),
        pytest.param("redis", ACK, "reply", id="after the acknowledgement"),
    ],
)
def test_a_process_killed_at_any_point_of_the_flush_loses_nothing_and_repeats_nothing(
    bench: Bench, tier: str, text: bytes, on: Any
) -> None:
    children: list[Any] = []
    killed = threading.Event()

    def kill() -> None:
        bench.wait_for_puts()  # only this connection waits meanwhile
        children[0].kill()
        children[0].join()
        killed.set()

    def arm() -> None:
        getattr(bench, tier).trap(text, kill, on=on, passing=0)

    if text in (LOCK, ROWS):
        arm()  # before the start: a statement's text is sent once, since it is prepared
        children.append(started(bench))
    else:
        children.append(started(bench))
        bench.wait_for_puts()
        # From the drain on, so that it is the commit of a flush that has something.
        bench.redis.trap(DRAIN, lambda: (bench.wait_for_puts(), arm()))
    try:
        assert killed.wait(30), "the flush never came to this point"
    finally:
        children[0].kill()
        children[0].join()
    saver = bench.saver(triggers=frozenset({"start"}))
    with bench.plain() as other:
        wait_until(lambda: not other._core.flusher.submit(lambda s: s.dirty_threads()).result(), timeout=30)
    saver.hooks.flush(5)
    if on == "request" or text in (LOCK, DRAIN):
        (found,) = wait_until(lambda: saver.named("recovery.found"))
        assert found.checkpoint_count is not None
    bench.audit()


def test_a_process_stopped_in_the_middle_of_a_flush_delays_only_what_it_has_locked(bench: Bench) -> None:
    child = started(bench)
    try:
        bench.wait_for_puts()
        stopped = threading.Event()

        def stop() -> None:
            os.kill(child.pid, signal.SIGSTOP)
            if _is_locked(bench):
                stopped.set()
            else:  # a read drains too, to see if there is anything, and locks nothing
                os.kill(child.pid, signal.SIGCONT)
                bench.redis.trap(DRAIN, stop)

        bench.redis.trap(DRAIN, stop)
        assert stopped.wait(20)
        saver = bench.saver(direct=True, triggers=frozenset())
        report = saver.flush()
        assert not report
        assert report.waiting_threads
        saver.hooks.flush(5)
        assert saver.named("flush.incomplete", severity="warning")
        # Another process goes on, on threads of other partitions as well as with what the stopped one was working on.
        number = next(n for n in range(100) if _partition(saver, f"t{n}") != _partition(saver, flush_child.THREAD))
        turn(saver, f"t{number}")
        assert saver.flush(f"t{number}")
        assert saver.get_tuple(config_of(flush_child.THREAD))
        os.kill(child.pid, signal.SIGCONT)
        wait_until(saver.flush, message="the stopped process has let go")
    finally:
        child.kill()
        child.join()
    bench.audit()


def _is_locked(bench: Bench) -> bool:
    with psycopg.connect(bench.postgres_uri) as conn:
        free = conn.execute(
            "SELECT 1 FROM checkpoint_buffer_partitions WHERE prefix = %s FOR UPDATE SKIP LOCKED", [bench.prefix]
        ).fetchall()
        row = conn.execute(
            "SELECT count(*) FROM checkpoint_buffer_partitions WHERE prefix = %s", [bench.prefix]
        ).fetchone()
    return row is not None and len(free) < row[0]


def _partition(saver: Any, thread: str) -> int:
    found: int = saver._core.commands.layout.partition_of(thread)
    return found


# -- cancelled ----------------------------------------------------------------------------------------------------


async def test_a_put_cancelled_at_a_random_moment_may_be_there_and_the_next_ones_are(bench: Bench) -> None:
    seed = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(2**32)))
    print(f"FAULT_SEED={seed}")
    rng = random.Random(seed)
    saver = await asyncio.to_thread(bench.saver)
    bench.redis.reply_delay = 0.002
    cancelled = 0
    for i in range(60):
        thread = f"t{i % 3}"
        task = asyncio.create_task(build(saver).aupdate_state(config_of(thread), {"xs": [i]}, as_node="ask"))
        bystander = asyncio.create_task(build(saver).aupdate_state(config_of("u"), {"xs": [i]}, as_node="ask"))
        await asyncio.sleep(rng.uniform(0, 0.012))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            cancelled += 1
        await bystander
    bench.redis.reply_delay = 0.0
    assert cancelled > 10, "hardly a put was cancelled: the test shows nothing"
    for i in range(3):
        saved = await build(saver).aupdate_state(config_of(f"t{i}"), {"xs": ["last"]}, as_node="ask")
        found = await saver.aget_tuple(config_of(f"t{i}"))
        assert found
        assert key_of(found.config) == key_of(saved)
    assert not saver.named("backend.down"), "a cancelled call is no outage"
    found = await saver.aget_tuple(config_of("u"))
    assert found
    assert found.checkpoint["channel_values"]["xs"] == list(range(60))
    await saver.aclose()
    await asyncio.to_thread(bench.audit)


# -- another loop, another clock ----------------------------------------------------------------------------------


def test_one_saver_lives_through_several_event_loops_and_blocking_calls_between_them(bench: Bench) -> None:
    saver = bench.saver()
    for _ in range(3):
        asyncio.run(aturn(saver, "t"))
        turn(saver, "t")

    async def broken_off() -> None:
        in_step = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(aturn(saver, "u", lambda: loop.call_soon_threadsafe(in_step.set)))
        await in_step.wait()
        assert not task.done()  # the loop's end cancels it

    asyncio.run(broken_off())
    asyncio.run(aturn(saver, "u"))
    bench.recovered(saver)
    saver.hooks.flush(5)
    assert not saver.named("backend.down")
    bench.audit()


def test_a_clock_that_jumps_back_and_forth_neither_hides_checkpoints_nor_stops_the_flusher(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = bench.saver()
    real, real_ns = time.time, time.time_ns
    for jump in (0, 3600, -3600, -86_400, 7200):
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: real() + jump)  # noqa: B023 - undone before the next
            patched.setattr(time, "time_ns", lambda: real_ns() + jump * 10**9)  # noqa: B023
            turn(saver, "t")
            latest = saver.get_tuple(config_of("t"))
            books = Books()
            books.read(bench.log.lines())
            assert latest
            assert key_of(latest.config)[1:] == max(key for key in books.threads["t"].puts if key[0] == "")
            bench.recovered(saver)
    bench.audit()


# -- several savers -----------------------------------------------------------------------------------------------


def test_two_savers_on_one_thread_at_once_lose_nothing_of_each_other(bench: Bench) -> None:
    savers = [bench.saver(flush_size=7, flush_age=0.01), bench.saver(direct=True)]
    turn(savers[0], "t")
    trouble: list[BaseException] = []

    def work(saver: Any) -> None:
        try:
            for i in range(25):
                before = saver.get_tuple(config_of("t"))
                saved = build(saver).update_state(config_of("t"), {"xs": [i]}, as_node="ask")
                after = saver.get_tuple(config_of("t"))
                assert key_of(before.config) < key_of(saved) <= key_of(after.config)
        except BaseException as exc:  # noqa: BLE001 - the test fails for it
            trouble.append(exc)

    workers = [threading.Thread(target=work, args=(saver,)) for saver in savers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not trouble, trouble
    assert savers[0].get_tuple(config_of("t")) == savers[1].get_tuple(config_of("t"))
    bench.audit()


def test_while_one_process_is_cut_off_from_redis_no_read_of_either_goes_back(bench: Bench) -> None:
    near, far = bench.saver(direct=True), bench.saver(redis_timeout=0.3)
    turn(near, "t")
    latest = near.get_tuple(config_of("t"))
    assert latest

    bench.redis.refuse()
    # The far one has read the thread before, as at the begin of a run, and learns of the cut at its put.
    checkpoint = {**latest.checkpoint, "id": str(uuid6())}
    saved = far.put(latest.config, checkpoint, {**latest.metadata, "step": 99}, {})
    seen = near.get_tuple(config_of("t"))
    assert seen
    assert key_of(seen.config) == key_of(saved), "Redis' older head was answered"
    # The far one may answer only if the thread was closed meanwhile, since the near one's run has ended.
    with contextlib.suppress(BufferUnavailableError):
        found = far.get_tuple(config_of("t"))
        assert found
        assert key_of(found.config) == key_of(saved)
    newer = build(near).update_state(config_of("t"), {"xs": ["newer"]}, as_node="ask")
    assert key_of(newer) > key_of(saved)
    bench.redis.allow()

    def far_reads() -> Any:
        try:
            return far.get_tuple(config_of("t"))
        except BufferUnavailableError:
            return None

    found = wait_until(far_reads)
    assert key_of(found.config) == key_of(newer)
    assert far.named("put.around", thread_id="t")
    bench.audit()


def test_a_loop_ends_although_the_pool_is_still_connecting(bench: Bench) -> None:
    saver = bench.saver(triggers=frozenset())

    async def begin_to_connect() -> None:
        pool = await saver._core.postgres.apool()
        await pool.wait()  # so that none is being made yet
        async with pool.connection():
            bench.postgres.request_delay = 5.0
            before = set(bench.postgres._links)
            # More than the pool can have yet: it has to connect.
            wanted = [asyncio.create_task(pool.getconn()) for _ in range(saver.options.pool_size)]
            await await_until(lambda: bench.postgres._links - before)
            assert not all(task.done() and not task.exception() for task in wanted)

    ended = threading.Event()

    def run() -> None:
        asyncio.run(begin_to_connect())
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(60)


# -- forked, and never set up -----------------------------------------------------------------------------------------


def test_a_saver_of_a_process_that_never_calls_setup_flushes_by_itself(bench: Bench) -> None:
    saver = bench.plain(triggers=frozenset({"start", "run_end", "age"}), flush_age=0.05)
    try:
        turn(saver, "t")
        wait_until(lambda: not saver._core.ledger.records, timeout=5, message="run end and age flush")
    finally:
        saver.close()


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_uses_the_savers_settings_and_none_of_its_connections(bench: Bench) -> None:
    saver = bench.saver()
    turn(saver, "parent")
    bench.recovered(saver)
    session = saver._core.flusher._session
    assert session._conn is not None
    assert session._redis is not None
    pid = os.fork()
    if not pid:
        os._exit(int(session._conn is not None) + 2 * int(session._redis is not None))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child's flusher has the parent's connections"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_parent_and_forked_child_work_side_by_side(bench: Bench) -> None:
    saver = bench.saver()
    turn(saver, "parent")
    pid = os.fork()
    if not pid:
        status = 1
        signal.alarm(20)
        try:
            turn(saver, "child")
            turn(saver, "parent")
            if saver.flush():
                status = 0
            saver.close()
        finally:
            os._exit(status)
    for _ in range(5):
        turn(saver, "meanwhile")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    turn(saver, "parent")
    turn(saver, "child")
    bench.recovered(saver)
    saver.hooks.flush(5)
    assert not saver.named("backend.down")
    assert not saver.named("flush.failed")
    bench.audit()
