"""Servers that are not on the same machine: each round trip to either of them lasts longer by the same time.

Everything passes a process that delays it (`network.py`), at an added latency of 0 too, so that what remains between
the points is the latency alone. `PING` shows what the latency really is.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import redis

from benchmarks.contenders import IDLE, LOCK_FREE, OURS, PING, POOLED, STOCK
from benchmarks.loads.graphs import chain
from benchmarks.network import network
from benchmarks.servers import address_of_postgres, address_of_redis, through
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.lab import Lab, Lane
    from benchmarks.network import Network
    from benchmarks.servers import Place


async def run(lab: Lab) -> None:
    """Measure puts and a graph at each latency."""
    lab.say(f"network latency of {', '.join(f'{added:g}' for added in lab.scale.latencies)} ms")
    with lab.servers.place() as near, network(*_addresses(near)) as line:
        place = through(near, *line.ports)
        async with lab.lanes("network", place, [OURS, IDLE, STOCK, POOLED], "sync") as lanes:
            for number, added in _delayed(lab, line):
                if number == 0:
                    await lab.warm_up("network", lanes, partial(_puts, lab, place, added))
                _ping(lab, place.redis_url, added)
                await lab.take_turns("network", lanes, 1, partial(_puts, lab, place, added), first=number)
        async with lab.lanes("network", place, [OURS, STOCK, POOLED, LOCK_FREE], "async") as lanes:
            for number, added in _delayed(lab, line):
                if number == 0:
                    await lab.warm_up("network", lanes, partial(_graph, lab, place, added))
                await lab.take_turns("network", lanes, 1, partial(_graph, lab, place, added), first=number)


def _delayed(lab: Lab, line: Network) -> Iterator[tuple[int, float]]:
    """Yield each round with each latency, in milliseconds, which the line has then."""
    for number in range(lab.scale.network_rounds):
        for added in lab.scale.latencies:
            line.delay(added / 1e3)
            yield number, added
    line.delay(0)


def _addresses(place: Place) -> tuple[tuple[str, int], tuple[str, int]]:
    return address_of_postgres(place.postgres_uri), address_of_redis(place.redis_url)


def _ping(lab: Lab, url: str, added: float) -> None:
    with redis.Redis.from_url(url) as client:
        client.ping()
        for _ in range(lab.scale.steps):
            begin = time.perf_counter()
            client.ping()
            lab.results.note("network, put", PING, (time.perf_counter() - begin) * 1e3, at=added)


async def _puts(lab: Lab, place: Place, added: float, lane: Lane) -> None:
    one = Run(lane.face, place.thread(), messages())
    await one.start()
    await one.put_next()
    for _ in range(lab.scale.steps):
        checkpoint = one.next_checkpoint()
        await lab.timed("network, put", lane.key, partial(one.put, *checkpoint), added)


async def _graph(lab: Lab, place: Place, added: float, lane: Lane) -> None:
    graph = chain(lane.face.saver)
    config = {"configurable": {"thread_id": place.thread()}}
    given = {"messages": messages()}
    await lab.timed("network, graph of 10 nodes", lane.key, partial(graph.ainvoke, given, config), added)
