"""What of a deleted thread's buffered records belongs to its deleted life, and what to a new one.

Not here: deleting (`barriers.py`) and the tombstone's row (`store/threads.py`). Pure functions over records.

Records from before the deletion are known by their sequence number. A run that was going on may still put: such a
put is *late*, and so is what continues it. It is told from a new life of the thread's id by the checkpoint that it
continues, its *origin*: one that is gone, and not later than the latest of the deleted life. A put that continues
nothing begins a new life, and one of a checkpoint that is there already is not late, whatever it continues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointer.buffer.commands import DirtyBlob, DirtyCheckpoint, DirtyRecord
from checkpointer.records import origin_of
from checkpointer.sanitize import load_json

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from checkpointer.store.threads import Buried

Name = tuple[str, str]
"""Namespace and id of a checkpoint."""


def is_late(origin: Name | None, buried: Buried, existing: Collection[Name], late: Collection[str]) -> bool:
    """Tell whether what continues this checkpoint belongs to the deleted life."""
    if origin is None or origin in existing:
        return False
    return origin[1] <= buried.last_id or origin[1] in late


def names_of(records: Sequence[DirtyRecord]) -> set[Name]:
    """Return the checkpoints to look for in Postgres before `sort_out` can tell."""
    names = set()
    for record in records:
        if isinstance(record, DirtyCheckpoint):
            names.add((record.checkpoint_ns, record.row.checkpoint_id))
            if origin := _origin(record):
                names.add(origin)
        elif not isinstance(record, DirtyBlob):
            names.add((record.checkpoint_ns, record.checkpoint_id))
    return names


def sort_out(
    records: Sequence[DirtyRecord], buried: Buried, existing: Collection[Name]
) -> tuple[list[bool], list[str]]:
    """Tell which records belong to a new life.

    Args:
        records: The records from after the deletion, in order.
        buried: The tombstone.
        existing: Those of `names_of(records)` that Postgres has.

    Returns:
        For each record whether it belongs to a new life, and the ids of late checkpoints.
    """
    known = set(existing)
    late = set(buried.late)
    found: list[str] = []
    wanted: set[tuple[str, str]] = set()
    unwanted: set[tuple[str, str]] = set()
    keep = [True] * len(records)
    # The root's checkpoints first: those of subgraphs continue them.
    for i in sorted(range(len(records)), key=lambda i: (records[i].checkpoint_ns != "", i)):
        record = records[i]
        if not isinstance(record, DirtyCheckpoint):
            continue
        ns, row = record.checkpoint_ns, record.row
        if (ns, row.checkpoint_id) not in known and is_late(_origin(record), buried, known, late):
            keep[i] = False
            late.add(row.checkpoint_id)
            found.append(row.checkpoint_id)
            unwanted |= {(ns, ref) for ref in row.refs}
        else:
            known.add((ns, row.checkpoint_id))
            wanted |= {(ns, ref) for ref in row.refs}
    for i, record in enumerate(records):
        if isinstance(record, DirtyBlob):
            ref = record.checkpoint_ns, record.blob.ref
            keep[i] = ref in wanted or ref not in unwanted
        elif not isinstance(record, DirtyCheckpoint):
            keep[i] = not is_late((record.checkpoint_ns, record.checkpoint_id), buried, known, late)
    return keep, found


def _origin(record: DirtyCheckpoint) -> Name | None:
    row = record.row
    if row.parent_id is not None:
        return record.checkpoint_ns, row.parent_id
    try:
        metadata = load_json(row.metadata)
    except ValueError:
        return None  # Postgres will refuse it
    return origin_of(record.checkpoint_ns, None, metadata if isinstance(metadata, dict) else {})
