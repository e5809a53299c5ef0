"""Single operations, one after the other: `put`, `put_writes`, `get_tuple` of a hot thread and of a cold one.

A *turn* is one thread with some steps; a *step* is one `put_writes`, one `put` and one `get_tuple` of the thread's
latest checkpoint, as an agent makes them, between the start and the end of a run: so ours flushes in the background as
it does in production. *Cold* means that the thread is in Postgres, and Redis has nothing of it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import redis

from benchmarks.contenders import CONTENDERS, LOCK_FREE, LUA, OURS, POOLED, STOCK, UNVERIFIED
from benchmarks.lab import Face, Lab, Lane, root_run
from benchmarks.limits import BareRedis
from benchmarks.scale import KB, STATE
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.servers import Place

LARGE = 100 * KB
_SLOW_STEPS = 1


async def by_size(lab: Lab) -> None:
    """Measure synchronous calls at each size of the state."""
    with lab.servers.place() as place, redis.Redis.from_url(place.redis_url, protocol=2) as client:
        async with lab.lanes("operations", place, CONTENDERS, "sync") as lanes:
            for size in lab.scale.sizes:
                lab.say(f"operations at {size:,} bytes")
                some = [lane for lane in lanes if size == STATE or not lane.contender.is_slow]
                bare = BareRedis(client, place.prefix, size)
                turn = partial(_turn, lab, place, size, "")
                await lab.warm_up("operations", some, turn)
                for number in range(_rounds(lab, size)):
                    for _ in range(lab.scale.steps):
                        for operation in ("put_writes", "put"):
                            lab.results.note(operation, LUA, bare.call(operation) * 1e3, at=size)
                    await lab.take_turns("operations", some, 1, turn, first=number)
                    bare.clear()


def _rounds(lab: Lab, size: int) -> int:
    return lab.scale.rounds if size < LARGE else lab.scale.large_rounds


async def asynchronous(lab: Lab) -> None:
    """Measure asynchronous calls, one at a time, at the usual size."""
    lab.say("asynchronous operations")
    keys = lab.usual()
    with lab.servers.place() as place:
        async with lab.lanes("async", place, keys, "async") as lanes:
            turn = partial(_turn, lab, place, STATE, "a")
            await lab.warm_up("async", lanes, turn)
            await lab.take_turns("async", lanes, lab.scale.rounds, turn)


async def _turn(lab: Lab, place: Place, size: int, prefix: str, lane: Lane) -> None:
    run = Run(lane.face, place.thread(), messages(size))
    with root_run(run.thread_id, uuid4()):
        await run.start()
        await run.put_next()
        for _ in range(_SLOW_STEPS if lane.contender.is_slow else lab.scale.steps):
            checkpoint = run.next_checkpoint()
            await lab.timed(f"{prefix}put_writes", lane.key, run.put_writes, size)
            await lab.timed(f"{prefix}put", lane.key, partial(run.put, *checkpoint), size)
            await lab.timed(f"{prefix}get_tuple", lane.key, run.get_tuple, size)
    if size >= LARGE:  # or memory would fill with it
        await lane.face.settle()
        await lane.face.delete_thread(run.thread_id)


async def cold(lab: Lab) -> None:
    """Measure the first read of threads that only Postgres has."""
    keys = (OURS, UNVERIFIED, STOCK, POOLED, LOCK_FREE)
    with lab.servers.place() as place, lab.stock(place) as stock:
        async with lab.lanes("cold", place, keys, "sync") as lanes:
            for size in lab.scale.sizes:
                lab.say(f"cold reads at {size:,} bytes")
                turn = partial(_cold_turn, lab, place, size, stock)
                await lab.warm_up("cold", lanes, turn)
                await lab.take_turns("cold", lanes, _rounds(lab, size), turn)


async def _cold_turn(lab: Lab, place: Place, size: int, writer: Face, lane: Lane) -> None:
    for _ in range(lab.scale.steps):
        written = Run(writer, place.thread(), messages(size))
        await written.put_next()
        await written.put_writes()
        reader = Run(lane.face, written.thread_id, written.state)
        await lab.timed("get_tuple, cold", lane.key, reader.get_tuple, size)
