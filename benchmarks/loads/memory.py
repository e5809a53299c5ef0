"""What a thread takes of Redis' memory, and what is left of it in the end.

The *head* is what a read of the thread's latest checkpoint needs: its row, the blobs that it names and its pending
writes, in bytes as Postgres has them. *Hot* is the difference of `used_memory`, divided by the number of threads, once
everything is flushed; *dirty* the same while it still waits. *Left* are the keys of threads that exist once `clean_ttl`
has passed.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import redis

from benchmarks.contenders import OURS, Contender, ours
from benchmarks.states import Run, messages

if TYPE_CHECKING:
    from benchmarks.lab import Lab, Lane
    from benchmarks.servers import Place

STEPS = 5
_TTL = 3_600.0
_SHORT_TTL = 1.0
_PATIENCE = 20.0

_HEADS = """
WITH heads AS (
    SELECT DISTINCT ON (thread_id, checkpoint_ns) * FROM checkpoints WHERE thread_id = ANY(%(threads)s)
    ORDER BY thread_id, checkpoint_ns, checkpoint_id DESC
)
SELECT
    (SELECT sum(octet_length(checkpoint::text) + octet_length(metadata::text)) FROM heads)
  + (SELECT sum(octet_length(b.blob)) FROM heads JOIN checkpoint_blobs b USING (thread_id, checkpoint_ns)
     WHERE heads.checkpoint -> 'channel_versions' ->> b.channel = b.version)
  + (SELECT coalesce(sum(octet_length(w.blob)), 0)
     FROM heads JOIN checkpoint_writes w USING (thread_id, checkpoint_ns, checkpoint_id))
"""


async def run(lab: Lab) -> None:
    """Measure our saver; the servers' other users must be at rest."""
    lab.say(f"memory of {lab.scale.memory_threads} threads")
    own = {
        name: Contender(OURS, "BufferedPostgresSaver", "ours", ours(name, triggers=frozenset(), clean_ttl=ttl))
        for name, ttl in (("kept", _TTL), ("brief", _SHORT_TTL))
    }
    with lab.servers.place() as place:
        async with lab.lanes("memory", place, [], "async", kept=own["kept"]) as lanes:
            await lab.take_turns("memory", lanes, 1, partial(_hot, lab, place))
        async with lab.lanes("memory", place, [], "async", brief=own["brief"]) as lanes:
            await lab.take_turns("memory", lanes, 1, partial(_left, lab, place))


async def _fill(place: Place, lane: Lane, count: int) -> list[str]:
    runs = [Run(lane.face, place.thread(), messages()) for _ in range(count)]
    for one in runs:
        await one.start()
        for _ in range(STEPS):
            await one.put_next()
            await one.put_writes()
    return [one.thread_id for one in runs]


async def _hot(lab: Lab, place: Place, lane: Lane) -> None:
    count = lab.scale.memory_threads
    # Scripts and partitions are there afterwards.
    await _fill(place, lane, min(count, 64))
    await lane.face.settle()
    with redis.Redis.from_url(place.redis_url) as client:
        before = _used(client)
        threads = await _fill(place, lane, count)
        dirty = _used(client)
        await lane.face.settle()
        hot = _used(client)
    with psycopg.connect(place.postgres_uri) as conn:
        found = conn.execute(_HEADS, {"threads": threads}).fetchone()
    for name, value in (
        ("dirty", (dirty - before) / count),
        ("hot", (hot - before) / count),
        ("head", float(found[0]) / count if found else 0.0),
    ):
        lab.results.note(f"memory, {name}", lane.key, value, unit="bytes/thread")


async def _left(lab: Lab, place: Place, lane: Lane) -> None:
    await _fill(place, lane, max(5, lab.scale.memory_threads // 10))
    await lane.face.settle()
    deadline = time.monotonic() + _SHORT_TTL + _PATIENCE
    with redis.Redis.from_url(place.redis_url) as client:
        await asyncio.sleep(_SHORT_TTL)
        while True:
            left = _keys_of_threads(client, place.prefix)
            if not left or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
    lab.results.note("memory, left", lane.key, left, unit="keys")


def _used(client: redis.Redis) -> int:
    facts: Any = client.info("memory")
    return int(facts["used_memory"])


def _keys_of_threads(client: redis.Redis, prefix: str) -> int:
    # A thread's id begins with the prefix as well, and is the last part of its keys.
    return sum(1 for _ in client.scan_iter(f"{prefix}.brief*:{prefix}-*", count=10_000))
