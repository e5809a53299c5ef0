"""One read from two tiers: what Redis has, complete or an overlay, merged with what Postgres has.

Not here: fetching either (`operations.py`). Pure functions over records.

A *snapshot* is one checkpoint with its blobs and pending writes, still serialised. The rules: a dirty checkpoint
record wins over Postgres' row of the same id, except for the parent, which the first put fixed; Postgres wins
blobs and ordinary writes, where the first one stays; dirty overwriting writes win. A clean head counts
only as far as Postgres confirms it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import CheckpointTuple, writes_sort_key
from langgraph.checkpoint.serde.types import TASKS

from checkpointer.records import EMPTY, Address, Blob, Write, saved_config
from checkpointer.sanitize import load_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from langgraph.checkpoint.serde.base import SerializerProtocol

    from checkpointer.buffer.commands import BufferRead


@dataclass(slots=True)
class Snapshot:
    """One checkpoint, serialised.

    Attributes:
        address: Thread and namespace.
        checkpoint_id: Its id.
        parent_id: Its parent's id.
        checkpoint: The checkpoint's JSON, decoded; its `channel_values` are the inline ones.
        metadata: The metadata, decoded.
        blobs: Blob by channel.
        writes: Pending writes, in no order.
    """

    address: Address
    checkpoint_id: str
    parent_id: str | None
    checkpoint: dict[str, Any]
    metadata: dict[str, Any]
    blobs: dict[str, Blob] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)

    @property
    def needs_sends(self) -> bool:
        """Whether it dates from before version 4, where sends are pending writes of the parent."""
        return self.checkpoint["v"] < 4 and self.parent_id is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What Postgres says about a namespace in one short query.

    Attributes:
        latest: The latest checkpoint's id, or None.
        parent: Its parent's id.
        writes: How many pending writes the latest checkpoint has.
        orphans: How many pending writes later checkpoints have.
        replay: What Redis has of the thread may be older than what went straight to Postgres.
    """

    latest: str | None
    parent: str | None
    writes: int
    orphans: int
    replay: bool = False


def stands(read: BufferRead, verdict: Verdict) -> bool:
    """Tell whether a complete answer of Redis is the whole truth, given what Postgres has."""
    if read.is_stale:
        return False
    if read.head is None:
        return verdict.latest is None
    # Flushed writes of a head stay in the read cache, so these are all of Postgres' writes, if they all came through
    # Redis. Dirty ones do not count: they say nothing about what Postgres has.
    flushed = [write for write, dirty in read.writes_of(read.head) if not dirty]
    if any(write.overwrite for write in flushed):
        return False  # a control write can be replaced in Postgres, and the number of writes would not tell
    known = len(flushed)
    if verdict.latest == read.head:
        return verdict.writes <= known
    # Not in Postgres yet: then nothing there may be later, and what is there for it must be known here.
    return read.dirty and (verdict.latest is None or verdict.latest < read.head) and verdict.orphans <= known


def from_buffer(address: Address, read: BufferRead, verdict: Verdict | None) -> Snapshot | None:
    """Return Redis' answer as a snapshot."""
    row = read.row
    if row is None:
        return None
    parent = row.parent_id
    if verdict is not None and verdict.latest == row.checkpoint_id:
        parent = verdict.parent
    return Snapshot(
        address,
        row.checkpoint_id,
        parent,
        load_json(row.checkpoint),
        load_json(row.metadata),
        {blob.channel: blob for blob in read.blobs},
        [write for write, _ in read.writes_of(row.checkpoint_id)],
    )


def buffer_wins(read: BufferRead, stored: Snapshot | None) -> bool:
    """Tell whether the checkpoint to answer with is Redis' one rather than the one found in Postgres."""
    if read.row is None or not read.dirty:
        return False
    if stored is None:
        return True
    if read.row.checkpoint_id == stored.checkpoint_id:
        return not read.is_stale
    return read.row.checkpoint_id > stored.checkpoint_id


def overlay(snapshot: Snapshot, read: BufferRead) -> Snapshot:
    """Lay Redis' pending writes over a snapshot from Postgres."""
    snapshot.writes = merge_writes(snapshot.writes, read.writes_of(snapshot.checkpoint_id))
    return snapshot


def complete(snapshot: Snapshot, blobs: Iterable[Blob], writes: Iterable[Write], read: BufferRead) -> Snapshot:
    """Complete a snapshot from Redis with what Postgres has of the same checkpoint."""
    snapshot.blobs |= {blob.channel: blob for blob in blobs}
    snapshot.writes = merge_writes(writes, read.writes_of(snapshot.checkpoint_id))
    return snapshot


def merge_writes(stored: Iterable[Write], buffered: Iterable[tuple[Write, bool]]) -> list[Write]:
    """Merge the pending writes of one checkpoint; `buffered` comes with whether each is dirty."""
    merged = {(write.task_id, write.idx): write for write in stored}
    for write, dirty in buffered:
        key = (write.task_id, write.idx)
        if key not in merged or (dirty and write.overwrite):
            merged[key] = write
    return list(merged.values())


def _order(write: Write) -> tuple[str, str, int]:
    return writes_sort_key(write.task_path, write.task_id, write.idx)


def add_sends(
    snapshot: Snapshot, writes: Iterable[Write], serde: SerializerProtocol, next_version: Callable[[], Any]
) -> None:
    """Give a snapshot from before version 4 its pending sends, as LangGraph's own saver does on reading."""
    sends = sorted((write for write in writes if write.channel == TASKS), key=_order)
    if not sends:
        return
    kind, data = serde.dumps_typed([serde.loads_typed((w.type, w.data)) for w in sends])
    versions = snapshot.checkpoint["channel_versions"]
    version = max(versions.values()) if versions else next_version()
    versions[TASKS] = version
    snapshot.blobs[TASKS] = Blob(TASKS, str(version), kind, data)


def to_tuple(snapshot: Snapshot, serde: SerializerProtocol) -> CheckpointTuple:
    """Decode a snapshot."""
    address = snapshot.address
    values: dict[str, Any] = {
        **(snapshot.checkpoint.get("channel_values") or {}),
        **{
            channel: serde.loads_typed((blob.type, blob.data or b""))
            for channel, blob in snapshot.blobs.items()
            if blob.type != EMPTY
        },
    }
    return CheckpointTuple(
        saved_config(address, snapshot.checkpoint_id),
        {**snapshot.checkpoint, "channel_values": values},  # type: ignore[typeddict-item]  # decoded JSON
        snapshot.metadata,  # type: ignore[arg-type]  # decoded JSON
        saved_config(address, snapshot.parent_id) if snapshot.parent_id else None,
        [(w.task_id, w.channel, serde.loads_typed((w.type, w.data))) for w in sorted(snapshot.writes, key=_order)],
    )


def from_row(row: Mapping[str, Any]) -> Snapshot:
    """Read a row of LangGraph's own SELECT."""
    blobs = [Blob(channel.decode(), "", kind.decode(), data) for channel, kind, data in row["channel_values"] or ()]
    writes = [
        Write(task.decode(), int(idx), channel.decode(), kind.decode(), path.decode(), data, overwrite=False)
        for task, channel, kind, data, path, idx in row["pending_writes"] or ()
    ]
    return Snapshot(
        Address(row["thread_id"], row["checkpoint_ns"]),
        row["checkpoint_id"],
        row["parent_checkpoint_id"],
        row["checkpoint"],
        row["metadata"],
        {blob.channel: blob for blob in blobs},
        writes,
    )
