"""How often an operation waits for a server: turns of the conversation, counted between client and servers.

Counted with no flusher beside it, on a hot thread whose connections are open and whose statements are prepared.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.contenders import CONTENDERS, MEMORY, OURS, UNVERIFIED, Contender, ours
from benchmarks.network import network
from benchmarks.servers import address_of_postgres, address_of_redis, through
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.lab import Lab, Lane
    from benchmarks.network import Network
    from benchmarks.servers import Place

_TIMES = 10
_WARM_UP = 5


async def run(lab: Lab) -> None:
    """Count."""
    lab.say("round trips")
    keys = [key for key, found in CONTENDERS.items() if found.kind != "ours" and key not in (MEMORY, "sqlite")]
    quiet = frozenset[str]()
    own = {
        OURS: Contender(OURS, "", "ours", ours("trips", triggers=quiet)),
        UNVERIFIED: Contender(UNVERIFIED, "", "ours", ours("trips.unverified", triggers=quiet, verify_reads=False)),
    }
    with lab.servers.place() as near:
        line_to = address_of_postgres(near.postgres_uri), address_of_redis(near.redis_url)
        with network(*line_to) as line:
            place = through(near, *line.ports)
            async with lab.lanes("round trips", place, keys, "sync", **own) as lanes:
                await lab.take_turns("round trips", lanes, 1, partial(_turn, lab, place, line))


async def _turn(lab: Lab, place: Place, line: Network, lane: Lane) -> None:
    one = Run(lane.face, place.thread(), messages())
    operations: dict[str, Callable[[], Awaitable[object]]] = {
        "put": one.put_next,
        "put_writes": one.put_writes,
        "get_tuple": one.get_tuple,
    }
    for _ in range(_WARM_UP):
        for call in operations.values():
            await call()
    for name, call in operations.items():
        before = line.turns()
        for _ in range(_TIMES):
            await call()
        for server, now, then in zip(("Postgres", "Redis"), line.turns(), before, strict=True):
            lab.results.note(f"round trips to {server}, {name}", lane.key, (now - then) / _TIMES, unit="round trips")
