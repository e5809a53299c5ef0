"""What an event costs the one who emits it: `emit`, with the standard hooks subscribed.

The hooks do their work meanwhile, in threads of their own; now and then they are waited for, so that none has to drop
anything.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.contenders import OURS
from checkpointer import CheckpointEvent

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

_AT_ONCE = 20


async def run(lab: Lab) -> None:
    """Measure events, one after the other."""
    lab.say(f"{lab.scale.events:,} events")
    with lab.servers.place() as place:
        async with lab.lanes("events", place, [OURS], "sync") as lanes:
            events = logging.getLogger("checkpointer.events")
            was = events.propagate, list(events.handlers)
            # The lines are made and formatted, but nobody wants to see them here.
            events.propagate, events.handlers = False, [logging.NullHandler()]
            try:
                await lab.warm_up("events", lanes, partial(_emit, lab, place))
                await lab.take_turns("events", lanes, 1, partial(_emit, lab, place))
            finally:
                events.propagate, events.handlers = was


async def _emit(lab: Lab, place: Place, lane: Lane) -> None:
    hooks = lane.face.saver.hooks
    for number in range(lab.scale.events):
        if number % _AT_ONCE == 0:
            hooks.flush()
        event = CheckpointEvent(
            name="benchmark.measured",
            error_type="checkpoint_benchmark",
            severity="warning",
            message="This is a benchmark.",
            thread_id=f"{place.prefix}-{number % 10}",
            checkpoint_ns="",
            step=number,
            component="application",
            operation="put",
        )
        begin = time.perf_counter()
        hooks.emit(event)
        lab.results.note("emit", lane.key, (time.perf_counter() - begin) * 1e6, unit="µs")
