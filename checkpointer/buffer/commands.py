"""Calls of the buffer's scripts, and their replies, without I/O.

Not here: the scripts (`scripts.py`) and the clients that run a call (`clients.py`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    """One script call: one round trip.

    Attributes:
        script: The script.
        keys: Its keys, all of one thread and its partition.
        args: Its arguments.
        confirm: A command to send after it on the same connection, in the same round trip: `WAIT` or `WAITAOF`. The
            reply is then a pair: the script's reply, and the command's.
    """

    script: scripts.Script
    keys: Sequence[bytes]
    args: Sequence[type_arg]
    confirm: tuple[str | int, ...] = ()


class Standing(NamedTuple):
    """What the caller of a put knows, for the script to check before it changes anything (`scripts.py`).

    Attributes:
        open: The token under which the thread was opened in Postgres just now, if it was.
        expected: The thread's last sequence number that the caller has seen.
        floor: The partition's highest sequence number that the caller has seen.
        force: The caller knows that the put does not belong to a deleted life of the thread.
    """

    open: int | None = None
    expected: int = 0
    floor: int = 0
    force: bool = False

    def args(self, origin: bytes) -> tuple[type_arg, ...]:
        """Return the script's arguments; `origin` is the field of the checkpoint that is continued, or empty."""
        return "" if self.open is None else self.open, self.expected, self.floor, origin, int(self.force)


Refusal = Literal["closed", "lost", "late"]


class PutReply(NamedTuple):
    """What Redis says to a put.

    Attributes:
        sequence: The sequence number of its last record; 0 if it was refused.
        token: The token under which the thread is open.
        held_bytes: Size of the partition's dirty records.
        age: For how many seconds the partition's oldest dirty thread has been so.
        lacks: The positions (from 1) of the needed blobs that Redis lacks.
        refused: Why nothing was stored, if so.
        last: With `lost`: the thread's last sequence number that Redis knows.
    """

    sequence: int
    token: int = 0
    held_bytes: int = 0
    age: float = 0.0
    lacks: Sequence[int] = ()
    refused: Refusal | None = None
    last: int = 0


@dataclass(slots=True)
class BufferRead:
    """What Redis knows about one checkpoint.

    Attributes:
        sequence: The partition's sequence.
        last: The thread's last sequence number that Redis knows.
        replay: Records up to this sequence number come from before Redis went back in time.
        open: The thread is noted as open, as far as Redis knows.
        head: The namespace's latest checkpoint that Redis knows, or None.
        row: The checkpoint that was asked for, if Redis has it.
        dirty: The row is not yet acknowledged by Postgres.
        complete: The row and every blob that it needs are here.
        is_stale: Redis has gone back in time; what it has may be older than what Postgres has.
        knows_all: Redis knows every namespace of the thread, so one without a head has no checkpoint.
        blobs: The blobs of the row that are here.
        writes: Pending writes by checkpoint id: `(write, dirty)`.
    """

    sequence: int = 0
    last: int = 0
    replay: int = 0
    open: bool = False
    head: str | None = None
    row: CheckpointRow | None = None
    dirty: bool = False
    complete: bool = False
    is_stale: bool = False
    knows_all: bool = False
    blobs: list[Blob] = field(default_factory=list)
    writes: dict[str, list[tuple[Write, bool]]] = field(default_factory=dict)

    def writes_of(self, checkpoint_id: str) -> list[tuple[Write, bool]]:
        """Return the pending writes of one checkpoint."""
        writes = self.writes.get(checkpoint_id, [])
        return [(write, False) for write, _ in writes] if self.is_stale else writes


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


class Undecodable(NamedTuple):
    """A dirty record that cannot be read, and why."""

    error: Exception


@dataclass(slots=True)
class Drained:
    """The first dirty records of a thread, in order.

    Attributes:
        records: The records.
        raw: Field and payload of each.
        sequences: The sequence number of each.
        upto: The sequence number of the last one; 0 without records.
        waiting: How many dirty records the thread had, these included.
        sequence: The partition's sequence.
        replay: Records up to this sequence number come from before a rollback of Redis.
        acked: Postgres has the thread's records up to this sequence number.
        token: The token under which the thread is open; -1 if it is not.
        time: The server's time in ms.
        age: For how many ms the oldest one has waited; -1 if the thread has none, or was pinned.
        missing: Fields whose payload Redis no longer has.
    """

    records: list[DirtyRecord | Undecodable]
    raw: list[tuple[bytes, bytes]]
    sequences: list[int]
    upto: int
    waiting: int
    sequence: int
    replay: int
    acked: int
    token: int
    time: int
    age: int
    missing: list[bytes]

    @property
    def is_all(self) -> bool:
        """Whether the thread had nothing more when it was drained."""
        return self.waiting <= len(self.records) + len(self.missing)

    def cut(self, end: int) -> None:
        """Leave only the first records, as if no more had been drained."""
        self.upto = min(self.sequences[end - 1], self.sequences[end] - 1) if end else 0
        for each in (self.records, self.raw, self.sequences):
            del each[end:]


def decode_record(name: bytes, payload: bytes) -> DirtyRecord | Undecodable:
    """Read a record, whatever its bytes are."""
    try:
        kind, ns, *ids = name.decode().split("\0")
        if kind == "c":
            return DirtyCheckpoint(ns, unpack_checkpoint(ids[0], payload))
        if kind == "b":
            return DirtyBlob(ns, unpack_blob("\0".join(ids), payload))
        return DirtyWrite(ns, ids[0], unpack_write(ids[1], int(ids[2]), payload))
    except (ValueError, IndexError, struct.error) as exc:
        return Undecodable(exc)


class Commands:
    """Builds calls for one key layout and reads their replies."""

    def __init__(self, layout: KeyLayout, clean_ttl: float) -> None:
        self.layout = layout
        self._ttl = int(clean_ttl * 1000)

    def put(self, put: Put, standing: Standing, known: bytes, blobs: Sequence[Blob]) -> ScriptCall:
        """Store a checkpoint and blobs; `known` is `pack_known(...)` or empty."""
        address = put.address
        args: list[type_arg] = [
            address.thread_id,
            *standing.args(origin_field(put.origin)),
            address.checkpoint_ns,
            put.row.checkpoint_id,
            self._ttl,
            known,
            len(blobs),
            pack_checkpoint(put.row),
        ]
        for blob in blobs:
            args += (blob.ref, pack_blob(blob))
        return ScriptCall(scripts.PUT, self.layout.thread(address.thread_id), args)

    @staticmethod
    def read_put(reply: Any) -> PutReply:
        """Read the reply to `put` or `put_writes`."""
        if isinstance(reply[0], bytes):
            refused: Any = reply[0].decode()
            return PutReply(0, refused=refused, last=int(reply[1]) if len(reply) > 1 else 0)
        sequence, token, held_bytes, age, *lacks = reply
        return PutReply(sequence, token, held_bytes, age / 1000, lacks)

    def fill(self, address: Address, checkpoint_id: str, blobs: Iterable[Blob]) -> ScriptCall:
        """Give Redis the unchanged blobs of a head."""
        args: list[type_arg] = [address.checkpoint_ns, checkpoint_id, self._ttl]
        for blob in blobs:
            args += (blob.ref, pack_blob(blob))
        return ScriptCall(scripts.FILL, self.layout.thread(address.thread_id), args)

    def put_writes(self, put: PutWrites, standing: Standing) -> ScriptCall:
        """Store pending writes; all of one call overwrite, or none."""
        address = put.address
        origin = origin_field((address.checkpoint_ns, put.checkpoint_id))
        args: list[type_arg] = [address.thread_id, *standing.args(origin), int(put.writes[0].overwrite)]
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
        sequence, last, replay, token, knows_all, head, payload, dirty, complete, blobs, writes = reply
        result = BufferRead(
            sequence=int(sequence),
            last=int(last),
            replay=int(replay),
            open=token != b"",
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
        return ScriptCall(scripts.DRAIN, self.layout.thread(thread_id), [max_records, max_bytes, thread_id])

    @staticmethod
    def read_drain(reply: Any) -> Drained:
        """Read the reply to `drain`."""
        waiting, sequence, replay, acked, token, now, age = map(int, reply[:7])
        drained = Drained([], [], [], 0, waiting, sequence, replay, acked, token, now, age, [])
        for i in range(7, len(reply), 3):
            name, sequence, payload = reply[i : i + 3]
            drained.upto = int(sequence)
            if payload is None:
                drained.missing.append(name)
                continue
            drained.sequences.append(drained.upto)
            drained.raw.append((name, payload))
            drained.records.append(decode_record(name, payload))
        return drained

    def scan(self, partition: int) -> ScriptCall:
        """Ask how long a partition's oldest dirty record has waited, and how much is dirty.

        Reply: milliseconds, -1 without one, and bytes.
        """
        state, threads = self.layout.state(partition), self.layout.threads(partition)
        return ScriptCall(scripts.SCAN, [state, threads, threads + b":never"], [])

    def ack(self, thread_id: str, drained: Drained) -> ScriptCall:
        """Forget what was drained: it is in Postgres. Reply: how many records wait, or -1."""
        return ScriptCall(
            scripts.ACK,
            self.layout.thread(thread_id),
            [thread_id, drained.upto, self._ttl, drained.sequence, drained.time if drained.is_all else 0],
        )

    def drop(self, thread_id: str, upto: int, deleted: str = "") -> ScriptCall:
        """Drop the records up to a sequence number and the thread's read cache. Reply: how many wait.

        `deleted` is the latest checkpoint id of the thread's deleted life.
        """
        return ScriptCall(scripts.DROP, self.layout.thread(thread_id), [thread_id, upto, self._ttl, deleted])

    def close(self, thread_id: str, token: int) -> ScriptCall:
        """Forget that a thread is open. Reply: 1 if it has nothing dirty and was not opened anew."""
        return ScriptCall(scripts.CLOSE, self.layout.thread(thread_id), [token])

    def raise_sequence(self, thread_id: str, floor: int) -> ScriptCall:
        """Raise the sequence of a thread's partition, if it is lower."""
        return ScriptCall(scripts.RAISE, self.layout.thread(thread_id), [floor])

    def pin(self, thread_id: str) -> ScriptCall:
        """Mark a thread as pinned, until something of it is acknowledged."""
        return ScriptCall(scripts.PIN, self.layout.thread(thread_id), [thread_id])

    def discard(self, thread_id: str, name: bytes, sequence: int) -> ScriptCall:
        """Drop one dirty record, unless it was put again since; `drop` has to follow."""
        return ScriptCall(scripts.DISCARD, self.layout.thread(thread_id), [name, sequence])


def origin_field(origin: tuple[str, str] | None) -> bytes:
    """Return the field of the checkpoint that a put continues, given as namespace and id; empty for none."""
    return b"" if origin is None else keys.field("c", *origin)


def pack_known(heads: Iterable[tuple[str, str]]) -> bytes:
    """Pack all namespaces of a thread and their heads, as Postgres has them, for `Commands.put`."""
    parts = [part.encode() for head in heads for part in head]
    # A thread with no checkpoint has no pairs, but it must differ from "not known": the pair ('', '') names no head.
    if not parts:
        return _LENGTH.pack(0) * 2
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)
