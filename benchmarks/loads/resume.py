"""A process that starts and continues a thread: open the saver, read the thread's latest checkpoint, make one step.

Measured is all of it, connecting included. Of ours there are two cases: Redis still has the thread's head (a process
was restarted), or it has nothing of it (the thread rested for longer than `clean_ttl`).
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import CONTENDERS, EMPTY, MEMORY, OURS
from benchmarks.lab import Face
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.contenders import Contender
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place


async def run(lab: Lab) -> None:
    """Measure it for all that keep anything."""
    lab.say("resume")
    keys = [key for key, found in CONTENDERS.items() if found.kind != "ours" and key != MEMORY]
    with lab.servers.place() as place:
        async with lab.lanes("resume", place, [OURS, *keys], "sync") as lanes:
            turn = partial(_turn, lab, place)
            await lab.warm_up("resume", lanes, turn)
            await lab.take_turns("resume", lanes, lab.scale.rounds, turn)
    lab.results.remark("InMemorySaver cannot be resumed by another process: it is not in the load resume")


async def _turn(lab: Lab, place: Place, lane: Lane) -> None:
    written = await _written(place, lane.face)
    await lane.face.settle()
    await _resume(lab, place, lane.contender, lane.key, written)
    if lane.key == OURS:
        with lab.stock(place) as stock:
            written = await _written(place, stock)
        await _resume(lab, place, lane.contender, EMPTY, written)


async def _written(place: Place, face: Face) -> Run:
    run = Run(face, place.thread(), messages())
    for _ in range(3):
        await run.put_next()
        await run.put_writes()
    return run


async def _resume(lab: Lab, place: Place, contender: Contender, key: str, written: Run) -> None:
    begin = time.perf_counter()
    # Looking for the tables, as programs do at each start, is a part of it.
    async with contender.open(place, "sync") as saver:
        resumed: Any = Run(Face(saver, "sync"), written.thread_id, written.state)
        found = await resumed.get_tuple()
        resumed.config, resumed.step, resumed.version = found.config, written.step, written.version
        await resumed.put_next()
        await resumed.put_writes()
        seconds = time.perf_counter() - begin
    lab.results.note("resume", key, seconds * 1e3)
