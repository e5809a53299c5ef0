"""How much waits in the buffer: what an operator watches, asked of Redis alone.

Not here: what one process owes (`ledger.py`). A *backlog* is that of all processes of one prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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


def measure(read: Callable[..., list[Any]], scanned: Mapping[int, tuple[int, float]], layout: KeyLayout) -> Backlog:
    """Count what waits in all partitions: one command for each thread that has something.

    Args:
        read: Reads keys: `read(keys, command, *arguments)`.
        scanned: For each partition with dirty records their bytes and for how many seconds the oldest waits.
        layout: The keys.
    """
    found = read([layout.threads(partition) for partition in range(layout.partitions)], "zrange", 0, -1)
    dirty = [thread.decode() for threads in found for thread in threads]
    records = 0
    for start in range(0, len(dirty), _AT_ONCE):
        some = dirty[start : start + _AT_ONCE]
        records += sum(read([layout.thread(thread).order for thread in some], "zcard"))
    held_bytes = sum(held for held, _ in scanned.values())
    return Backlog(len(dirty), records, held_bytes, max((age for _, age in scanned.values()), default=0.0))
