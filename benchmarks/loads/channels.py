"""One small channel changes, and the rest of the state, large or small, stays as it is.

The state is ten channels of equal size, none of which stands in the checkpoint's own row, and one of some bytes that
changes at each step.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.states import Run

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

CHANNELS = 10
_PIECE = 4_000


async def run(lab: Lab) -> None:
    """Measure each size of the state."""
    keys = lab.usual()
    with lab.servers.place() as place:
        async with lab.lanes("small channel", place, keys, "sync") as lanes:
            for size in lab.scale.channel_bytes:
                lab.say(f"one small channel of a state of {size:,} bytes")
                turn = partial(_turn, lab, place, size)
                await lab.warm_up("small channel", lanes, turn)
                await lab.take_turns("small channel", lanes, lab.scale.channel_rounds, turn)


def _channels(size: int) -> dict[str, Any]:
    each = size // CHANNELS
    piece = min(each, _PIECE)
    return {f"document{i}": [f"{i}".ljust(piece, "x")] * (each // piece) for i in range(CHANNELS)}


async def _turn(lab: Lab, place: Place, size: int, lane: Lane) -> None:
    one = Run(lane.face, place.thread(), ["step"], _channels(size))
    await one.start()
    await one.put_next()
    await lane.face.settle()
    for _ in range(lab.scale.steps):
        one.state = [f"step {one.step}"]
        checkpoint = one.next_checkpoint()
        await lab.timed("small channel, put", lane.key, partial(one.put, *checkpoint), size)
    await lane.face.settle()
    await lane.face.delete_thread(one.thread_id)
