"""Where things lie in Redis: the data model of the buffer.

Not here: the scripts that change it (`scripts.py`) and what a record's bytes mean (`records.py`).

A *partition* is a share of the threads: `crc32(thread_id) % partitions`. All keys of a partition carry the
same *hash tag*, so they lie in one slot of a cluster, and the tags are chosen so that the partitions' slots
are spread evenly. A *field* names one record inside a thread's hashes.

For each partition:

| key | type | holds |
|---|---|---|
| `PREFIX:{TAG}:state` | hash | state, see below |
| `PREFIX:{TAG}:threads` | sorted set | threads with dirty records, by the time they became dirty (ms); pinned: +inf |

For each thread; nothing that is not yet in Postgres ever has a time to live:

| key | type | holds | time to live |
|---|---|---|---|
| `PREFIX:{TAG}:d:THREAD` | hash | dirty records: field -> payload | never |
| `PREFIX:{TAG}:o:THREAD` | sorted set | order of the dirty records: field by sequence number | never |
| `PREFIX:{TAG}:c:THREAD` | hash | clean records: the flushed head of each namespace, a read cache | `clean_ttl` |
| `PREFIX:{TAG}:w:THREAD` | sorted set | fields of all pending writes in Redis, by name | only if nothing is dirty |
| `PREFIX:{TAG}:f:THREAD` | hash | facts, see below | as above |

State: `sequence`, the last sequence number (every record gets one, and none is used twice); `bytes`, the size of the
dirty records; `replay`, up to which number records come from before this server went back in time.

Facts: `h NUL NS` -> id of the namespace's head; `all`: every namespace is known; `open`: the token under which
Postgres has the thread for open (`store/threads.py`); `last`: the last sequence number that the thread got; `acked`:
up to which number Postgres has its records; `deleted`: the latest checkpoint id of a deleted life of the thread, and
`x NUL ID` for each checkpoint that was refused as a late one of that life.

Fields are joined with NUL, which no id can hold since Postgres cannot store it (`records.py` refuses it at
the door): `c NUL NS NUL ID`, `b NUL NS NUL CHANNEL NUL VERSION`, `w NUL NS NUL ID NUL TASK NUL IDX`. The thread's
id is the last part of its keys and stands after the hash tag, so no id can reach another thread's keys.
"""

from __future__ import annotations

import binascii
import zlib
from functools import cached_property
from itertools import count
from typing import NamedTuple

_SLOTS = 16384


def slot_of(tag: bytes) -> int:
    """Return the cluster slot of a hash tag (CRC16/XMODEM mod 16384, Redis Cluster specification)."""
    return binascii.crc_hqx(tag, 0) % _SLOTS


def field(kind: str, *parts: str) -> bytes:
    """Name a record inside a thread's hashes."""
    return "\0".join((kind, *parts)).encode()


def tag_of(key: bytes) -> bytes:
    """Return what all keys of this key's partition begin with."""
    return key[: key.index(b"}") + 1]


class KeyLayout:
    """The keys of one application (prefix) with a fixed number of partitions."""

    def __init__(self, prefix: str, partitions: int) -> None:
        self.prefix = prefix
        self.partitions = partitions

    @cached_property
    def _bases(self) -> list[bytes]:
        return [f"{self.prefix}:{{{self._tag(p)}}}:".encode() for p in range(self.partitions)]

    def _tag(self, partition: int) -> str:
        # The tag's slot must fall into this partition's share of the slots: about `partitions` tries.
        low = partition * _SLOTS // self.partitions
        high = (partition + 1) * _SLOTS // self.partitions
        for n in count():
            tag = f"{self.prefix}.{partition}.{n}"
            if low <= slot_of(tag.encode()) < high:
                return tag
        raise AssertionError("count() does not end")

    def partition_of(self, thread_id: str) -> int:
        """Return the partition of a thread."""
        return zlib.crc32(thread_id.encode()) % self.partitions

    def state(self, partition: int) -> bytes:
        """Return the key of a partition's state."""
        return self._bases[partition] + b"state"

    def threads(self, partition: int) -> bytes:
        """Return the key of a partition's set of dirty threads."""
        return self._bases[partition] + b"threads"

    def thread(self, thread_id: str) -> ThreadKeys:
        """Return the keys that a script about this thread may touch."""
        raw = thread_id.encode()
        base = self._bases[zlib.crc32(raw) % self.partitions]
        return ThreadKeys(
            base + b"state",
            base + b"threads",
            base + b"d:" + raw,
            base + b"o:" + raw,
            base + b"w:" + raw,
            base + b"c:" + raw,
            base + b"f:" + raw,
        )


class ThreadKeys(NamedTuple):
    """The keys of one thread and of its partition, in the order in which the scripts declare them."""

    state: bytes
    threads: bytes
    dirty: bytes
    order: bytes
    writes: bytes
    clean: bytes
    facts: bytes
