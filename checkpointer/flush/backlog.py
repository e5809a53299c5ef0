"""How much waits in the buffer: what an operator watches, asked of Redis alone.

Not here: what one process owes (`ledger.py`). A *backlog* is that of all processes of one prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointer.buffer.clients import SyncRedis
    from checkpointer.buffer.keys import KeyLayout

_AT_ONCE = 1_000


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in the buffer.

    Attributes:
        threads: Threads with records that are not in Postgres.
        records: Those records.
        held_bytes: Their size, as the buffer counts it.
        oldest_seconds: For how long the oldest of them has waited; 0 if nothing waits.
    """

    threads: int = 0
    records: int = 0
    held_bytes: int = 0
    oldest_seconds: float = 0.0


def measure(client: SyncRedis, layout: KeyLayout) -> Backlog:
    """Count what waits in all partitions: one command for each thread that has something."""
    pipe = client.pipeline(transaction=False)
    for partition in range(layout.partitions):
        pipe.zrange(layout.threads(partition), 0, -1, withscores=True)
        pipe.hget(layout.state(partition), "bytes")
    pipe.time()
    *found, now = pipe.execute()
    dirty = [(thread.decode(), score) for threads in found[::2] for thread, score in threads]
    if not dirty:
        return Backlog()
    records = 0
    for start in range(0, len(dirty), _AT_ONCE):
        pipe = client.pipeline(transaction=False)
        for thread, _ in dirty[start : start + _AT_ONCE]:
            pipe.zcard(layout.thread(thread).order)
        records += sum(pipe.execute())
    oldest = min(score for _, score in dirty)
    held_bytes = sum(int(held or 0) for held in found[1::2])
    return Backlog(len(dirty), records, held_bytes, max(0.0, now[0] + now[1] / 1e6 - oldest / 1000))
