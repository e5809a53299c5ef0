"""How fast what waits in the buffer gets to Postgres.

Only `flush()` is measured, of checkpoints with a blob, a row and a write each. Beside it: what the stock saver needs
for the same `put` and `put_writes`, one after the other; and a bare COPY of the same rows, already encoded, into empty
tables with the same indexes.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from benchmarks.contenders import COPY, OURS, STOCK, Contender, ours
from benchmarks.limits import copy_rows
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

STEPS = 10
_AT_ONCE = 50
_SERIAL_SHARE = 0.05
_PLENTY = 1 << 40


async def run(lab: Lab) -> None:
    """Measure some backlogs."""
    lab.say(f"flush of a backlog of {lab.scale.backlog:,} checkpoints")
    # Without the flusher's own triggers and without a high-water mark, or it would not wait.
    quiet = Contender(
        OURS,
        "BufferedPostgresSaver",
        "ours",
        ours("quiet", triggers=frozenset(), high_water_bytes=_PLENTY, high_water_age=86_400.0),
    )
    with lab.servers.place() as place:
        async with (
            lab.lanes("flush", place, [], "async", quiet=quiet) as found,
            lab.lanes("flush", place, [STOCK], "sync") as stock,
        ):
            await lab.take_turns("flush", [*found, *stock], lab.scale.backlog_rounds, partial(_turn, lab, place))


async def _turn(lab: Lab, place: Place, lane: Lane) -> None:
    if not lane.is_ours:
        count = max(1, int(lab.scale.backlog * _SERIAL_SHARE) // STEPS)
        runs = [Run(lane.face, place.thread(), messages()) for _ in range(count)]
        begin = time.perf_counter()
        for one in runs:
            await _fill(one)
        _note(lab, lane.key, len(runs) * STEPS, time.perf_counter() - begin)
        return
    runs = [Run(lane.face, place.thread(), messages()) for _ in range(lab.scale.backlog // STEPS)]
    for start in range(0, len(runs), _AT_ONCE):
        await asyncio.gather(*map(_fill, runs[start : start + _AT_ONCE]))
    begin = time.perf_counter()
    report = await lane.face.saver.aflush()
    seconds = time.perf_counter() - begin
    assert report.checkpoints == len(runs) * STEPS, report
    _note(lab, lane.key, report.checkpoints, seconds)
    with psycopg.connect(place.postgres_uri, autocommit=True) as conn:
        seconds = await asyncio.to_thread(copy_rows, conn, [one.thread_id for one in runs])
    _note(lab, COPY, report.checkpoints, seconds)


async def _fill(run: Run) -> None:
    for _ in range(STEPS):
        await run.put_next()
        await run.put_writes()


def _note(lab: Lab, key: str, checkpoints: int, seconds: float) -> None:
    lab.results.note("flush", key, checkpoints / seconds, unit="checkpoints/s")
