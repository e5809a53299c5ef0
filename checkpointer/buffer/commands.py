"""Calls of the buffer's scripts, and their replies, without I/O.

Not here: the scripts (`scripts.py`) and the clients that run a call (`clients.py`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpointer.buffer import keys, scripts
from checkpointer.records import (
    Address,
    Blob,
    CheckpointRow,
    Put,
    PutWrites,
    Write,
    pack_blob,
    pack_checkpoint,
    pack_write,
    unpack_blob,
    unpack_checkpoint,
    unpack_write,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from checkpointer.buffer.keys import KeyLayout

_LENGTH = struct.Struct(">I")

type_arg = bytes | str | int | float


class ScriptCall(NamedTuple):
    """One script call: one round trip."""

    script: scripts.Script
    keys: Sequence[bytes]
    args: Sequence[type_arg]


@dataclass(frozen=True, slots=True)
class PutReply:
    """What Redis says to a put: its sequence number, and the positions of the needed blobs that it lacks."""

    sequence: int
    lacks: list[int]


@dataclass(slots=True)
class BufferRead:
    """What Redis knows about one checkpoint.

    Attributes:
        head: The namespace's latest checkpoint that Redis knows, or None.
        row: The checkpoint that was asked for, if Redis has it.
        dirty: The row is not yet acknowledged by Postgres.
        complete: The row and every blob that it needs are here.
        knows_all: Redis knows every namespace of the thread, so one without a head has no checkpoint.
        blobs: The blobs of the row that are here.
        writes: Pending writes by checkpoint id: `(write, dirty)`.
    """

    head: str | None = None
    row: CheckpointRow | None = None
    dirty: bool = False
    complete: bool = False
    knows_all: bool = False
    blobs: list[Blob] = field(default_factory=list)
    writes: dict[str, list[tuple[Write, bool]]] = field(default_factory=dict)

    def writes_of(self, checkpoint_id: str) -> list[tuple[Write, bool]]:
        """Return the pending writes of one checkpoint."""
        return self.writes.get(checkpoint_id, [])


class DirtyCheckpoint(NamedTuple):
    """A dirty checkpoint of a thread."""

    checkpoint_ns: str
    row: CheckpointRow


class DirtyBlob(NamedTuple):
    """A dirty blob of a thread."""

    checkpoint_ns: str
    blob: Blob


class DirtyWrite(NamedTuple):
    """A dirty pending write of a thread."""

    checkpoint_ns: str
    checkpoint_id: str
    write: Write


DirtyRecord = DirtyCheckpoint | DirtyBlob | DirtyWrite


@dataclass(slots=True)
class Drained:
    """The first dirty records of a thread, in order.

    Attributes:
        records: The records.
        sequences: The sequence number of each.
        upto: The sequence number of the last one; 0 without records.
        waiting: How many dirty records the thread had, these included.
        sequence: The partition's sequence.
        missing: Fields whose payload Redis no longer has.
    """

    records: list[DirtyRecord]
    sequences: list[int]
    upto: int
    waiting: int
    sequence: int
    missing: list[bytes]


class Commands:
    """Builds calls for one key layout and reads their replies."""

    def __init__(self, layout: KeyLayout, clean_ttl: float) -> None:
        self.layout = layout
        self._ttl = int(clean_ttl * 1000)

    def put(self, put: Put, known: bytes) -> ScriptCall:
        """Store a checkpoint and its new blobs; `known` is `pack_known(...)` or empty."""
        address = put.address
        args: list[type_arg] = [
            address.thread_id,
            address.checkpoint_ns,
            put.row.checkpoint_id,
            self._ttl,
            known,
            len(put.blobs),
            pack_checkpoint(put.row),
        ]
        for blob in put.blobs:
            args += (blob.ref, pack_blob(blob))
        return ScriptCall(scripts.PUT, self.layout.thread(address.thread_id), args)

    @staticmethod
    def read_put(reply: Any) -> PutReply:
        """Read the reply to `put`."""
        return PutReply(int(reply[0]), [int(position) for position in reply[1:]])

    def fill(self, address: Address, checkpoint_id: str, blobs: Iterable[Blob]) -> ScriptCall:
        """Give Redis the unchanged blobs of a head."""
        args: list[type_arg] = [address.checkpoint_ns, checkpoint_id, self._ttl]
        for blob in blobs:
            args += (blob.ref, pack_blob(blob))
        return ScriptCall(scripts.FILL, self.layout.thread(address.thread_id), args)

    def put_writes(self, put: PutWrites) -> ScriptCall:
        """Store pending writes; all of one call overwrite, or none."""
        address = put.address
        args: list[type_arg] = [address.thread_id, int(put.writes[0].overwrite)]
        for write in put.writes:
            args += (
                keys.field("w", address.checkpoint_ns, put.checkpoint_id, write.task_id, str(write.idx)),
                pack_write(write),
            )
        return ScriptCall(scripts.WRITES, self.layout.thread(address.thread_id), args)

    def read(self, address: Address, checkpoint_id: str | None, *, full: bool = False) -> ScriptCall:
        """Read one checkpoint, the latest if no id is given.

        With `full`, every pending write that Postgres may lack comes along even if the answer is complete.
        """
        return ScriptCall(
            scripts.READ,
            self.layout.thread(address.thread_id),
            [address.checkpoint_ns, checkpoint_id or "", int(full)],
        )

    @staticmethod
    def read_read(checkpoint_id: str | None, reply: Any) -> BufferRead:
        """Read the reply to `read`."""
        _, knows_all, head, payload, dirty, complete, blobs, writes = reply
        result = BufferRead(
            head=head.decode() or None,
            dirty=dirty == 1,
            complete=complete == 1,
            knows_all=knows_all == 1,
        )
        if payload is not None:
            result.row = unpack_checkpoint(checkpoint_id or head.decode(), payload)
        result.blobs = [unpack_blob(blobs[i].decode(), blobs[i + 1]) for i in range(0, len(blobs), 2)]
        for i in range(0, len(writes), 3):
            _, _, owner, task_id, idx = writes[i].decode().split("\0")
            write = unpack_write(task_id, int(idx), writes[i + 1])
            result.writes.setdefault(owner, []).append((write, writes[i + 2] == 1))
        return result

    def drain(self, thread_id: str, max_records: int, max_bytes: int) -> ScriptCall:
        """Read the first dirty records of a thread."""
        return ScriptCall(scripts.DRAIN, self.layout.thread(thread_id), [max_records, max_bytes])

    @staticmethod
    def read_drain(reply: Any) -> Drained:
        """Read the reply to `drain`."""
        drained = Drained([], [], 0, int(reply[0]), int(reply[1]), [])
        for i in range(2, len(reply), 3):
            name, sequence, payload = reply[i : i + 3]
            drained.upto = int(sequence)
            if payload is None:
                drained.missing.append(name)
                continue
            drained.sequences.append(drained.upto)
            kind, ns, *ids = name.decode().split("\0")
            if kind == "c":
                drained.records.append(DirtyCheckpoint(ns, unpack_checkpoint(ids[0], payload)))
            elif kind == "b":
                drained.records.append(DirtyBlob(ns, unpack_blob("\0".join(ids), payload)))
            else:
                write = unpack_write(ids[1], int(ids[2]), payload)
                drained.records.append(DirtyWrite(ns, ids[0], write))
        return drained

    def ack(self, thread_id: str, upto: int) -> ScriptCall:
        """Forget the records up to a sequence number: they are in Postgres. Reply: how many wait."""
        return ScriptCall(scripts.ACK, self.layout.thread(thread_id), [thread_id, upto, self._ttl])

    def drop(self, thread_id: str, upto: int) -> ScriptCall:
        """Drop the records up to a sequence number and the thread's read cache. Reply: how many wait."""
        return ScriptCall(scripts.DROP, self.layout.thread(thread_id), [thread_id, upto])


def pack_known(heads: Iterable[tuple[str, str]]) -> bytes:
    """Pack all namespaces of a thread and their heads, as Postgres has them, for `Commands.put`."""
    parts = [part.encode() for head in heads for part in head]
    # A thread with no checkpoint has no pairs, but it must differ from "not known": the pair ('', '') names no head.
    if not parts:
        return _LENGTH.pack(0) * 2
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)
