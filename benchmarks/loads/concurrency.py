"""Many threads at a time, on one event loop: what a server process with many users does.

*Burst*: each thread begins as a run does, with a read, and then puts checkpoints with their writes as fast as it can;
what has to be flushed afterwards is not counted. It is measured twice: with states that were made before (`burst`), and
with the caller making 20 messages and a checkpoint for each step (`burst, made`), as the code around a saver does.
*Sustained*: the same for some seconds, and counted is what is both put and in Postgres. Ours is held back as soon as
more than `WAITING` checkpoints wait to be flushed, so that its backlog does not grow: what then passes is the rate that
can be kept up for ever.
"""

from __future__ import annotations

import asyncio
import gc
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import redis

from benchmarks.contenders import LOCK_FREE, LUA_PIPELINED, OURS, POOLED, STOCK, UNVERIFIED
from benchmarks.limits import BareRedis
from benchmarks.scale import STATE
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

THREADS = 50
"""Where one number of threads is meant."""

WAITING = 20_000
UNIT = "checkpoints/s"
_RUN = 20
_WARM_UP_SHARE = 0.2
_PAUSE = 0.002


async def burst(lab: Lab) -> None:
    """Measure bursts at each number of threads."""
    keys = lab.usual()
    with lab.servers.place() as place, redis.Redis.from_url(place.redis_url, protocol=2) as client:
        async with lab.lanes("burst", place, keys, "async") as lanes:
            bare = BareRedis(client, place.prefix, STATE)
            for threads in lab.scale.concurrency:
                lab.say(f"bursts of {threads:,} concurrent threads")
                steps = max(lab.scale.burst_steps, lab.scale.burst // threads)
                await lab.warm_up("burst", lanes, partial(_burst, lab, place, threads, 1, "burst"))
                for number in range(lab.scale.burst_rounds):
                    rate = bare.pipelined(threads * steps, 50)
                    bare.clear()
                    lab.results.note("burst", LUA_PIPELINED, rate, at=threads, unit=UNIT)
                    for load in ("burst", "burst, made") if threads == THREADS else ("burst",):
                        turn = partial(_burst, lab, place, threads, steps, load)
                        await lab.take_turns(load, lanes, 1, turn, first=number)


async def _burst(lab: Lab, place: Place, threads: int, steps: int, load: str, lane: Lane) -> None:
    runs = [Run(lane.face, place.thread(), messages()) for _ in range(threads)]
    made = load.endswith("made")
    prepared = [[] if made else [run.next_checkpoint() for _ in range(steps)] for run in runs]

    async def go(run: Run, checkpoints: list[Any]) -> None:
        await run.start()
        for step in range(steps):
            if made:
                run.state = messages()
            await run.put(*(run.next_checkpoint() if made else checkpoints[step]))
            await run.put_writes()

    gc.collect()
    begin = time.perf_counter()
    await asyncio.gather(*map(go, runs, prepared))
    lab.results.note(load, lane.key, threads * steps / (time.perf_counter() - begin), at=threads, unit=UNIT)


async def sustained(lab: Lab) -> None:
    """Measure the rate that can be kept up."""
    keys = (OURS, UNVERIFIED, STOCK, POOLED, LOCK_FREE)
    lab.say(f"sustained load of {THREADS} concurrent threads")
    with lab.servers.place() as place:
        async with lab.lanes("sustained", place, keys, "async") as lanes:
            await lab.take_turns("sustained", lanes, lab.scale.sustained_rounds, partial(_sustained, lab, place))


async def _sustained(lab: Lab, place: Place, lane: Lane) -> None:
    put = 0
    stop = False

    def saved() -> int:
        # There is no public count of what was flushed, and counting rows would burden Postgres.
        return lane.face.saver._core.flusher.totals.checkpoints if lane.is_ours else put

    saved_before = 0 if not lane.is_ours else saved()

    def waiting() -> int:
        return put - (saved() - saved_before) if lane.is_ours else 0

    async def go() -> None:
        nonlocal put
        state = messages()
        while not stop:
            run = Run(lane.face, place.thread(), state)
            await run.start()
            for _ in range(_RUN):
                while waiting() > WAITING and not stop:  # noqa: ASYNC110 - what is waited for sets no event
                    await asyncio.sleep(_PAUSE)
                if stop:
                    return
                await run.put_next()
                put += 1
                await run.put_writes()

    tasks = [asyncio.ensure_future(go()) for _ in range(THREADS)]
    await asyncio.sleep(lab.scale.sustained_seconds * _WARM_UP_SHARE)
    begin, put_then, saved_then, waiting_then = time.perf_counter(), put, saved(), waiting()
    await asyncio.sleep(lab.scale.sustained_seconds)
    seconds = time.perf_counter() - begin
    lab.results.note("sustained", lane.key, min(put - put_then, saved() - saved_then) / seconds, unit=UNIT)
    for name, value in (("begin", waiting_then), ("end", waiting())):
        lab.results.note(f"sustained, waiting at the {name}", lane.key, value, unit="checkpoints")
    stop = True
    await asyncio.gather(*tasks)
