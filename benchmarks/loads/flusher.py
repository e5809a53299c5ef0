"""What the flusher costs the graph beside it: the time of a put with no flusher, with an idle and with a busy one.

*Busy* means that a backlog is being flushed all the time of the measured puts, in the same process.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from benchmarks.contenders import IDLE, OURS
from benchmarks.loads.backlog import STEPS
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

_AT_ONCE = 50
_BACKLOG_SHARE = 0.3


async def run(lab: Lab) -> None:
    """Measure puts one after the other."""
    lab.say("puts beside the flusher")
    with lab.servers.place() as place:
        async with lab.lanes("flusher", place, [IDLE, OURS], "async") as lanes:

            async def turn(lane: Lane) -> None:
                state = "no flusher" if lane.key == IDLE else "idle flusher"
                await _puts(lab, place, lane, state, lab.scale.rounds * lab.scale.steps)

            await lab.warm_up("flusher", lanes, turn)
            for number in range(3):
                await lab.take_turns("flusher", lanes, 1, turn, first=number)
                for lane in lanes:
                    if lane.key == IDLE:
                        await _busy(lab, place, lane)


async def _busy(lab: Lab, place: Place, lane: Lane) -> None:
    # The saver that flushes only when told to: so a whole backlog is there when it begins.
    count = int(lab.scale.backlog * _BACKLOG_SHARE) // STEPS
    runs = [Run(lane.face, place.thread(), messages()) for _ in range(count)]
    for start in range(0, len(runs), _AT_ONCE):
        await asyncio.gather(*(_fill(one) for one in runs[start : start + _AT_ONCE]))
    flush = asyncio.ensure_future(lane.face.saver.aflush())
    await asyncio.sleep(0)
    while True:  # a small backlog may be flushed before the second
        await _puts(lab, place, lane, "busy flusher", 5)
        if flush.done():
            break
    assert await flush
    await lane.face.settle()


async def _fill(run: Run) -> None:
    for _ in range(STEPS):
        await run.put_next()
        await run.put_writes()


async def _puts(lab: Lab, place: Place, lane: Lane, state: str, count: int) -> None:
    one = Run(lane.face, place.thread(), messages())
    await one.start()
    await one.put_next()
    for _ in range(count):
        checkpoint = one.next_checkpoint()
        begin = time.perf_counter()
        await one.put(*checkpoint)
        lab.results.note(f"put, {state}", OURS, (time.perf_counter() - begin) * 1e3)
