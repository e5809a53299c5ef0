"""Calls of many callers share round trips, and nothing else: not their errors, not their cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
from helpers import await_until, put_one, wait_until
from proxy import Proxy, proxied
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer import BufferedPostgresSaver
from checkpointer.buffer import pipes
from checkpointer.buffer.pipes import AsyncPipe, Pipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy import Hold

LANES = pipes._LANES
LIMIT = 1.0


@dataclass
class Line:
    """A pipe to Redis through a proxy, and a direct client."""

    url: str
    proxy: Proxy
    pipe: Pipe
    direct: redis.Redis
    prefix: str
    threads: ThreadPoolExecutor

    def key(self, name: object = "n") -> str:
        return f"{self.prefix}:{name}"

    def occupy(self) -> list[Hold]:
        """Have every lane carry a call whose reply does not come yet."""
        holds = []
        for n in range(LANES):
            hold = self.proxy.hold(b"busy-%d" % n, reply=True)
            self.threads.submit(self.pipe.ask, "ECHO", f"busy-{n}")
            assert hold.taken.wait(10)
            holds.append(hold)
        return holds

    def queued(self, number: int) -> None:
        wait_until(lambda: len(self.pipe._queue) == number)


@pytest.fixture
def line(redis_url: str, prefix: str) -> Iterator[Line]:
    with ExitStack() as stack:
        url, proxy = stack.enter_context(proxied(redis_url))
        client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=LIMIT * 5)
        stack.callback(client.close)
        direct = stack.enter_context(redis.Redis.from_url(redis_url))
        threads = stack.enter_context(ThreadPoolExecutor(64))
        stack.callback(proxy.close)  # before the threads are waited for
        yield Line(url, proxy, Pipe(client, keep=True), direct, prefix, threads)


def test_calls_that_wait_for_a_lane_go_out_together_and_each_gets_its_own_reply(line: Line) -> None:
    line.direct.set(line.key("text"), "no number")
    holds = line.occupy()
    values = [line.threads.submit(line.pipe.ask, "SET", line.key(n), n, "GET") for n in range(20)]
    wrong = line.threads.submit(line.pipe.ask, "INCR", line.key("text"))
    texts = [line.threads.submit(line.pipe.ask, "ECHO", f"text {n}") for n in range(20)]
    line.queued(41)
    before = line.proxy.turns
    for hold in holds:
        hold.release()
    assert [value.result(10) for value in values] == [None] * 20
    assert [text.result(10) for text in texts] == [f"text {n}".encode() for n in range(20)]
    with pytest.raises(redis.ResponseError, match="not an integer"):
        wrong.result(10)
    assert line.proxy.turns - before <= LANES
    assert [line.direct.get(line.key(n)) for n in range(20)] == [str(n).encode() for n in range(20)]


def test_a_call_has_a_lane_for_itself_while_one_is_free(line: Line) -> None:
    hold = line.proxy.hold(b"busy", reply=True)
    busy = line.threads.submit(line.pipe.ask, "ECHO", "busy")
    assert hold.taken.wait(10)
    assert line.pipe.ask("ECHO", "free") == b"free"
    hold.release()
    assert busy.result(10) == b"busy"


def test_a_bundle_is_bounded_in_calls_and_bytes(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "_BUNDLE_CALLS", 4)
    monkeypatch.setattr(pipes, "_BUNDLE_BYTES", 1000)
    holds = line.occupy()
    sizes = [10, 10, 10, 10, 10, 600, 600, 5000, 10]
    asked = []
    for n, size in enumerate(sizes, 1):
        asked.append(line.threads.submit(line.pipe.ask, "ECHO", "x" * size))
        line.queued(n)
    with line.pipe._lock:
        bundles, queue = [], line.pipe._queue.copy()
        while queue:
            bundles.append([len(call.packed) // 10 * 10 for call in pipes._take(queue)])
    assert [len(bundle) for bundle in bundles] == [4, 2, 1, 1, 1]
    for hold in holds:
        hold.release()
    assert [len(reply.result(10)) for reply in asked] == sizes


def test_what_is_on_a_lane_fails_with_it_and_what_waits_is_sent_on_a_new_connection(line: Line) -> None:
    holds = line.occupy()
    waiting = line.threads.submit(line.pipe.ask, "INCR", line.key())
    line.queued(1)
    line.proxy.cut()
    for hold in holds:
        hold.release()
    assert waiting.result(10) == 1
    assert line.pipe.ask("INCR", line.key()) == 2


def test_a_connection_that_the_server_has_closed_meanwhile_is_replaced(line: Line) -> None:
    assert line.pipe.ask("INCR", line.key()) == 1
    line.proxy.cut()
    assert line.pipe.ask("INCR", line.key()) == 2


def test_a_time_out_fails_those_who_wait_too_and_sends_nothing_of_theirs(line: Line) -> None:
    holds = line.occupy()
    waiting = [line.threads.submit(line.pipe.ask, "INCR", line.key()) for _ in range(10)]
    line.queued(10)
    for asked in waiting:
        with pytest.raises(redis.TimeoutError):
            asked.result(LIMIT * 10)
    for hold in holds:
        hold.release()
    assert line.pipe.ask("INCR", line.key()) == 1, "none of them was sent"


def test_a_cut_off_reply_is_not_taken_for_that_of_a_later_call(line: Line) -> None:
    line.direct.set(line.key(), b"v" * 100_000)
    line.proxy.cut_reply(b"GET", after=1000)
    with pytest.raises(redis.ConnectionError):
        line.pipe.ask("GET", line.key())
    assert line.pipe.ask("ECHO", "next") == b"next"


@pytest.mark.parametrize("when", ["queued", "carrying"])
def test_an_interrupted_thread_leaves_its_lane_to_the_others(line: Line, when: str) -> None:
    class Stop(Exception):  # noqa: N818 - stands for KeyboardInterrupt, which pytest takes for its own
        pass

    def stop(*_: object) -> None:
        raise Stop

    holds = line.occupy() if when == "queued" else []
    kept = line.proxy.hold(b"mine", reply=True)
    here = threading.get_ident()
    others: list[Any] = []

    def interrupt() -> None:
        if when == "queued":
            line.queued(1)
            others.extend(line.threads.submit(line.pipe.ask, "INCR", line.key()) for _ in range(5))
            line.queued(6)
        else:
            assert kept.taken.wait(10)
        signal.pthread_kill(here, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        line.threads.submit(interrupt)
        with pytest.raises(Stop):
            line.pipe.ask("ECHO", "mine")
    finally:
        signal.signal(signal.SIGUSR1, before)
    for hold in [*holds, kept]:
        hold.release()
    assert sorted(asked.result(10) for asked in others) == list(range(1, len(others) + 1))
    for n in range(LANES * 2):
        assert line.pipe.ask("ECHO", f"{n}") == str(n).encode()
    wait_until(lambda: len(line.pipe._free) == LANES)


def test_connections_of_somebody_elses_pool_are_given_back(line: Line) -> None:
    with redis.Redis(
        connection_pool=redis.BlockingConnectionPool.from_url(line.url, max_connections=1, timeout=10)
    ) as client:
        pipe = Pipe(client, keep=False)
        assert pipe.ask("ECHO", "x") == b"x"
        assert client.ping(), "the only connection is free again"


# -- asynchronous -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def asynchronous(line: Line, limit: float | None = LIMIT * 5) -> Any:
    client = redis.asyncio.Redis.from_url(line.url, retry=AsyncRetry(NoBackoff(), 0))
    try:
        yield AsyncPipe(client, limit)
    finally:
        await client.aclose()


async def aoccupy(line: Line, pipe: AsyncPipe) -> tuple[list[Hold], list[asyncio.Task[Any]]]:
    holds, tasks = [], []
    for n in range(LANES):
        hold = line.proxy.hold(b"busy-%d" % n, reply=True)
        tasks.append(asyncio.ensure_future(pipe.ask("ECHO", f"busy-{n}")))
        await await_until(hold.taken.is_set)
        holds.append(hold)
    return holds, tasks


async def test_the_calls_of_many_tasks_share_round_trips(line: Line) -> None:
    line.direct.set(line.key("text"), "no number")
    async with asynchronous(line) as pipe:
        await asyncio.gather(*(pipe.ask("ECHO", n) for n in range(50)))  # connects
        before = line.proxy.turns
        calls = [pipe.ask("ECHO", f"text {n}") for n in range(50)]
        replies = await asyncio.gather(*calls, pipe.ask("INCR", line.key("text")), return_exceptions=True)
        assert replies[:50] == [f"text {n}".encode() for n in range(50)]
        assert isinstance(replies[50], redis.ResponseError)
        assert line.proxy.turns - before <= LANES


async def test_a_cancelled_task_disturbs_no_other(line: Line) -> None:
    async with asynchronous(line) as pipe:
        holds, busy = await aoccupy(line, pipe)
        tasks = [asyncio.ensure_future(pipe.ask("INCR", line.key())) for _ in range(10)]
        await await_until(lambda: len(pipe._queue) == 10)
        for task in [*tasks[:5], busy[0]]:
            task.cancel()
        for hold in holds:
            hold.release()
        assert await asyncio.gather(*tasks[5:]) == [1, 2, 3, 4, 5], "the cancelled ones were not even sent"
        assert await busy[1] == b"busy-1"


async def test_a_task_that_waits_behind_a_time_out_fails_with_it(line: Line) -> None:
    async with asynchronous(line, LIMIT) as pipe:
        holds, busy = await aoccupy(line, pipe)
        waiting = [asyncio.ensure_future(pipe.ask("INCR", line.key())) for _ in range(10)]
        replies = await asyncio.gather(*busy, *waiting, return_exceptions=True)
        assert {type(reply) for reply in replies} == {redis.TimeoutError}
        for hold in holds:
            hold.release()
        assert await pipe.ask("INCR", line.key()) == 1


@pytest.mark.parametrize("limit", [LIMIT * 5, None], ids=["ours", "somebody else's"])
async def test_a_task_after_a_cut_gets_a_new_connection(line: Line, limit: float | None) -> None:
    async with asynchronous(line, limit) as pipe:
        assert await pipe.ask("INCR", line.key()) == 1
        line.proxy.cut_reply(b"INCR")
        with pytest.raises(redis.ConnectionError):
            await pipe.ask("INCR", line.key())
        assert await pipe.ask("INCR", line.key()) == 3
        line.proxy.cut()
        await asyncio.sleep(0)
        with contextlib.suppress(redis.ConnectionError):  # the end of the connection may not have been seen yet
            await pipe.ask("INCR", line.key())
        await await_until(lambda: line.direct.get(line.key()) is not None)
        assert await pipe.ask("ECHO", "x") == b"x"


async def test_a_loop_that_ends_leaves_nobody_waiting(line: Line) -> None:
    async with asynchronous(line) as pipe:
        holds, busy = await aoccupy(line, pipe)
        for task in list(pipe._tasks):
            task.cancel()
        replies = await asyncio.gather(*busy, return_exceptions=True)
        assert {type(reply) for reply in replies} == {redis.ConnectionError}
        for hold in holds:
            hold.release()
        assert await pipe.ask("ECHO", "x") == b"x"


# -- the saver's puts -------------------------------------------------------------------------------------------------


async def test_the_puts_of_many_runs_at_once_share_round_trips(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with proxied(redis_url) as (url, proxy):
        async with BufferedPostgresSaver.from_conn_string(
            postgres_uri, redis_url=url, prefix=prefix, hooks=(), triggers=frozenset()
        ) as saver:
            await saver.asetup()
            puts = [put_one(saver, f"t{n}") for n in range(50)]  # opens the threads

            async def write(config: Any) -> None:
                await saver.aput_writes(config, [("x", 1)], "task")

            await asyncio.gather(*map(write, puts))  # connects
            before = proxy.turns
            await asyncio.gather(*map(write, puts))
            assert proxy.turns - before <= LANES
